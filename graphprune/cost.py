"""What a model costs: MACs, parameters, bytes and memory, as exact functions of what leaves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto
from scipy.sparse import csr_array

from graphprune.control import regions
from graphprune.coupling import FLOAT_TYPES, Coupling, Mask
from graphprune.liveness import Buffers, buffers
from graphprune.model import ELEMENT_BITS, Model, tensor_bytes
from graphprune.relations import Branch
from graphprune.shapes import Shapes
from graphprune.slots import SlotArray

BOOL = 9
# Weights are floats or have at most 8 bits; wider integers are biases, shapes and positions.
WEIGHT_TYPES = FLOAT_TYPES | {kind for kind, bits in ELEMENT_BITS.items() if bits <= 8} - {BOOL}
KINDS = ("macs", "params", "bytes", "traffic", "memory")


@dataclass(frozen=True)
class Costs:
    """MACs for one inference at the analysed shapes, parameters, bytes of the file, and traffic:
    elements that the operators with MACs read and write besides their weights. Memory is the most
    bytes of activations that are in use at once; ``latency`` is in milliseconds, 0 where nothing
    predicts it."""

    macs: float
    params: float
    bytes: float
    traffic: float
    memory: float
    latency: float = 0.0

    def of(self, kind: str) -> float:
        return float(getattr(self, kind))

    def __str__(self) -> str:
        return f"{self.macs / 1e6:.1f} MMACs, {self.params / 1e6:.3f} M parameters, {self.bytes} B"


@dataclass(frozen=True)
class Terms:
    """A sum of products: coefficient times the surviving lengths of a few extents.

    A term may hang on one more extent: it counts while that is whole (the last one always is), or
    only once it no longer is.
    """

    coefficient: NDArray[np.float64]  # [terms]
    factor: NDArray[np.int64]  # [terms, widest], index into the extents; the last extent is 1
    owner: NDArray[np.int64]  # [terms], a node's, an initialiser's or a buffer's index
    gate: NDArray[np.int64] | None = None  # [terms], index into the extents; None: all count
    whole: NDArray[np.bool_] | None = None  # [terms], whether the gate must be whole


@dataclass(frozen=True)
class CostModel:
    """Evaluates ``Costs`` for any set of removed units in one sparse product."""

    length: NDArray[np.float64]  # [extents + 1]
    width: csr_array  # [extents + 1, units]
    terms: dict[str, Terms]
    fixed: dict[str, float]
    buffers: Buffers  # what is in use when; the terms of memory are theirs, in their order
    timed: Callable[[Mask], float] | None = None  # predicts milliseconds

    def of(self, removed: Mask) -> Costs:
        extent = self._extents(removed)
        values = {kind: self._total(kind, extent) for kind in KINDS}
        return Costs(**values, latency=self.one(removed, "latency"))

    def one(self, removed: Mask, kind: str) -> float:
        """What is left of one kind of cost; of latency 0 where nothing predicts it."""
        if kind == "latency":
            return self.timed(removed) if self.timed is not None else 0.0
        return self._total(kind, self._extents(removed))

    def _extents(self, removed: Mask) -> NDArray[np.float64]:
        return np.asarray(self.length - self.width @ removed.astype(np.float64))

    def _total(self, kind: str, extent: NDArray[np.float64]) -> float:
        """Terms add up; of memory, those at the step where they come to most."""
        values = self._values(kind, extent)
        if kind == "memory":
            return float(self.buffers.live(values).max())
        return float(values.sum()) + self.fixed[kind]

    def live(self, removed: Mask) -> NDArray[np.float64]:
        """Bytes of activations in use before the first node, and at each node [nodes + 1]."""
        return self.buffers.live(self.per_term("memory", removed))

    def per_term(self, kind: str, removed: Mask) -> NDArray[np.float64]:
        """Each node's MACs, each initialiser's parameters or bytes, or each buffer's bytes."""
        return self._values(kind, self._extents(removed))

    def _values(self, kind: str, extent: NDArray[np.float64]) -> NDArray[np.float64]:
        terms = self.terms[kind]
        values = np.asarray(terms.coefficient * extent[terms.factor].prod(axis=1))
        if terms.gate is None:
            return values
        whole = extent[terms.gate] == self.length[terms.gate]
        return np.where(whole == terms.whole, values, 0.0)

    def per_node_macs(self, removed: Mask, n_nodes: int) -> NDArray[np.float64]:
        owners = self.terms["macs"].owner
        values = self.per_term("macs", removed)
        return np.bincount(owners, values, minlength=n_nodes).astype(np.float64)

    def macs_touched(self, units: NDArray[np.int64]) -> float:
        """MACs of the nodes that get smaller when any of these units leave."""
        extents = np.zeros(len(self.length), dtype=bool)
        extents[np.unique(self.width[:, units].nonzero()[0])] = True
        values = self.per_term("macs", np.zeros(self.width.shape[1], dtype=bool))
        return float(values[extents[self.terms["macs"].factor].any(axis=1)].sum())

    def marginal(self, kind: str) -> NDArray[np.float64]:
        """What each unit saves if it leaves the whole model alone (first order). Of memory: at the
        step where most is in use."""
        terms = self.terms[kind]
        share = self._counted(kind)
        per_slot = share[:, None] / self.length[terms.factor]
        slope = np.bincount(terms.factor.ravel(), per_slot.ravel(), minlength=len(self.length))
        return np.asarray(self.width.T @ slope)

    def in_reach(self, kind: str) -> float:
        """Share of the cost in terms that some unit makes smaller."""
        movable = np.asarray(self.width.sum(axis=1) > 0).reshape(-1)
        values = self._counted(kind)
        reach = movable[self.terms[kind].factor].any(axis=1)
        return float(values[reach].sum() / max(values.sum() + self.fixed[kind], 1.0))

    def _counted(self, kind: str) -> NDArray[np.float64]:
        """The whole model's terms, zero those that are not part of its cost."""
        nothing = np.zeros(self.width.shape[1], dtype=bool)
        values = self.per_term(kind, nothing)
        if kind != "memory":
            return values
        live = self.live(nothing)
        return np.where(self.buffers.at_any(np.arange(len(live)) == live.argmax()), values, 0.0)

    def steps_above(self, limit: float, most: int) -> NDArray[np.int64]:
        """Steps with more than ``limit`` bytes in use as long as nothing leaves, highest first."""
        live = self.live(np.zeros(self.width.shape[1], dtype=bool))
        fullest = self.buffers.fullest
        found = fullest[live[fullest] > limit]
        return np.asarray(found[np.argsort(-live[found], kind="stable")][:most])

    def in_use_above(self, limit: float) -> Mask:
        """Units of which some activation is in use at a step with more than ``limit`` bytes."""
        above = self.live(np.zeros(self.width.shape[1], dtype=bool)) > limit
        used = np.zeros(len(self.length), dtype=bool)
        used[self.terms["memory"].factor[self.buffers.at_any(above)]] = True
        used[-1] = False
        return np.asarray(self.width.T @ used.astype(np.float64) > 0)


