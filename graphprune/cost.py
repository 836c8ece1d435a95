"""What a model costs: MACs, parameters and bytes, as exact functions of the units that leave."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from graphprune.control import regions
from graphprune.coupling import FLOAT_TYPES, Coupling, Mask
from graphprune.model import ELEMENT_BITS, Model, tensor_bytes
from graphprune.shapes import Shapes
from graphprune.slots import SlotArray

BOOL = 9
# Weights are floats or have at most 8 bits; wider integers are biases, shapes and positions.
WEIGHT_TYPES = FLOAT_TYPES | {kind for kind, bits in ELEMENT_BITS.items() if bits <= 8} - {BOOL}
KINDS = ("macs", "params", "bytes", "traffic")


@dataclass(frozen=True)
class Costs:
    """MACs for one inference at the analysed shapes, parameters, bytes of the file, and traffic:
    elements that the operators with MACs read and write besides their weights. ``latency`` is in
    milliseconds, 0 where nothing predicts it."""

    macs: float
    params: float
    bytes: float
    traffic: float
    latency: float = 0.0

    def of(self, kind: str) -> float:
        return float(getattr(self, kind))

    def __str__(self) -> str:
        return f"{self.macs / 1e6:.1f} MMACs, {self.params / 1e6:.3f} M parameters, {self.bytes} B"


@dataclass(frozen=True)
class _Terms:
    """A sum of products: coefficient times the surviving lengths of a few extents."""

    coefficient: NDArray[np.float64]  # [terms]
    factor: NDArray[np.int64]  # [terms, widest], index into the extents; the last extent is 1
    owner: NDArray[np.int64]  # [terms], a node's or an initialiser's index


@dataclass(frozen=True)
class CostModel:
    """Evaluates ``Costs`` for any set of removed units in one sparse product."""

    length: NDArray[np.float64]  # [extents + 1]
    width: csr_array  # [extents + 1, units]
    terms: dict[str, _Terms]
    fixed: dict[str, float]
    timed: Callable[[Mask], float] | None = None  # predicts milliseconds

    def of(self, removed: Mask) -> Costs:
        values = {kind: self.per_term(kind, removed).sum() + self.fixed[kind] for kind in KINDS}
        return Costs(**values, latency=self.timed(removed) if self.timed is not None else 0.0)

    def per_term(self, kind: str, removed: Mask) -> NDArray[np.float64]:
        """Each node's MACs, or each initialiser's parameters or bytes."""
        extent = self.length - self.width @ removed.astype(np.float64)
        terms = self.terms[kind]
        return np.asarray(terms.coefficient * extent[terms.factor].prod(axis=1))

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
        """What each unit saves if it leaves the whole model alone (first order)."""
        terms = self.terms[kind]
        share = self.per_term(kind, np.zeros(self.width.shape[1], dtype=bool))
        per_slot = share[:, None] / self.length[terms.factor]
        slope = np.bincount(terms.factor.ravel(), per_slot.ravel(), minlength=len(self.length))
        return np.asarray(self.width.T @ slope)

    def in_reach(self, kind: str) -> float:
        """Share of the cost in terms that some unit makes smaller."""
        movable = np.asarray(self.width.sum(axis=1) > 0).reshape(-1)
        values = self.per_term(kind, np.zeros(self.width.shape[1], dtype=bool))
        reach = movable[self.terms[kind].factor].any(axis=1)
        return float(values[reach].sum() / max(values.sum() + self.fixed[kind], 1.0))


def count_params(model: Model) -> float:
    """Elements of all weights, float or quantised to 8 bits and fewer, counted on the model."""
    floats = (t for t in model.initializers.values() if t.data_type in WEIGHT_TYPES)
    return float(sum(int(np.prod(t.dims, dtype=np.int64)) for t in floats))


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

    slots = coupling.relations.slots.tensors
    turns = _turns(model, shapes)
    for macs in coupling.relations.macs:
        enter("macs", turns[macs.node], macs.factors, macs.node)
        node = model.nodes[macs.node]
        for name in (*node.input, *node.output):
            if name in slots and name not in model.constant_names:
                enter("traffic", turns[macs.node], [axis.slots for axis in slots[name]], macs.node)
    stored = 0
    for i, (name, tensor) in enumerate(model.initializers.items()):
        axes = [axis.slots for axis in slots[name]] if name in slots else []
        count = int(np.prod(tensor.dims, dtype=np.int64))
        size = tensor_bytes(tensor)
        stored += size
        lengths = int(np.prod([len(a) for a in axes], dtype=np.int64)) if name in slots else 1
        scale = 1.0 if name in slots else float(count)
        if tensor.data_type in WEIGHT_TYPES:
            enter("params", scale, axes, i)
        enter("bytes", size / max(lengths, 1), axes, i)
    for i, node in enumerate(model.nodes):
        name = node.output[0] if node.output else ""
        generated = node.op_type == "ConstantOfShape" and name in model.constant_names
        if generated and name in slots and shapes.dtype[name] in FLOAT_TYPES:
            enter("params", 1.0, [axis.slots for axis in slots[name]], i)
    overhead = float(model.closed.skeleton.ByteSize())
    length = np.array([*(len(e) for e in extents), 1], dtype=np.float64)
    width = coupling.widths([*extents, np.empty(0, np.int64)])
    terms = {kind: _pack(entries, len(extents)) for kind, entries in raw.items()}
    return CostModel(
        length, width, terms, {"macs": 0.0, "params": 0.0, "bytes": overhead, "traffic": 0.0}
    )


def _turns(model: Model, shapes: Shapes) -> list[float]:
    """How often each node counts: in a Loop or Scan once for every turn, as far as the number is
    known. Both branches of an If count, since either may run."""
    return [
        float(math.prod(shapes.turns.get(token, 1) for token in inside))
        for inside in regions(model.nodes)
    ]


def _pack(entries: list[tuple[float, list[int], int]], one: int) -> _Terms:
    widest = max((len(places) for _, places, _ in entries), default=0)
    factor = np.full((len(entries), max(widest, 1)), one, dtype=np.int64)
    for i, (_, places, _) in enumerate(entries):
        factor[i, : len(places)] = places
    coefficient = np.array([entry[0] for entry in entries], dtype=np.float64)
    return _Terms(coefficient, factor, np.array([e[2] for e in entries], dtype=np.int64))
