"""Sums and statistics over whole axes of weights (norms, means, maxima) become stored numbers.

A weight that is normalised in the graph would be normalised anew from what a cut leaves of it: its
statistics are the given model's, once and for all, and then every axis of it may lose slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
import onnx

from graphprune.coupling import FLOAT_TYPES
from graphprune.errors import UncomputableError
from graphprune.memory import too_large
from graphprune.model import Array, Model, set_initializer, without
from graphprune.outside.beside import beside
from graphprune.pipeline import Arrays, Change, Context, PassResult, Skipped
from graphprune.relations import Contraction, Pin
from graphprune.rules import relate
from graphprune.shapes import Shape, infer


@dataclass(frozen=True)
class StoreStatistics:
    """1. A float constant whose node sums or takes statistics over an axis by its rule, or has no
       rule for all of it, is computed once and stored: norms of weight normalisation, weights
       standardised in training mode.
    2. One that is larger than what it is made of stays (weights as a product of two, lookups), and
       one that cannot be computed.
    3. Models too large for memory stay as they are.
    """

    name: str = "store_statistics"

    def run(self, model: Model, context: Context) -> PassResult:
        part = _constants(model)
        if not part.nodes or too_large(model):
            return PassResult(model)
        stored: dict[str, Array] = {}
        known: dict[str, Array] = {}
        skipped = []
        for node in _stating(model, part, context):
            read = [name for name in node.output if name in model.consumers]
            try:
                stored |= {name: part.array(name, known) for name in read}
            except UncomputableError as error:
                skipped.append(Skipped(node.output[0], error.what))
        if not stored:
            return PassResult(model, (), tuple(skipped))
        nodes = [node for node in model.nodes if not stored.keys() & set(node.output)]
        tensors = [set_initializer(name, value) for name, value in stored.items()]
        result = model.with_graph(nodes, [*model.initializers.values(), *tensors])
        changes = [Change(self.name, name, "weight", "computed", "stored", "") for name in stored]

        def carry(arrays: Arrays) -> Arrays:
            made = {name: _beside(part, name, arrays, value) for name, value in stored.items()}
            return {**arrays, **{name: array for name, array in made.items() if array is not None}}

        return PassResult(result, tuple(changes), tuple(skipped), carry)


def _constants(model: Model) -> Model:
    """What computes constants, alone."""
    known = model.constant_names
    nodes = [n for n in model.nodes if any(n.output) and known.issuperset(filter(None, n.output))]
    names = {name for node in nodes for name in node.input}
    skeleton = without(model.skeleton, ("node", "value_info", "input", "output", "initializer"))
    skeleton.graph.node.extend(nodes)
    for name in (name for node in nodes for name in node.output if name):
        skeleton.graph.output.append(onnx.helper.make_value_info(name, onnx.TypeProto()))
    return Model(skeleton, {n: t for n, t in model.initializers.items() if n in names})


def _stating(model: Model, part: Model, context: Context) -> list[onnx.NodeProto]:
    """Nodes of ``part`` that say more of an axis than that its slots are another tensor's."""
    shapes = infer(part)
    relations = relate(part, shapes, context.rules, pin_interface=False)
    real = np.zeros(relations.total, dtype=bool)  # not of lists of sizes, axes and their like
    for axis in relations.slots.axes:
        real[axis.slots] = shapes.dtype.get(axis.tensor) in FLOAT_TYPES
    stated: list[Pin | Contraction] = [*relations.shifts, *relations.pins]
    stated += relations.contractions
    found = []
    for index in sorted({entry.node for entry in stated if real[entry.slots].any()}):
        node = part.nodes[index]
        made = [name for name in node.output if name]
        floats = all(shapes.dtype.get(name) in FLOAT_TYPES for name in made)
        sizes = [[shapes.shape.get(n) for n in names if n] for names in (node.input, made)]
        before, after = (_elements(side) for side in sizes)
        if floats and after <= before and model.output_names.isdisjoint(made):
            found.append(node)
    return found


def _elements(sizes: list[Shape | None]) -> float:
    return sum(float("nan") if size is None else prod(size) for size in sizes)


def _beside(part: Model, name: str, arrays: Arrays, value: Array) -> Array | None:
    """What belongs to a tensor that is its first input normalised, element by element."""
    array = beside(part, part.nodes[part.producer[name]].input[0], arrays)
    return array if array is not None and array.shape == value.shape else None
