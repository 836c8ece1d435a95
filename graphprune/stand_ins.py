"""What stands in for experts that leave: their mean outputs, weighed by the router as they were.

    y = sum of g_e f_e(x)   →   y = sum of g_e f_e(x) + g M,   M: [experts, width], at first zeros

The weighed sum reads the router's shares g through a selector, so that an expert leaves alone and
the router stays as it is; the repair then finds M. Marked, so that rules and repair know them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

import networkx as nx
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from graphprune.analysis import Analysis
from graphprune.control import regions
from graphprune.coupling import FLOAT_TYPES
from graphprune.model import Model
from graphprune.relations import Choice
from graphprune.slots import SlotArray

MARK = "graphprune.stand_in"  # metadata of the product g M, and of its sum with what stays
MOVES = {"Unsqueeze", "Squeeze", "Transpose", "Reshape", "Identity", "Expand", "Split", "Slice"}
SUMS = {"ReduceSum", "MatMul", "Einsum", "Add", "Sum"}
SINK = -1
WORTH = 0.05  # of the experts' weights: what the means may have


@dataclass(frozen=True)
class Weighed:
    """Experts whose ``shares`` [.., experts] nodes ``readers`` weigh them by, until they are summed
    up in ``total`` [.., width], which may have more axes of tokens."""

    shares: str
    readers: tuple[int, ...]
    total: str


def stands_in(node: onnx.NodeProto) -> bool:
    return any(entry.key == MARK for entry in node.metadata_props)


def marked(node: onnx.NodeProto) -> onnx.NodeProto:
    entry = node.metadata_props.add()
    entry.key, entry.value = MARK, node.op_type
    return node


def product(shares: str, weight: str, result: str) -> onnx.NodeProto:
    return marked(helper.make_node("MatMul", [shares, weight], [result], result))


def weighed_experts(analysis: Analysis) -> Iterator[Weighed]:
    """One for each choice among experts of which all are computed, weighed and summed up."""
    below, inside, stacked = None, regions(analysis.model.nodes), _stacked(analysis)
    for choice in analysis.relations.choices:
        if inside[choice.node]:
            continue
        experts = _of_experts(analysis, choice, stacked)
        readers = _readers(analysis, choice, experts)
        if readers is None:
            continue
        shares, places = readers
        below = _post_dominators(analysis.model) if below is None else below
        total = _total(analysis, below, shares, places)
        if total is not None and _is_small(analysis, experts, choice, total):
            yield Weighed(shares, places, total)


def _readers(
    analysis: Analysis, choice: Choice, experts: set[int]
) -> tuple[str, tuple[int, ...]] | None:
    """The shares that a choice among experts ends in, and the nodes through which experts are
    weighed by them; ``None`` where that is more than one tensor, or none with all experts."""
    model, kinds = analysis.model, analysis.coupling.labels[choice.slots]
    chosen, made = _after(model, {choice.node}), _after(model, experts)
    found: dict[str, set[int]] = {}
    for index in sorted(made):
        for read in model.nodes[index].input:
            writer = model.producer.get(read, -1)
            if writer not in chosen or writer in made:
                continue
            name, reader = read, index
            while model.nodes[writer].op_type in MOVES:
                above = model.nodes[writer].input[0]
                if model.producer.get(above, -1) not in chosen:
                    break
                name, reader, writer = above, writer, model.producer[above]
            found.setdefault(name, set()).add(reader)
    if len(found) != 1:
        return None
    shares, readers = next(iter(found.items()))
    known = analysis.relations.slots.tensors.get(shares)
    axes = () if known is None else known.axes
    floats = analysis.shapes.dtype.get(shares) in FLOAT_TYPES
    if len(axes) < 2 or not floats or not _same(analysis, axes[-1].slots, kinds):
        return None
    return shares, tuple(sorted(readers))


def _same(analysis: Analysis, slots: SlotArray, kinds: NDArray[np.int32]) -> bool:
    return np.array_equal(analysis.coupling.labels[slots], kinds)


def _stacked(analysis: Analysis) -> dict[bytes, set[int]]:
    """Components along which weights are stacked → the nodes that read such a weight."""
    labels, tensors = analysis.coupling.labels, analysis.relations.slots.tensors
    axes = [slots for slots in analysis.relations.experts if len(slots)]
    first = {int(slots[0]): labels[slots].tobytes() for slots in axes}
    found: dict[bytes, set[int]] = {}
    for name in analysis.model.constant_names & tensors.keys():
        for axis in tensors[name]:
            if len(axis) and int(axis.slots[0]) in first:
                readers = {i for i, _ in analysis.model.consumers.get(name, ())}
                found.setdefault(first[int(axis.slots[0])], set()).update(readers)
    return found


def _of_experts(analysis: Analysis, choice: Choice, stacked: Mapping[bytes, set[int]]) -> set[int]:
    """Nodes that read weights stacked by expert, or that serve one expert alone."""
    found = stacked.get(analysis.coupling.labels[choice.slots].tobytes(), set())
    mine = {*choice.slots.tolist()}
    apart = (branch for branch in analysis.relations.apart if int(branch.slots[0]) in mine)
    return found.union(*(branch.nodes for branch in apart))


def _is_small(analysis: Analysis, experts: set[int], choice: Choice, total: str) -> bool:
    """Whether all means together have few parameters beside the experts."""
    model = analysis.model
    read = {name for i in experts for name in model.nodes[i].input}
    weights = sum(prod(model.initializers[n].dims) for n in read & model.initializers.keys())
    width = (analysis.shapes.shape[total] or (0,))[-1]
    return bool(len(choice.slots) * width <= WORTH * weights)


def _after(model: Model, nodes: set[int]) -> set[int]:
    """These nodes and all that reads from them."""
    found = set(nodes)
    for index in range(min(nodes, default=len(model.nodes)), len(model.nodes)):
        if any(model.producer.get(name, -1) in found for name in model.nodes[index].input):
            found.add(index)
    return found


def _post_dominators(model: Model) -> Mapping[int, int]:
    graph: nx.DiGraph[int] = nx.DiGraph()
    graph.add_node(SINK)
    for name in model.output_names & model.producer.keys():
        graph.add_edge(SINK, model.producer[name])
    for name, readers in model.consumers.items():
        if name in model.producer:
            graph.add_edges_from((max(reader, SINK), model.producer[name]) for reader, _ in readers)
    return dict(nx.immediate_dominators(graph, SINK))


def _total(
    analysis: Analysis, below: Mapping[int, int], shares: str, readers: tuple[int, ...]
) -> str | None:
    """The first tensor [.., width] that all of the readers lead to, each only through it, and that
    is a sum, or one moved."""
    model, shape = analysis.model, analysis.shapes.shape
    tensors, slots = analysis.relations.slots.tensors, analysis.relations.slots.tensors[shares]
    kinds = analysis.coupling.labels[slots[slots.rank - 1].slots]
    ways = [_way(below, reader) for reader in readers]
    for index in ways[0]:
        if index == SINK or any(index not in way for way in ways):
            continue
        node = model.nodes[index]
        name = str(node.output[0])
        known, rows = shape.get(name), shape[shares]
        if node.op_type not in SUMS | MOVES | {"Mul"} or known is None or rows is None:
            return None
        alike = known[:-1] == rows[:-1]
        if len(known) > len(rows):  # tokens in one axis there, in several here
            alike = prod(known[:-1]) == prod(rows[:-1])
        whole = node.op_type in SUMS | MOVES and len([o for o in node.output if o]) == 1
        summed = not any(_same(analysis, axis.slots, kinds) for axis in tensors.get(name, ()))
        if alike and whole and summed:
            return name
    return None


def _way(below: Mapping[int, int], index: int) -> list[int]:
    found = [index]
    while found[-1] != SINK and found[-1] in below and below[found[-1]] != found[-1]:
        found.append(below[found[-1]])
    return found
