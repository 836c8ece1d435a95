"""Moments of linear operators' inputs and targets, summed over samples in float64."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.blas import dger

from graphprune.linear import Linear
from graphprune.model import Array
from graphprune.thin import Covariance, Thin, thin
from graphprune.unfold import inputs_at, outputs_at, positions

Matrix = NDArray[np.float64]
FEWEST_ROWS, MOST_ROWS = 4096, 32768  # that a Gram matrix is summed over, where there are so many
ROWS_PER_COLUMN = 64  # between these two,
LEAST_PER_COLUMN = 8  # and at least
BLOCK = 1 << 25  # elements of one unfolded block: larger chunks are unfolded sample by sample


@dataclass
class Sums:
    """Sums over rows of x: [groups, rows, in] and targets t: [groups, rows, out].

    Both are shifted by a constant near their mean, so that float32 products lose nothing when the
    mean is large; merging two is adding them. Few rows wait until there are enough to pay for
    touching all of a Gram matrix.
    """

    shift_x: Matrix  # [groups, in]
    shift_t: Matrix  # [groups, out]
    count: float
    x: Matrix  # [groups, in]
    t: Matrix  # [groups, out]
    xx: Matrix  # [groups, in, in]
    tx: Matrix  # [groups, out, in]
    tt: Matrix  # [groups, out]
    gram: bool = True  # False: xx stays zero
    _waiting: list[tuple[Array, Array]] = field(default_factory=list)

    @classmethod
    def empty(cls, x: Array, t: Array, *, gram: bool = True) -> Sums:
        """Sums of nothing, shifted by the means of these first rows (as float32 holds them)."""
        groups, _, d = x.shape
        m = t.shape[2]
        return cls(
            x.mean(axis=1, dtype=np.float64).astype(np.float32).astype(np.float64),
            t.mean(axis=1, dtype=np.float64).astype(np.float32).astype(np.float64),
            0.0,
            np.zeros((groups, d)),
            np.zeros((groups, m)),
            np.zeros((groups, d, d)),
            np.zeros((groups, m, d)),
            np.zeros((groups, m)),
            gram,
        )

    def add(self, x: Array, t: Array) -> None:
        """Count these rows in: x [groups, rows, in], t [groups, rows, out]."""
        a = (x - self.shift_x[:, None].astype(np.float32)).astype(np.float32, copy=False)
        b = (t - self.shift_t[:, None].astype(np.float32)).astype(np.float32, copy=False)
        self._waiting.append((a, b))
        rows = sum(a.shape[1] for a, _ in self._waiting)
        if rows >= a.shape[2] or rows * a.shape[0] * a.shape[2] >= BLOCK:
            self._settle()

    def _settle(self) -> None:
        if not self._waiting:
            return
        a, b = (np.concatenate(part, axis=1) for part in zip(*self._waiting, strict=True))
        self._waiting.clear()
        self.count += a.shape[1]
        self.x += a.sum(axis=1, dtype=np.float64)
        self.t += b.sum(axis=1, dtype=np.float64)
        if self.gram:
            self.xx += a.transpose(0, 2, 1) @ a
        self.tx += b.transpose(0, 2, 1) @ a
        self.tt += np.square(b).sum(axis=1, dtype=np.float64)

    def merged(self, other: Sums) -> Sums:
        """Both together; they must share their shifts."""
        if self._stays_thin(other):
            both = [*self._waiting, *other._waiting]
            return replace(self._nothing(), _waiting=both)
        self._settle()
        other._settle()
        return Sums(
            self.shift_x,
            self.shift_t,
            self.count + other.count,
            self.x + other.x,
            self.t + other.t,
            self.xx + other.xx if self.gram else self.xx,
            self.tx + other.tx,
            self.tt + other.tt,
            self.gram,
        )

    def _nothing(self) -> Sums:
        """Sums of the same form, of no rows."""
        x, t = np.zeros(self.x.shape), np.zeros(self.t.shape)
        xx, tx = np.zeros(self.xx.shape), np.zeros(self.tx.shape)
        return Sums(self.shift_x, self.shift_t, 0.0, x, t, xx, tx, t.copy(), self.gram)

    def _stays_thin(self, other: Sums | None = None) -> bool:
        """Whether all rows still wait, and are too few for a Gram matrix of their columns."""
        every = [self] if other is None else [self, other]
        rows = sum(a.shape[1] for one in every for a, _ in one._waiting)
        settled = any(one.count for one in every)
        return self.gram and not settled and thin(rows, self.x.shape[1])

    def _thin(self) -> Moments:
        """As ``centred``, with the rows themselves."""
        nothing = [(np.zeros((len(self.x), 0, n)) for n in (self.x.shape[1], self.t.shape[1]))]
        a, b = (
            np.concatenate(part, axis=1).astype(np.float64)
            for part in zip(*nothing, *self._waiting, strict=True)
        )
        n = max(a.shape[1], 1)
        x, t = a.sum(axis=1) / n, b.sum(axis=1) / n
        a -= x[:, None]
        b -= t[:, None]
        tx, tt = b.transpose(0, 2, 1) @ a / n, np.square(b).sum(axis=1) / n
        a /= np.sqrt(n)
        return Moments(float(len(a[0])), self.shift_x + x, self.shift_t + t, Thin(a), tx, tt)

    def centred(self) -> Moments:
        """Means and covariances."""
        if self._stays_thin():
            return self._thin()
        self._settle()
        n = max(self.count, 1.0)
        x, t = self.x / n, self.t / n
        return Moments(
            self.count,
            self.shift_x + x,
            self.shift_t + t,
            _less_means(self.xx, n, x, x) if self.gram else self.xx,
            _less_means(self.tx, n, t, x),
            np.maximum(self.tt / n - np.square(t), 0),
        )

    def about_zero(self) -> Moments:
        """As ``centred``, of an operator that has no bias: moments about zero, no means."""
        found = self.centred()
        x, t = found.mean_x, found.mean_t
        xx: Covariance
        if isinstance(found.xx, Thin):
            xx = Thin(np.concatenate([found.xx.rows, x[:, None]], axis=1))
        else:
            xx = found.xx + x[:, :, None] * x[:, None] if self.gram else found.xx
        tx, tt = found.tx + t[:, :, None] * x[:, None], found.tt + np.square(t)
        return Moments(found.count, np.zeros_like(x), np.zeros_like(t), xx, tx, tt)


def _less_means(products: Matrix, count: float, a: Matrix, b: Matrix) -> Matrix:
    """Mean products less products of means: [groups, a, b]; large, so written over once only."""
    result = products / count
    for one, left, right in zip(result, a, b, strict=True):
        if one.size:  # rows of ``one`` are the columns that BLAS knows
            dger(-1.0, right, left, a=one.T, overwrite_a=True)
    return result


@dataclass(frozen=True)
class Moments:
    """Means and covariances of inputs and targets over all rows seen."""

    count: float
    mean_x: Matrix  # [groups, in]
    mean_t: Matrix  # [groups, out]
    xx: Covariance  # [groups, in, in]
    tx: Matrix  # [groups, out, in]
    tt: Matrix  # [groups, out], variances


def rows_wanted(columns: int) -> int:
    """Rows after which a Gram matrix of so many columns hardly changes any more."""
    some = min(max(FEWEST_ROWS, ROWS_PER_COLUMN * columns), MOST_ROWS)
    return max(some, LEAST_PER_COLUMN * columns)


def chunk_rows(
    linear: Linear, x: Array, y: Array, chunks: int, seed: tuple[int, ...]
) -> list[tuple[Array, Array]]:
    """Blocks of (x rows, y rows) of one chunk: the same sampled positions of both."""
    share = max(1, rows_wanted(linear.columns(x)) // max(chunks, 1))
    spatial = linear.kind in ("Conv", "ConvTranspose")
    most = max(1, share // len(x)) if spatial else share
    where = positions(linear, y.shape, most, seed)
    if not spatial:
        return [(inputs_at(linear, x, y.shape, where), outputs_at(linear, y, where))]
    width = len(where) * linear.taps * x.shape[1]
    step = max(1, BLOCK // max(width, 1))
    return [
        (
            inputs_at(linear, x[i : i + step], y.shape, where),
            outputs_at(linear, y[i : i + step], where),
        )
        for i in range(0, len(x), step)
    ]
