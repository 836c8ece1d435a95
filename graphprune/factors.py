"""Linear layers as two of a lower rank: y = U (V x) + b in place of y = W x + b.

With W = Q R (Q = I where W has no more rows than columns) and P the eigenvectors of the covariance
of z = R x, largest first, W = (Q P)(Pᵀ R). Of all matrices of rank r that of the first r columns of
Q P and rows of Pᵀ R gives the outputs nearest to W's, and their squared error is the sum of the
other eigenvalues: a singular value decomposition of W that knows its inputs, without a root or an
inverse of their Gram matrix (the truncation of Eckart and Young in the inputs' own norm).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from graphprune.coupling import FLOAT_TYPES
from graphprune.errors import ModelError
from graphprune.frontier import Frontier
from graphprune.linear import Linear, linears
from graphprune.model import Model
from graphprune.rewriting import Change
from graphprune.runtime import Feeds
from graphprune.statistics import Sums, chunk_rows

Matrix = NDArray[np.float64]
KINDS = ("MatMul", "Gemm", "Conv")
WIDEST = 2048  # least side of a matrix: the eigenvectors of wider ones take minutes
NARROWEST = 4
DAMPING, SCARCE = 0.01, 0.1  # shares of the mean variance: always, and times columns over rows


@dataclass(frozen=True)
class Site:
    """A layer that may be two: its operator in the normal form, and with BatchNormalization folded
    into it (where rows of the same weights are scaled)."""

    linear: Linear
    folded: Linear
    rows: int
    columns: int

    @property
    def weight(self) -> str:
        return self.linear.weight

    @property
    def row_axis(self) -> int:
        """The weight's axis that counts outputs."""
        return 0 if self.linear.kind == "Conv" or self.linear.transposed else 1

    @property
    def full(self) -> int:
        """The rank at which nothing is lost."""
        return min(self.rows, self.columns)

    @property
    def even(self) -> float:
        """The rank at which two layers cost what the one does."""
        return self.rows * self.columns / (self.rows + self.columns)


def sites(model: Model, folded: Model) -> tuple[list[Site], list[str]]:
    """The layers of ``model`` that may be two, and the weights that are too wide for it."""
    others = {linear.weight: linear for linear in linears(folded)}
    found, wide = [], []
    for linear in linears(model):
        tensor = model.initializers[linear.weight]
        plain = linear.kind in KINDS and linear.groups == 1 and tensor.data_type in FLOAT_TYPES
        if not plain or linear.weight not in others:
            continue
        size = int(np.prod(tensor.dims, dtype=np.int64))
        rows = tensor.dims[0 if linear.kind == "Conv" or linear.transposed else 1]
        site = Site(linear, others[linear.weight], rows, size // max(rows, 1))
        if site.full > WIDEST:
            wide.append(site.weight)
        elif site.full >= NARROWEST:
            found.append(site)
    return found, wide


@dataclass(frozen=True)
class Directions:
    """A layer's W = ``left`` @ ``right``, the directions that its outputs need most in front."""

    left: Matrix  # [out, full]
    right: Matrix  # [full, in]
    energy: Matrix  # [full], descending: what the outputs lose of their squares without each
    mean: Matrix  # [full]: of right @ x
    scale: Matrix  # [out]: rows of the folded weights over the rows of W

    def truncated(self, linear: Linear, model: Model, rank: int) -> Change:
        """The folded operator with a matrix of that rank in the place of its own, mean outputs as
        they were."""
        matrix = self.scale[:, None] * (self.left[:, :rank] @ self.right[:rank])
        lost = self.scale * (self.left[:, rank:] @ self.mean[rank:])
        return linear, matrix[None], linear.offset(model, len(matrix)) + lost


def directions(model: Model, site: Site, frontier: Frontier, seed: int) -> Directions:
    """Of one layer of ``model``, from its inputs: ``frontier`` runs the folded model and holds what
    the layer reads and writes."""
    matrix = site.linear.matrix(model)[0]
    basis, core = (None, matrix) if site.rows <= site.columns else np.linalg.qr(matrix)
    sums, squares, mean_square = _projected(site.folded, core, frontier, seed)
    with np.errstate(over="ignore", invalid="ignore"):
        moments = sums.centred()
        variance = squares - mean_square
    assert isinstance(moments.xx, np.ndarray)  # narrower than those that stay rows
    if not np.isfinite(moments.xx).all() or not np.isfinite(variance):
        raise ModelError(
            "activations on the calibration inputs are NaN, infinite or too large to be squared",
            f"tensor {site.folded.x!r}",
            "Give samples with --calib, in the range that the model was trained on.",
        )
    damping = (DAMPING + SCARCE * site.columns / moments.count) * max(variance, 0.0)
    energy, vectors = np.linalg.eigh(moments.xx[0] + damping * (core @ core.T))
    energy, vectors = np.maximum(energy[::-1], 0.0), vectors[:, ::-1]
    strongest = np.abs(vectors).argmax(axis=0)
    vectors = vectors * np.where(vectors[strongest, np.arange(len(core))] < 0, -1.0, 1.0)
    left = vectors if basis is None else basis @ vectors
    folded = site.folded.matrix(frontier.model)[0]
    scale = (folded * matrix).sum(axis=1) / np.maximum(np.square(matrix).sum(axis=1), 1e-30)
    return Directions(left, vectors.T @ core, energy, vectors.T @ moments.mean_x[0], scale)


def _projected(
    linear: Linear, core: Matrix, frontier: Frontier, seed: int
) -> tuple[Sums, float, float]:
    """Sums over core @ x; the mean over inputs of their squares, and of their squared means."""
    sums: Sums | None = None
    total = np.zeros(core.shape[1])
    squares, count = 0.0, 0
    narrow = core.T.astype(np.float32)
    assert linear.y is not None
    for chunk in range(frontier.chunks):
        x, y = frontier[linear.x][chunk], frontier[linear.y][chunk]
        for rows, _ in chunk_rows(linear, x, y, frontier.chunks, (seed, 0, chunk)):
            with np.errstate(over="ignore", invalid="ignore"):  # said by the caller
                found = rows.astype(np.float32, copy=False)
                z = found @ narrow
                nothing = np.zeros((*z.shape[:2], 0), np.float32)
                sums = sums or Sums.empty(z, nothing)
                sums.add(z, nothing)
                total += found.sum(axis=(0, 1), dtype=np.float64)
                squares += float(np.square(found, dtype=np.float64).sum())
                count += found.shape[1]
    assert sums is not None
    size = max(count, 1)
    return sums, squares / size / len(total), float(np.square(total / size).mean())


def all_directions(
    model: Model,
    folded: Model,
    chosen: Sequence[Site],
    feeds: Sequence[Feeds],
    memory: float,
    seed: int,
) -> dict[str, Directions]:
    """Directions by weight, in one walk over the folded model."""
    frontier = Frontier(folded, feeds, memory)
    found = {}
    for site in sorted(chosen, key=lambda site: site.folded.node):
        assert site.folded.y is not None
        frontier.advance([site.folded.x, site.folded.y])
        found[site.weight] = directions(model, site, frontier, seed)
    return found
