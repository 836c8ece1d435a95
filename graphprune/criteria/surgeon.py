"""Optimal brain surgeon on coupled channels: which units of a group leave first, and the distortion
that each further unit costs (OBSPA, arXiv 2403.18955; formulas: block OBS)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.blas import dgemm
from scipy.linalg.lapack import dpotrf, dpotri, dtrtri

from graphprune.thin import Covariance, Damped, Thin, variances

Matrix = NDArray[np.float64]
Indices = NDArray[np.int64]
DAMPING = 0.01  # share of the mean variance added to every input's,
CONSTANT = 1e-10  # relative variance below which an input says nothing but its mean
SCARCE = 0.1  # and this times columns over rows: few rows fit anything
COMPACT = 0.2  # share of columns that left before the others move together
STEPS = 48  # a group of more units than this drops several at once


@dataclass
class Consumer:
    """One linear operator that reads a group's units: Y = W X, X centred.

    ``columns`` [units, groups, width]: the columns that a unit takes in each group of the operator.
    """

    weights: Matrix  # [groups, out, in]
    covariance: Covariance  # [groups, in, in]
    mean: Matrix  # [groups, in]
    columns: Indices
    rows: float = np.inf  # that the covariance was taken over
    left: Matrix = field(init=False)  # [groups, in, out]: the weights updated for what has left
    inverse: Matrix = field(init=False)  # empty where few rows stand for it:
    thin: list[Damped] = field(init=False)  # then one for each group
    gone: NDArray[np.bool_] = field(init=False)  # [groups, columns that still stand]
    energy: float = field(init=False)  # ||W X||^2 per row, what errors are relative to

    def __post_init__(self) -> None:
        d = self.weights.shape[2]
        spread = variances(self.covariance)
        mean = spread.mean(axis=1)[:, None, None]
        constant = spread <= CONSTANT * np.square(self.mean).mean(axis=1, keepdims=True)
        constant |= spread <= CONSTANT * mean[:, 0]
        self.left = np.array(self.weights.swapaxes(1, 2), order="C")
        self.left[constant] = 0.0  # all in the bias: free
        damping = (DAMPING + SCARCE * d / self.rows) * mean[:, 0] + 1e-30
        self.inverse, self.thin = np.empty((0, 0, 0)), []
        if isinstance(self.covariance, Thin):
            pairs = zip(self.covariance.rows, damping, strict=True)
            self.thin = [Damped(rows, float(extra[0])) for rows, extra in pairs]
            energy = np.square(self.covariance.rows @ self.left).sum()
        else:
            self.inverse = np.stack(
                [_inverse(one, extra) for one, extra in zip(self.covariance, damping, strict=True)]
            )
            energy = np.vdot(self.covariance @ self.left, self.left)
        self.energy = max(float(energy), 1e-30)
        self.gone = np.zeros((len(self.left), d), bool)
        self.place = np.arange(d)  # original column → where it stands now

    def errors(self, units: Indices) -> Matrix:
        """Relative squared error of the output if each of ``units`` alone left: [units]."""
        at = self.place[self.columns[units]]  # [units, groups, width]
        g = np.arange(at.shape[1])[None, :, None]
        if self.thin:
            block = np.stack([one.blocks(at[:, i]) for i, one in enumerate(self.thin)], axis=1)
        else:
            block = self.inverse[g[..., None], at[..., :, None], at[..., None, :]]
        weights = self.left[g, at]  # [units, groups, width, out]
        solved = np.linalg.solve(block, weights @ weights.swapaxes(2, 3))
        return np.asarray(np.einsum("ugww->u", solved) / self.energy)

    def remove(self, units: Indices) -> float:
        """Take ``units`` out together, update the rest; the relative squared error it costs."""
        at = self.place[self.columns[units]].transpose(1, 0, 2).reshape(len(self.left), -1)
        total = 0.0
        for g, columns in enumerate(at):
            rows = self.thin[g].some(columns) if self.thin else self.inverse[g][columns]
            root = np.linalg.cholesky(rows[:, columns])  # of the block that leaves
            back = np.asarray(dtrtri(root, lower=True)[0])
            half = back @ rows  # [removed, in]
            gone = back @ self.left[g][columns]  # [removed, out]
            total += float(np.vdot(gone, gone))
            self.left[g] -= half.T @ gone
            self.left[g][columns] = 0
            if self.thin:
                self.thin[g].without(columns)
                continue
            # symmetric, so its transpose, which BLAS updates in place, is the same matrix
            dgemm(-1.0, half.T, half, 1.0, self.inverse[g].T, overwrite_c=True)
        self.gone[np.arange(len(at))[:, None], at] = True
        if self.gone.mean() > COMPACT:
            self._compact()
        return total / self.energy

    def whole(self) -> Matrix:
        """The updated weights in the original's columns, zeros where columns left."""
        weights = np.zeros((len(self.left), len(self.place), self.left.shape[2]))
        weights[:, self.place >= 0] = self.left[:, self.place[self.place >= 0]]
        return weights.swapaxes(1, 2)

    def _compact(self) -> None:
        """Drop columns that left; every group loses as many."""
        where = np.nonzero(~self.gone)[1].reshape(len(self.gone), -1)
        if not (where == where[0]).all():
            return  # other positions in each group: they stay, as zeros
        where = where[0]
        self.left = self.left[:, where]
        for one in self.thin:
            one.keep(where)
        if not self.thin:
            self.inverse = np.stack([one[np.ix_(where, where)] for one in self.inverse])
        place = np.full(self.gone.shape[1], -1)
        place[where] = np.arange(len(where))
        self.place = np.where(self.place >= 0, place[self.place], -1)
        self.gone = self.gone[:, where]


