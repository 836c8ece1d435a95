"""Networks of recurrent layers, and what a cut does to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from graphs import Builder

from graphprune.coupling import Group
from graphprune.cut import cut
from graphprune.model import Array, Model
from graphprune.prepared import Prepared
from graphprune.repair import Damage
from graphprune.runtime import Feeds, run_session, session

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
WAYS = {"forward": 1, "reverse": 1, "bidirectional": 2}
QUICK: dict[str, Any] = {"flops": 0.5, "measure": False, "cache": False}


def draw(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape, dtype=np.float32)


def layer(
    b: Builder, op: str, x: str, width: int, hidden: int, way: str = "forward", **more: Any
) -> str:
    """[seq, n, width] to [seq, n, directions * hidden], with a bias."""
    directions, rows = WAYS[way], GATES[op] * hidden
    names = [f"{op}{len(b.nodes)}_{part}" for part in "wrb"]
    weights = [draw(directions, rows, n, seed=n) / n**0.5 * 1.5 for n in (width, hidden)]
    weights.append(draw(directions, 2 * rows) / 4)
    inputs = [b.constant(array, name) for array, name in zip(weights, names, strict=True)]
    y = b.add(op, x, *inputs, hidden_size=hidden, direction=way, **more)
    y = b.add("Transpose", y, perm=[0, 2, 1, 3])
    return str(b.add("Reshape", y, b.ints(0, 0, -1)))


def network(op: str = "LSTM", way: str = "forward", layers: int = 1, **more: Any) -> Builder:
    """Relu features, recurrent layers of 12 units, and a product; x: [7, n, 5], y: [7, n, 3]."""
    b = Builder(1)
    h = b.add("Relu", b.add("MatMul", "x", b.constant(draw(5, 10), "in")))
    width = 10
    for _ in range(layers):
        h = layer(b, op, h, width, 12, way, **more)
        width = 12 * WAYS[way]
    b.add("MatMul", h, b.constant(draw(width, 3), "out"))
    return b


def finished(b: Builder) -> onnx.ModelProto:
    return b.model({"x": [7, "n", 5]}, {b.nodes[-1].output[0]: [7, "n", 3]})


def feeds_of(chunks: int = 6, rows: int = 16, start: int = 0) -> list[dict[str, Array]]:
    """Sequences that change slowly."""
    found = [draw(7, rows, 5, seed=k).cumsum(axis=0) / 2 for k in range(start, start + chunks)]
    return [{"x": x} for x in found]


def group_of(prepared: Prepared, axis: tuple[str, int]) -> Group:
    return next(g for g in prepared.analysis.coupling.groups if axis in g.signature)


def damaged(
    prepared: Prepared, removed: Mapping[int, Sequence[int]], feeds: Sequence[Feeds] = ()
) -> Damage:
    """``removed``: by group index, ordinals of units."""
    analysis = prepared.analysis
    gone = np.zeros(analysis.coupling.n_units, bool)
    for index, units in removed.items():
        gone[analysis.coupling.groups[index].units[list(units)]] = True
    alive = analysis.coupling.alive(gone)
    small = cut(analysis.model, analysis.shapes, analysis.coupling, alive)[0]
    whole, pruned = prepared.folded(analysis.model), prepared.folded(small)
    given = feeds or feeds_of()
    return Damage(analysis.model, whole, pruned, analysis.shapes, analysis.coupling, alive, given)


def error(damage: Damage, model: Model, feeds: Sequence[Feeds] = ()) -> float:
    """Squared error of the output over its square."""
    first, second = session(damage.original, 1), session(model, 1)
    pairs = [(run_session(first, f)[0], run_session(second, f)[0]) for f in feeds or damage.feeds]
    return float(np.mean([np.square(a - b).mean() / np.square(a).mean() for a, b in pairs]))
