"""Affine least squares from moments (asymmetric: inputs of the pruned model, targets of the
original), with a ridge towards the weights that the cut left."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cho_factor, cho_solve

from graphprune.statistics import Moments

Matrix = NDArray[np.float64]
SMALL = 64  # columns: narrower problems are solved all at once
UNTESTED = 1e-2  # the ridge where too few samples are there to hold some out
RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # shares of the mean variance of an input


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
    """The ridge whose solution on ``fit`` has the lowest error on rows that it has not seen: from
    the middle of the list downhill, since each solution of a wide operator takes seconds."""
    if not held_out.count:
        return UNTESTED
    known: dict[int, float] = {}

    def tried(place: int) -> float:
        if not 0 <= place < len(RIDGES):
            return np.inf
        if place not in known:
            known[place] = error(held_out, *solved(fit, weights, RIDGES[place]))
        return known[place]

    best = len(RIDGES) // 2
    while (found := min((best, best - 1, best + 1), key=tried)) != best:
        best = found
    return RIDGES[best]
