"""Repair from weights alone: what a lost channel says beyond the kept ones is replaced by its
conditional mean (algorithms: ReLU-aware form of UDFC, arXiv 2308.07209, with the moments of the
activations themselves)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.linalg.lapack import dposv, sposv

from graphprune.coupling import Mask
from graphprune.linear import Linear, Matrix
from graphprune.model import Array, Model
from graphprune.repair.consumers import Consumer, Index, channel_axis, consumers, places_of
from graphprune.repair.damage import Damage, Repaired
from graphprune.repair.propagate import propagate
from graphprune.repair.rows import Rows, StopError
from graphprune.rewriting import rewritten

RIDGES = (0.03, 0.1, 0.3, 1.0)  # shares of the mean variance of a consumer's inputs; smaller ones
# would trust the rows more than they deserve where BatchNormalization has been folded away
SEEN = 0.8  # share of the rows that readings are fitted to while the others choose the ridge


def compensate(
    damage: Damage, *, ridges: Sequence[float] = RIDGES, rows: int = 2048
) -> tuple[Model, tuple[Repaired, ...]]:
    """The pruned model with every consumer of lost channels P reading them off the kept ones S.

    x_P is taken for mu_P + B (x_S - mu_S), B = C_PS (C_SS + λ mean(diag C_SS) I)⁻¹, the same B at
    every tap; mu and C are the moments of ``rows`` random rows that walk the normal form, λ is the
    one of ``ridges`` that does best on rows which the fit has not seen. Consumers of tensors of
    which nothing is known are reported and keep their weights. Arithmetic is in float64; the time
    is that of one walk and of a few solutions for each consumer.
    """
    by_tensor: dict[str, list[Consumer]] = {}
    for consumer in consumers(damage):
        by_tensor.setdefault(consumer.linear.x, []).append(consumer)
    total = sum(map(len, by_tensor.values()))
    if not total:
        return damage.pruned, ()
    changed: list[tuple[Linear, Matrix, Matrix]] = []
    reports: dict[tuple[int, bool], Repaired] = {}
    walk = propagate(damage.normal, damage.shapes, damage.coupling, rows=rows, seed=damage.seed)
    for name, found in walk:
        for consumer in by_tensor.pop(name, []):
            key = consumer.linear.node, bool(consumer.linear.reverse)
            try:
                if isinstance(found, str):
                    raise StopError(found)
                fitted, reports[key] = _fitted(consumer, found, ridges)
                changed.append(fitted)
                damage.progress(len(reports) / total)
            except StopError as reason:
                reports[key] = Repaired(consumer.node, f"not repaired: {reason}")
        if not by_tensor:
            break
    return rewritten(damage.pruned, changed), tuple(reports[key] for key in sorted(reports))


def _fitted(
    consumer: Consumer, rows: Rows, ridges: Sequence[float]
) -> tuple[tuple[Linear, Matrix, Matrix], Repaired]:
    axis = channel_axis(consumer.linear, rows.index.ndim)
    columns = rows.along(axis, consumer.channels).reshape(-1, consumer.kept.shape[1])
    parts = [
        _Part.of(rows, column, kept, weights, consumer.linear.affine)
        for column, kept, weights in zip(
            columns[consumer.groups], consumer.kept, consumer.weights, strict=True
        )
    ]
    errors = np.sum([part.held_out(ridges) for part in parts], axis=0)
    ridge = ridges[int(np.argmin(errors))]
    mixing, shift = zip(*(_reading(part.products(part.x), ridge) for part in parts), strict=True)
    scale = max(sum(part.variance for part in parts), float(np.finfo(np.float64).tiny))
    before = sum(part.lost for part in parts) / scale
    after = float(errors.min()) / scale
    report = Repaired(consumer.node, f"moments, ridge {ridge:g}", before, after)
    return consumer.folded([part.places for part in parts], mixing, shift), report


@dataclass(frozen=True)
class _Part:
    """One group of a consumer's channels: x [rows, channels], the sum of the weights over taps
    [out, channels], which channels are kept, and their places among the group's columns. Without a
    bias, which only an ``affine`` operator has, readings go through zero."""

    x: Matrix
    weights: Matrix
    kept: Mask
    places: Index
    affine: bool

    @staticmethod
    def of(rows: Rows, columns: Index, kept: Mask, weights: Matrix, affine: bool) -> _Part:
        places = places_of(columns, kept)
        if places is None:
            raise StopError("a channel leaves at some positions only")
        x = Rows(rows.values, columns[places[:, 0]]).full()
        return _Part(x, weights[:, places].sum((2, 3)), kept[places[:, 0]], places, affine)

    @property
    def variance(self) -> float:
        """Of the output."""
        return float(((self.x - self.x.mean(0)) @ self.weights.T).var(0).sum())

    @property
    def lost(self) -> float:
        """Mean squared share of the output that channels which left had."""
        y = self.x[:, ~self.kept] @ self.weights[:, ~self.kept].T
        return float(np.square(y).mean(0).sum())

    def products(self, x: Array) -> _Products:
        """Of these rows of x."""
        s, p = x[:, self.kept], x[:, ~self.kept]
        means = s.mean(0) * self.affine, p.mean(0) * self.affine
        s, p = s - means[0], p - means[1]
        return _Products(*means, s.T @ s, s.T @ p)

    def held_out(self, ridges: Sequence[float]) -> list[float]:
        """Mean squared errors of the output on rows that the readings have not seen: in single
        precision, which is enough to choose by."""
        x, weights = self.x.astype(np.float32), self.weights.astype(np.float32)
        seen = int(len(x) * SEEN)
        products = self.products(x[:seen])
        s, p = x[seen:, self.kept], x[seen:, ~self.kept]
        lost = weights[:, ~self.kept].T
        errors = []
        for ridge in ridges:
            mix, shift = _reading(products, ridge)
            errors.append(float(np.square((p - s @ mix.T - shift) @ lost).mean(0).sum()))
        return errors


@dataclass(frozen=True)
class _Products:
    """What some rows say of channels that are kept and those that are lost."""

    kept: Array  # means
    lost: Array
    gram: Array  # [kept, kept], centred
    cross: Array  # [kept, lost]


def _reading(products: _Products, ridge: float) -> tuple[Array, Array]:
    """B [lost, kept] and the shift [lost] of the best affine reading of what is lost."""
    damped = products.gram.copy()
    penalty = ridge * np.trace(damped) / len(damped) + np.finfo(damped.dtype).tiny
    damped.reshape(-1)[:: len(damped) + 1] += penalty
    if not products.cross.size:  # a group that lost nothing
        return products.cross.T, products.lost
    posv = sposv if damped.dtype == np.float32 else dposv
    _, mix, failed = posv(damped.T, products.cross, lower=True)
    found: Array = np.asarray(np.linalg.solve(damped, products.cross) if failed else mix)
    return found.T, products.lost - found.T @ products.kept
