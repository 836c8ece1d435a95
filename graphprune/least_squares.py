"""Affine least squares from moments (asymmetric: inputs of the pruned model, targets of the
original), with a ridge towards the weights that the cut left."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cho_factor, cho_solve

from graphprune.statistics import Moments

Matrix = NDArray[np.float64]
SMALL = 64  # columns: narrower problems are solved all at once
RIDGES = (0.3, 3e-2, 3e-3, 3e-4, 1e-6)  # shares of the mean variance of an input
WORTH = 0.05  # share of the error that a smaller ridge must take away
UNTESTED = RIDGES[0]  # where too few samples are there to hold some out


def solved(moments: Moments, weights: Matrix, ridge: float) -> tuple[Matrix, Matrix]:
    """V = (T Xᶜᵀ + λ W_S)(Xᶜ Xᶜᵀ + λ I)⁻¹ and b = mean(T) − V mean(X), for each group.

    ``weights``: [groups, out, in]; λ is ``ridge`` times the mean variance of the group's inputs.
    """
    d = weights.shape[2]
    scale = np.trace(moments.xx, axis1=1, axis2=2) / d
    penalty = (ridge * scale + np.finfo(np.float64).tiny)[:, None, None]
    left = moments.xx + penalty * np.eye(d)
    right = (moments.tx + penalty * weights).transpose(0, 2, 1)
    solutions = [_one(a, b) for a, b in zip(left, right, strict=True)] if d > SMALL else None
    solution = np.linalg.solve(left, right) if solutions is None else np.stack(solutions)
    matrix = solution.transpose(0, 2, 1)
    return matrix, offset(moments, matrix)


def _one(left: Matrix, right: Matrix) -> Matrix:
    """Symmetric and positive but for rounding: half the work of a general solution."""
    try:
        return np.asarray(cho_solve(cho_factor(left, lower=True), right))
    except LinAlgError:  # a ridge so small that rounding of dependent inputs outweighs it
        return np.asarray(np.linalg.solve(left, right))


def offset(moments: Moments, matrix: Matrix) -> Matrix:
    """The bias that makes the mean output the mean target: [groups, out]."""
    return np.asarray(moments.mean_t - np.einsum("gmd,gd->gm", matrix, moments.mean_x))


def error(moments: Moments, matrix: Matrix, bias: Matrix) -> float:
    """Mean squared error over rows, summed over outputs, of ``matrix`` x + ``bias``."""
    quadratic = np.einsum("gmd,gmd->", matrix @ moments.xx, matrix)
    cross = np.einsum("gmd,gmd->", matrix, moments.tx)
    means = np.einsum("gmd,gd->gm", matrix, moments.mean_x) + bias - moments.mean_t
    return float(moments.tt.sum() - 2 * cross + quadratic + np.square(means).sum())


def best_ridge(fit: Moments, held_out: Moments, weights: Matrix) -> float:
    """The largest ridge that loses little: from the top of the list down as long as each step
    lowers the error on rows that ``fit`` has not seen by ``WORTH``.

    A smaller one that is hardly better here has fitted these samples: what follows reads it on
    others (Breiman's one-standard-error rule, with a share in place of the error's own spread).
    """
    if not held_out.count:
        return UNTESTED
    best, least = RIDGES[0], error(held_out, *solved(fit, weights, RIDGES[0]))
    for ridge in RIDGES[1:]:
        found = error(held_out, *solved(fit, weights, ridge))
        if not found < (1 - WORTH) * least:
            break
        best, least = ridge, found
    return best
