"""Repair from weights alone: what a lost channel says beyond the kept ones is replaced by its
conditional mean (algorithms: ReLU-aware form of UDFC, arXiv 2308.07209, with the moments of the
activations themselves)."""

from __future__ import annotations

import numpy as np

from graphprune.coupling import Coupling, Mask
from graphprune.linear import Matrix, rewritten
from graphprune.model import Model
from graphprune.repair.consumers import Consumer, Untouched, channel_axis, consumers
from graphprune.repair.propagate import Rows, StopError, propagate
from graphprune.repair.reconstruct import Repaired
from graphprune.shapes import Shapes

RIDGE = 1e-2  # share of the mean variance of a consumer's inputs


def compensate(
    normal: Model,
    original: Model,
    pruned: Model,
    shapes: Shapes,
    coupling: Coupling,
    alive: Mask,
    *,
    ridge: float = RIDGE,
    rows: int = 2048,
    seed: int = 0,
) -> tuple[Model, tuple[Repaired | Untouched, ...]]:
    """``pruned`` with every consumer of lost channels P reading them off the kept ones S.

    x_P is taken for mu_P + B (x_S - mu_S), B = C_PS (C_SS + λ mean(diag C) I)⁻¹, the same B at
    every tap; mu and C are the moments that ``rows`` random rows have which walk ``normal``.
    ``original`` and ``pruned`` have their BatchNormalization folded; names agree in all three,
    ``shapes`` and ``coupling`` are of ``normal``. Arithmetic is in float64.
    """
    by_tensor: dict[str, list[Consumer]] = {}
    for consumer in consumers(original, pruned, coupling, alive):
        by_tensor.setdefault(consumer.linear.x, []).append(consumer)
    if not by_tensor:
        return pruned, ()
    changed, reports = [], {}
    for name, found in propagate(normal, shapes, coupling, rows=rows, seed=seed):
        for consumer in by_tensor.pop(name, []):
            node = consumer.linear.node
            try:
                if isinstance(found, str):
                    raise StopError(found)
                fitted, reports[node] = _fitted(consumer, found, ridge)
                changed.append(fitted)
            except StopError as reason:
                reports[node] = Untouched(consumer.node, str(reason))
        if not by_tensor:
            break
    return rewritten(pruned, changed), tuple(reports[node] for node in sorted(reports))


def _fitted(consumer: Consumer, rows: Rows, ridge: float) -> tuple[object, Repaired]:
    axis = channel_axis(consumer.linear, rows.index.ndim)
    columns = rows.channels(axis).reshape(len(consumer.groups), -1)[consumer.groups]
    mixing, shift = [], []
    lost = left = total = 0.0
    for g, kept in enumerate(consumer.kept):
        unique, place = np.unique(columns[g], return_inverse=True)
        x = Rows(rows.values, unique[None]).full()[:, 0]
        mean = x.mean(0)
        own = x - mean
        covariance = own.T @ own / len(own)
        b = regression(covariance, place, kept, ridge)
        mixing.append(b)
        shift.append(mean[place[~kept]] - b @ mean[place[kept]])
        w = consumer.weights[g].sum(-1)
    return consumer.folded(mixing, shift), Repaired(consumer.node, ridge, 0, 0)