def _inverse(covariance: Matrix, damping: float) -> Matrix:
    """Of a symmetric positive matrix with more on its diagonal, both triangles filled."""
    damped = covariance.copy()
    damped.reshape(-1)[:: len(damped) + 1] += damping
    root, failed = dpotrf(damped.T, lower=True)
    lower, refused = dpotri(root, lower=True, overwrite_c=True)
    if failed or refused:  # rounding has eaten the damping
        return np.asarray(np.linalg.inv(damped))
    result: Matrix = np.add(lower, lower.T, order="C")  # above it: zeros
    np.fill_diagonal(result, np.diagonal(lower))
    return result


@dataclass(frozen=True)
class Sweep:
    """Units of a group in the order in which they leave, and the running sum of their errors."""

    order: Indices  # ordinals in the group
    curve: Matrix  # [units + 1]: distortion after so many left
    stops: tuple[tuple[int, tuple[Matrix, ...]], ...] = ()  # (how many left, weights then)


def sweep(
    consumers: Sequence[Consumer],
    size: int,
    order: Indices | None = None,
    stops: Sequence[int] = (),
) -> Sweep:
    """Drop the cheapest unit, update, and so on until none is left.

    With ``order`` the units leave in that order instead and only the curve is new. ``stops`` are
    numbers of units after which the updated weights are written down.
    """
    alive = np.arange(size)
    gone: list[int] = []
    curve = [0.0]
    written: list[tuple[int, tuple[Matrix, ...]]] = []
    while len(alive):
        count = max(1, min(len(alive), size // STEPS))
        if order is not None:
            chosen = order[len(gone) : len(gone) + count]
        else:
            scores = np.sum([c.errors(alive) for c in consumers], axis=0)
            chosen = alive[np.argsort(scores, kind="stable")[:count]]
        cost = sum(c.remove(chosen) for c in consumers)
        each = max(cost, 0.0) / len(chosen)
        curve += [curve[-1] + each * (i + 1) for i in range(len(chosen))]
        gone += chosen.tolist()
        alive = alive[~np.isin(alive, chosen)]
        if len(written) < len(stops) and len(gone) >= stops[len(written)]:
            written.append((len(gone), tuple(c.whole() for c in consumers)))
    return Sweep(np.array(gone, np.int64), np.array(curve), tuple(written))
