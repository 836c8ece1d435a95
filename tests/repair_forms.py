"""A damaged model, and how far its outputs are from the original's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from graphprune.coupling import Group
from graphprune.cut import cut
from graphprune.distortion import relative_error
from graphprune.model import Array, Model
from graphprune.prepared import Prepared
from graphprune.repair import Damage
from graphprune.runtime import run_session, session

Feeds = list[dict[str, Array]]


def draw(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape, dtype=np.float32)


def samples(prepared: Prepared, chunks: int = 6, rows: int = 8) -> Feeds:
    """Random inputs of the analysed shapes, ``rows`` to a chunk where the batch is open."""
    shapes = prepared.analysis.shapes
    found = []
    for chunk in range(chunks):
        feed = {}
        for name, shape in shapes.inputs.items():
            sizes = (rows, *shape[1:]) if 0 in shapes.symbolic.get(name, ()) else shape
            feed[name] = draw(*sizes, seed=chunk + 1)
        found.append(feed)
    return found


def damaged(
    prepared: Prepared, removed: Mapping[int, Sequence[int]], feeds: Feeds | None = None
) -> Damage:
    """``removed``: by group index, ordinals of units."""
    analysis = prepared.analysis
    coupling = analysis.coupling
    gone = np.zeros(coupling.n_units, bool)
    for index, units in removed.items():
        gone[coupling.groups[index].units[list(units)]] = True
    alive = coupling.alive(gone)
    pruned = prepared.folded(cut(analysis.model, analysis.shapes, coupling, alive)[0])
    return Damage(
        analysis.model,
        prepared.folded(analysis.model),
        pruned,
        analysis.shapes,
        coupling,
        alive,
        samples(prepared) if feeds is None else feeds,
    )


def error(damage: Damage, model: Model, feeds: Feeds | None = None) -> float:
    """Relative error of the outputs, by default on the calibration inputs."""
    first, second = session(damage.original, 1), session(model, 1)
    pairs = [(run_session(first, f), run_session(second, f)) for f in feeds or damage.feeds]
    return float(np.mean([relative_error(a, b) for a, b in pairs]))


def group_of(prepared: Prepared, weight: str) -> Group:
    """The group that holds the rows of ``weight`` (or its columns, where rows are pinned)."""
    groups = prepared.analysis.coupling.groups
    return next(g for g in groups if any(name == weight for name, _ in g.signature))


def halves(prepared: Prepared) -> dict[int, list[int]]:
    """Every other unit of every group."""
    groups = prepared.analysis.coupling.groups
    return {g.index: list(range(0, len(g) // 2 * 2, 2)) for g in groups}


def content(model: Model) -> dict[str, bytes]:
    return {name: t.SerializeToString() for name, t in model.initializers.items()}
