"""Covariances of few rows and many columns, kept as the rows: a Gram matrix of 10,000 columns takes
a gigabyte and minutes, and says no more than the 500 rows that it was made of.

With X the rows, centred and over the root of their number, C = Xᵀ X, and by Woodbury's identity
(C + λ I)⁻¹ = (I - Xᵀ K⁻¹ X) / λ with K = X Xᵀ + λ I, a matrix of rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.blas import dtrsm
from scipy.linalg.lapack import dpotrf

Matrix = NDArray[np.float64]
WIDE = 2048  # columns: up to these a Gram matrix is cheap,
FEW = 0.5  # and with more than so many rows for each column it is no larger


@dataclass(frozen=True)
class Thin:
    """C = Xᵀ X for each group. ``rows``: [groups, rows, columns]."""

    rows: Matrix


Covariance = Matrix | Thin  # [groups, columns, columns], or what gives them


def thin(rows: int, columns: int) -> bool:
    """Whether a covariance of so many rows is better kept as these."""
    return columns > WIDE and rows <= FEW * columns


def variances(covariance: Covariance) -> Matrix:
    """Its diagonals: [groups, columns]."""
    if isinstance(covariance, Thin):
        return np.asarray(np.square(covariance.rows).sum(axis=1))
    return np.diagonal(covariance, axis1=1, axis2=2)


def traces(covariance: Covariance) -> Matrix:
    """[groups]"""
    if isinstance(covariance, Thin):
        return np.asarray(np.square(covariance.rows).sum(axis=(1, 2)))
    return np.asarray(np.trace(covariance, axis1=1, axis2=2))


def quadratic(covariance: Covariance, matrix: Matrix) -> float:
    """Sum over groups and over the rows m of ``matrix`` [groups, m, columns] of m C mᵀ."""
    if isinstance(covariance, Thin):
        return float(np.square(matrix @ covariance.rows.transpose(0, 2, 1)).sum())
    return float(np.einsum("gmd,gmd->", matrix @ covariance, matrix))


def finite(covariance: Covariance) -> bool:
    return bool(np.isfinite(variances(covariance)).all())


class Damped:
    """C + λ I of one group, and its inverse as I - Bᵀ B over λ; columns may leave it."""

    def __init__(self, rows: Matrix, damping: float) -> None:
        self.rows = rows
        self.damping = damping
        self.inner = rows @ rows.T
        self._solve()

    def _solve(self) -> None:
        damped = self.inner.copy()
        damped.reshape(-1)[:: len(damped) + 1] += self.damping
        root, failed = dpotrf(damped.T, lower=True, clean=True)
        if failed:  # rounding has eaten the damping
            values, vectors = np.linalg.eigh(damped)
            least = np.finfo(np.float64).eps * max(float(values[-1]), 1e-300)
            self.half = (vectors / np.sqrt(np.maximum(values, least))).T @ self.rows
        else:  # as BLAS reads it, the transpose is in its own order
            self.half = dtrsm(1.0, root, self.rows.T, side=1, lower=True, trans_a=True).T

    def blocks(self, places: NDArray[np.int64]) -> Matrix:
        """Of the inverse, at ``places`` [units, width]: [units, width, width]."""
        mine = self.half.T[places]  # [units, width, rows]
        return np.asarray((np.eye(places.shape[1]) - mine @ mine.swapaxes(1, 2)) / self.damping)

    def some(self, columns: NDArray[np.int64]) -> Matrix:
        """Rows of the inverse: [columns given, columns]."""
        found = -(self.half[:, columns].T @ self.half)
        found[np.arange(len(columns)), columns] += 1.0
        return np.asarray(found / self.damping)

    def times(self, left: Matrix) -> Matrix:
        """``left`` [m, columns] times the inverse."""
        return np.asarray((left - (left @ self.half.T) @ self.half) / self.damping)

    def without(self, columns: NDArray[np.int64]) -> None:
        """Take columns out: zeros, from now on."""
        gone = self.rows[:, columns]
        self.inner = self.inner - gone @ gone.T
        self.rows = self.rows.copy()
        self.rows[:, columns] = 0.0
        self._solve()

    def keep(self, columns: NDArray[np.int64]) -> None:
        """Let all others go, which are zeros by now."""
        self.rows, self.half = self.rows[:, columns], self.half[:, columns]
