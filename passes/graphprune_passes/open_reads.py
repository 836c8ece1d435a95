"""Readers of a shared tensor get slots of their own, so that each may keep its own channels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from graphprune.analysis import Analysis
from graphprune.control import is_open, regions
from graphprune.model import Model, label, set_initializer
from graphprune.pipeline import Change, Context, PassResult, Skipped
from graphprune.selectors import selector

POSITIONS = "graphprune/read_"  # before a number: names of the selectors' constants


@dataclass(frozen=True)
class _Edge:
    """Where a selector goes: before input ``place`` of ``node``, along ``axis`` of what is read
    there, for the sake of ``reader``, which sums over it."""

    node: int
    place: int
    axis: int
    reader: int


@dataclass(frozen=True)
class OpenReads:
    """1. Where several operators with weights read the same channels (a residual stream, a dense
       concatenation, branches, Q and K and V), each gets a selector: a copy of all of them, which
       has slots of its own.
    2. It goes as far up as what it copies has no other reader: what lies between (a pool, a
       normalisation by stored statistics) then works on the reader's channels alone.
    3. What is read in groups, in integers or inside bodies of control flow stays as it is.
    """

    name: str = "open_reads"

    def run(self, model: Model, context: Context) -> PassResult:
        analysis = context.analysis(model)
        if analysis.relations.quantised:
            reason = "integers are read as they are: a copy would break what the runtime fuses"
            return PassResult(model, (), (Skipped("the whole model", reason),))
        edges, skipped = _edges(analysis)
        before: dict[int, list[onnx.NodeProto]] = {}
        nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in model.nodes]
        constants: list[onnx.TensorProto] = []
        changes = []
        taken = {name for node in model.nodes for name in node.output} | set(model.initializers)
        for edge in edges:
            source = model.nodes[edge.node].input[edge.place]
            name = f"{POSITIONS}{len(constants)}"
            while name in taken or f"{name}_of" in taken:
                name += "_"
            length = len(analysis.relations.slots.tensors[source][edge.axis])
            constants.append(set_initializer(f"{name}_of", np.arange(length, dtype=np.int64)))
            copy = selector(source, f"{name}_of", name, edge.axis)
            before.setdefault(edge.node, []).append(copy)
            nodes[edge.node].input[edge.place] = name
            where = label(model.nodes[edge.reader])
            changes.append(Change(self.name, where, "reads", source, name, "channels of its own"))
        if not changes:
            return PassResult(model, (), skipped)
        order = [n for i, node in enumerate(nodes) for n in (*before.get(i, ()), node)]
        opened = model.with_graph(order, [*model.initializers.values(), *constants])
        return PassResult(opened, tuple(changes), skipped)


def _edges(analysis: Analysis) -> tuple[list[_Edge], tuple[Skipped, ...]]:
    """One for each reader of channels that another reads too, in the order of the nodes."""
    model, coupling = analysis.model, analysis.coupling
    inside = regions(model.nodes)
    found: list[tuple[_Edge, NDArray[np.int32]]] = []
    skipped: dict[int, str] = {}
    for contraction in analysis.relations.contractions:
        node, partner = model.nodes[contraction.node], contraction.partner
        weight = node.input[contraction.input]
        if weight not in model.constant_names or partner is None:
            continue
        if partner.tensor in model.constant_names or partner.tensor not in node.input:
            continue
        if inside[contraction.node] or is_open(node):
            skipped[contraction.node] = "a reader inside a body of control flow"
            continue
        if list(node.input).count(partner.tensor) > 1 or _is_shared(model, weight):
            skipped[contraction.node] = "its weight is read elsewhere too"
            continue
        place = list(node.input).index(partner.tensor)
        start = _Edge(contraction.node, place, partner.index, contraction.node)
        edge = _highest(analysis, inside, start)
        source = analysis.relations.slots.tensors[model.nodes[edge.node].input[edge.place]]
        found.append((edge, np.unique(coupling.labels[source[edge.axis].slots])))
    readers: dict[int, int] = {}
    for _, components in found:
        for component in components.tolist():
            readers[component] = readers.get(component, 0) + 1
    shared = [
        edge
        for edge, components in found
        if len(components) > 1 and any(readers[c] > 1 for c in components.tolist())
    ]
    said = tuple(Skipped(label(model.nodes[i]), reason) for i, reason in skipped.items())
    return shared, said


def _is_shared(model: Model, weight: str) -> bool:
    """Whether anything else reads the weight, or what it is computed from: an embedding, say."""
    waiting = [weight]
    while waiting:
        name = waiting.pop()
        if len(model.consumers[name]) > 1:
            return True
        if name in model.producer:
            node = model.nodes[model.producer[name]]
            waiting += [n for n in node.input if n and n not in waiting]
    return False


def _highest(analysis: Analysis, inside: list[tuple[str, ...]], edge: _Edge) -> _Edge:
    """``edge``, moved up past nodes that only this reader needs and that take every channel from
    the same channel of one other tensor."""
    model = analysis.model
    shifted = {pin.node for pin in analysis.relations.shifts}
    summed = {contraction.node for contraction in analysis.relations.contractions}
    while True:
        name = model.nodes[edge.node].input[edge.place]
        index = model.producer.get(name)
        if index is None or index in shifted or index in summed or inside[index]:
            return edge
        if len(model.consumers[name]) > 1 or name in model.output_names:
            return edge
        above = list(_passes(analysis, index, name, edge.axis))
        if len(above) != 1 or sum(o != "" for o in model.nodes[index].output) > 1:
            return edge
        place, axis = above[0]
        edge = _Edge(index, place, axis, edge.reader)


def _passes(analysis: Analysis, index: int, output: str, axis: int) -> Iterator[tuple[int, int]]:
    """Inputs that are no constants, and the axis of each whose channels are those of ``output``;
    axis -1, twice, where there is none."""
    model, labels = analysis.model, analysis.coupling.labels
    tensors = analysis.relations.slots.tensors
    wanted = labels[tensors[output][axis].slots]
    for place, name in enumerate(model.nodes[index].input):
        if not name or name in model.constant_names:
            continue
        same = [a.index for a in tensors.get(name, ()) if np.array_equal(labels[a.slots], wanted)]
        if len(same) != 1 or len(np.unique(wanted)) != len(wanted):
            yield from ((place, -1), (place, -1))
        else:
            yield place, same[0]
