"""How far outputs are from the original's, as one number."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import log_softmax

from graphprune.model import Array

TINY = 1e-12


def distortion(expected: Sequence[Array], actual: Sequence[Array]) -> float:
    """Mean over the float outputs: the Kullback-Leibler divergence of class scores ([rows,
    classes]), the squared error over the variance of anything else."""
    values = [
        _of(a.astype(np.float64), b.astype(np.float64))
        for a, b in zip(expected, actual, strict=True)
        if a.dtype.kind == "f" and a.size
    ]
    return float(np.mean(values)) if values else 0.0


def relative_error(expected: Sequence[Array], actual: Sequence[Array]) -> float:
    """||a - b|| / ||a|| over all float outputs together."""
    pairs = [
        (a.astype(np.float64), b.astype(np.float64))
        for a, b in zip(expected, actual, strict=True)
        if a.dtype.kind == "f"
    ]
    size = sum(float(np.square(a).sum()) for a, _ in pairs)
    return float(np.sqrt(sum(np.square(a - b).sum() for a, b in pairs) / max(size, TINY)))


def _of(expected: Array, actual: Array) -> float:
    if expected.ndim == 2 and expected.shape[1] > 1:
        p, q = _log_probabilities(expected), _log_probabilities(actual)
        return float((np.exp(p) * (p - q)).sum(axis=1).mean())
    spread = max(float(np.square(expected - expected.mean()).mean()), TINY)
    return float(np.square(expected - actual).mean()) / spread


def _log_probabilities(scores: Array) -> Array:
    """Class scores as log probabilities; rows that sum to one already are such."""
    if scores.min() >= 0 and np.allclose(scores.sum(axis=1), 1, atol=1e-3):
        return np.asarray(np.log(np.maximum(scores, TINY)))
    return np.asarray(log_softmax(scores, axis=1))