def whole(value: float) -> float:
    """A count as an integer where it is one: costs are summed in floats."""
    nearest = round(value)
    return nearest if abs(nearest - value) <= 1e-9 * abs(value) else value


def count_params(model: Model) -> float:
    """Elements of all weights, float or quantised to 8 bits and fewer, each counted once as it is
    stored: as an initialiser, in a Constant node, in a body, or as a shape to be filled."""
    opened = model.opened
    stored = [(t.data_type, prod(t.dims)) for t in opened.initializers.values()]
    for node in opened.nodes:
        if node.op_type == "Constant" and not node.domain:
            stored += [_constant(attribute) for attribute in node.attribute]
        generated = node.op_type == "ConstantOfShape" and node.output[0] in opened.constant_names
        if generated and (kind := _filled_with(node)) in FLOAT_TYPES:
            stored.append((kind, prod(opened.array(node.input[0]).tolist())))
    return float(sum(count for kind, count in stored if kind in WEIGHT_TYPES))


def _filled_with(node: onnx.NodeProto) -> int:
    """Element type of what a ConstantOfShape writes."""
    return next((a.t.data_type for a in node.attribute), TensorProto.FLOAT)


def _constant(attribute: onnx.AttributeProto) -> tuple[int, int]:
    """Element type and elements of what a Constant node holds; of what is no number, none."""
    if attribute.name == "value":
        return attribute.t.data_type, prod(attribute.t.dims)
    floats = {"value_float": 1, "value_floats": len(attribute.floats)}
    return TensorProto.FLOAT, floats.get(attribute.name, 0)


