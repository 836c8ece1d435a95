"""Moments of several uses of one weight, for one solution that serves them all.

Σ_k ‖W X_k + b_k - Y_k‖² is least, for any W, where each b_k makes the means agree; what is left are
products about each use's own means, and these add up.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from graphprune.statistics import Moments
from graphprune.thin import Covariance, Matrix, Thin, thin


def pooled(parts: Sequence[Moments]) -> Moments:
    """All together, as their counts weigh, about the means of each, which are zero from then on."""
    count = sum(part.count for part in parts)
    shares = [part.count / count if count else 0.0 for part in parts]
    first = parts[0]
    return Moments(
        count,
        np.zeros_like(first.mean_x),
        np.zeros_like(first.mean_t),
        _covariance([part.xx for part in parts], shares),
        np.asarray(sum(share * part.tx for share, part in zip(shares, parts, strict=True))),
        np.asarray(sum(share * part.tt for share, part in zip(shares, parts, strict=True))),
    )


def about(moments: Moments, centre: Moments) -> Moments:
    """Moments about the means of other rows, which then count as zero: what affine maps that fit
    those means leave of these rows."""
    x, t = moments.mean_x - centre.mean_x, moments.mean_t - centre.mean_t
    xx = moments.xx
    if isinstance(xx, Thin):
        xx = Thin(np.concatenate([xx.rows, x[:, None]], axis=1))
    else:
        xx = xx + x[:, :, None] * x[:, None]
    nothing = np.zeros_like(x), np.zeros_like(t)
    tx = moments.tx + t[:, :, None] * x[:, None]
    return Moments(moments.count, *nothing, xx, tx, moments.tt + np.square(t))


def _covariance(parts: Sequence[Covariance], shares: Sequence[float]) -> Covariance:
    pairs = [*zip(parts, shares, strict=True)]
    rows = [np.sqrt(share) * part.rows for part, share in pairs if isinstance(part, Thin)]
    if len(rows) == len(parts) and thin(sum(r.shape[1] for r in rows), rows[0].shape[2]):
        return Thin(np.concatenate(rows, axis=1))
    return np.asarray(sum(share * _dense(part) for part, share in pairs))


def _dense(covariance: Covariance) -> Matrix:
    if isinstance(covariance, Thin):
        return np.asarray(covariance.rows.transpose(0, 2, 1) @ covariance.rows)
    return covariance
