"""Affine least squares from moments (asymmetric: inputs of the pruned model, targets of the
original), with a ridge towards the weights that the cut left."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.lapack import dpotrf, dpotrs

from graphprune.statistics import Moments
from graphprune.thin import Damped, Thin, quadratic, traces

Matrix = NDArray[np.float64]
SMALL = 64  # columns: narrower problems are solved all at once
RIDGES = (0.3, 3e-2, 3e-3, 3e-4, 1e-6)  # shares of the mean variance of an input
WORTH = 0.05  # share of the error that a smaller ridge must take away
UNTESTED = RIDGES[0]  # where too few samples are there to hold some out


def solved(moments: Moments, weights: Matrix, ridge: float) -> tuple[Matrix, Matrix]:
    """V = (T Xᶜᵀ + λ W_S)(Xᶜ Xᶜᵀ + λ I)⁻¹ and b = mean(T) − V mean(X), for each group.

    ``weights``: [groups, out, in]; λ is ``ridge`` times the mean variance of the group's inputs.
    """
    return Ridged(moments, ridge).solved(moments, weights)


class Ridged:
    """Xᶜ Xᶜᵀ + λ I of each group, factored once for any targets."""

    def __init__(self, moments: Moments, ridge: float) -> None:
        d = moments.mean_x.shape[1]
        scale = traces(moments.xx) / d
        self.penalty = ridge * scale + np.finfo(np.float64).tiny
        self.thin: list[Damped] = []
        if isinstance(moments.xx, Thin):
            pairs = zip(moments.xx.rows, self.penalty.tolist(), strict=True)
            self.thin = [Damped(rows, penalty) for rows, penalty in pairs]
            return
        self.left = moments.xx.copy()
        self.left.reshape(len(self.left), -1)[:, :: d + 1] += self.penalty[:, None]
        wide = self.left if d > SMALL else self.left[:0]
        self.roots = [dpotrf(one.T, lower=True, clean=False) for one in wide]

    def solved(self, moments: Moments, weights: Matrix) -> tuple[Matrix, Matrix]:
        """As the function, for targets on the same inputs."""
        right = moments.tx + self.penalty[:, None, None] * weights
        if self.thin:
            matrix = np.stack([k.times(one) for k, one in zip(self.thin, right, strict=True)])
        elif self.left.shape[2] <= SMALL:
            solution = np.linalg.solve(self.left, right.transpose(0, 2, 1))
            matrix = solution.transpose(0, 2, 1)
        else:
            matrix = np.stack([self._one(g, right[g]) for g in range(len(right))])
        return matrix, offset(moments, matrix)

    def _one(self, g: int, right: Matrix) -> Matrix:
        """Symmetric and positive but for rounding: half the work of a general solution."""
        root, failed = self.roots[g]
        if failed:  # a ridge so small that rounding of dependent inputs outweighs it
            return np.asarray(np.linalg.solve(self.left[g], right.T).T)
        return np.asarray(dpotrs(root, right.T, lower=True, overwrite_b=True)[0].T)


def offset(moments: Moments, matrix: Matrix) -> Matrix:
    """The bias that makes the mean output the mean target: [groups, out]."""
    return np.asarray(moments.mean_t - np.einsum("gmd,gd->gm", matrix, moments.mean_x))


def error(moments: Moments, matrix: Matrix, bias: Matrix) -> float:
    """Mean squared error over rows, summed over outputs, of ``matrix`` x + ``bias``."""
    own = quadratic(moments.xx, matrix)
    cross = np.einsum("gmd,gmd->", matrix, moments.tx)
    means = np.einsum("gmd,gd->gm", matrix, moments.mean_x) + bias - moments.mean_t
    found = float(moments.tt.sum() - 2 * cross + own + np.square(means).sum())
    return max(found, 0.0)  # what cancels can come out just below


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