def cost_model(model: Model, shapes: Shapes, coupling: Coupling) -> CostModel:
    """Collect every term once; evaluating it later reads no weights."""
    extents: list[SlotArray] = []
    raw: dict[str, list[tuple[float, list[int], int]]] = {kind: [] for kind in KINDS}

    def enter(kind: str, coefficient: float, factors: Sequence[SlotArray], owner: int) -> None:
        places = []
        for slots in factors:
            if (coupling.unit_of(slots) >= 0).any():
                places.append(len(extents))
                extents.append(slots)
            else:
                coefficient *= len(slots)
        raw[kind].append((coefficient, places, owner))

    there = presence(model, coupling)

    slots = coupling.relations.slots.tensors
    turns = _turns(model, shapes)
    for macs in coupling.relations.macs:
        enter("macs", turns[macs.node], (*macs.factors, *there.of_node(macs.node)), macs.node)
        node = model.nodes[macs.node]
        for name in (*node.input, *node.output):
            if name in slots and name not in model.constant_names:
                read = [axis.slots for axis in slots[name]]
                enter("traffic", turns[macs.node], [*read, *there.of_node(macs.node)], macs.node)
    stored_at = len(model.initializers)  # owners of bytes: weights, then nodes of branches
    for i, (name, tensor) in enumerate(model.initializers.items()):
        axes = [axis.slots for axis in slots[name]] if name in slots else []
        count = int(np.prod(tensor.dims, dtype=np.int64))
        size = tensor_bytes(tensor)
        lengths = int(np.prod([len(a) for a in axes], dtype=np.int64)) if name in slots else 1
        scale = 1.0 if name in slots else float(count)
        axes += there.of_weight(name)
        if tensor.data_type in WEIGHT_TYPES:
            enter("params", scale, axes, i)
        enter("bytes", size / max(lengths, 1), axes, i)
    for i, node in enumerate(model.nodes):
        name = node.output[0] if node.output else ""
        generated = node.op_type == "ConstantOfShape" and name in model.constant_names
        if generated and name in slots and shapes.dtype[name] in FLOAT_TYPES:
            axes = [axis.slots for axis in slots[name]]
            enter("params", 1.0, [*axes, *there.of_node(i)], i)
    pieces = buffers(model, shapes, coupling.relations)
    for i, (name, width_of_one) in enumerate(zip(pieces.tensor, pieces.element_bytes, strict=True)):
        axes = [axis.slots for axis in slots[name]]
        held = there.of_buffer(name, int(pieces.last[i]))
        enter("memory", float(width_of_one), [*axes, *held], i)
    overhead = float(model.closed.skeleton.ByteSize())
    for i in sorted(there.nodes):
        own = float(model.nodes[i].ByteSize())
        enter("bytes", own, there.of_node(i), stored_at + i)
        overhead -= own
    length = np.array([*(len(e) for e in extents), 1], dtype=np.float64)
    width = coupling.widths([*extents, np.empty(0, np.int64)])
    terms = {kind: _pack(entries, len(extents)) for kind, entries in raw.items()}
    fixed = dict.fromkeys(KINDS, 0.0) | {"bytes": overhead}
    return CostModel(length, width, terms, fixed, pieces)


@dataclass(frozen=True)
class Presence:
    """Which branches a node, a weight or an activation leaves with: a factor of 1 or 0 for each."""

    model: Model
    nodes: Mapping[int, list[Branch]]

    def of_node(self, node: int) -> list[SlotArray]:
        return [branch.slots for branch in self.nodes.get(node, ())]

    def of_weight(self, name: str) -> list[SlotArray]:
        """Branches that have all its readers."""
        readers = [node for node, _ in self.model.consumers.get(name, ())]
        found = self.nodes.get(readers[0], ()) if readers else ()
        return [branch.slots for branch in found if branch.nodes.issuperset(readers)]

    def of_buffer(self, name: str, last: int) -> list[SlotArray]:
        """Branches in which it is written; of memory that the sum is written to, none."""
        found = self.nodes.get(self.model.producer.get(name, -1), ())
        return [branch.slots for branch in found if last <= branch.end + 1]


def presence(model: Model, coupling: Coupling) -> Presence:
    nodes: dict[int, list[Branch]] = {}
    for branch in (*coupling.relations.branches, *coupling.relations.apart):
        for node in branch.nodes:
            nodes.setdefault(node, []).append(branch)
    return Presence(model, nodes)


def _turns(model: Model, shapes: Shapes) -> list[float]:
    """How often each node counts: in a Loop or Scan once for every turn, as far as the number is
    known. Both branches of an If count, since either may run."""
    return [
        float(math.prod(shapes.turns.get(token, 1) for token in inside))
        for inside in regions(model.nodes)
    ]


def _pack(entries: list[tuple[float, list[int], int]], one: int) -> Terms:
    widest = max((len(places) for _, places, _ in entries), default=0)
    factor = np.full((len(entries), max(widest, 1)), one, dtype=np.int64)
    for i, (_, places, _) in enumerate(entries):
        factor[i, : len(places)] = places
    coefficient = np.array([entry[0] for entry in entries], dtype=np.float64)
    return Terms(coefficient, factor, np.array([e[2] for e in entries], dtype=np.int64))
