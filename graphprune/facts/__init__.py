"""Facts: what weights alone say of every tensor, whatever the inputs are.

One walk over the nodes in order: bounds of elements, and which slices are equal. An operator
without a rule gives no fact. Sizes that an input may choose are never counted on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from graphprune.control import is_open
from graphprune.coupling import FLOAT_TYPES
from graphprune.errors import UncomputableError
from graphprune.facts import linear, movement, normalisation, pointwise, quantised
from graphprune.facts.fact import Fact, Line, along, between, coarse, exactly
from graphprune.facts.seen import Seen, Table
from graphprune.model import NOT_COMPUTED, Array, Model
from graphprune.shapes import Shapes, open_values

__all__ = ["Fact", "Facts", "Line", "along", "facts_of"]

RULES = Table({**pointwise.table, **linear.table, **movement.table, **normalisation.table})
RULES |= quantised.table
GELUS = ("Gelu", "FastGelu", "BiasGelu", "QuickGelu")
FUSED = {("com.microsoft", name) for name in GELUS}  # ONNX Runtime's own that have rules
BYTE, BOOLEAN = 2, 9  # types of inputs that have bounds
REAL = FLOAT_TYPES | {BOOLEAN}  # arithmetic of integers wraps and truncates
PICKING = {*movement.table, "Clip", "Identity", "Max", "Min", "Where"}  # and these compute nothing
PICKING |= {"QuantizeLinear"}  # whose bounds are rounded like the integers themselves
LARGEST = 1 << 22  # elements of a constant that is looked into


@dataclass
class Facts:
    """Facts by tensor name, those of constants as they are asked for."""

    model: Model
    shapes: Shapes
    known: dict[str, Fact] = field(default_factory=dict)
    arrays: dict[str, Array] = field(default_factory=dict)
    sized: frozenset[str] = frozenset()  # small values that sizes of inputs decide

    def of(self, name: str) -> Fact | None:
        """``None`` where nothing is known, or the rank is not."""
        if name in self.known:
            return self.known[name]
        if name not in self.model.constant_names:
            return None
        shape = self.shapes.shape.get(name)
        if shape is None or not 0 < math.prod(shape) <= LARGEST:
            return None
        array = self.constant(name)
        if array is None or array.dtype.kind not in "biuf" or array.shape != shape:
            return None
        self.known[name] = exactly(array)
        return self.known[name]

    def line(self, name: str, axis: int) -> Line | None:
        """The fact along one axis of a tensor."""
        shape, fact = self.shapes.shape.get(name), self.of(name)
        if shape is None or fact is None or fact.low.ndim != len(shape):
            return None
        return along(fact, axis, shape[axis])

    def constant(self, name: str) -> Array | None:
        """The value of a constant; ``None`` where it cannot be computed here."""
        try:
            return self.array(name)
        except UncomputableError:
            return None

    def array(self, name: str) -> Array:
        if name in self.model.initializers:
            return self.model.array(name)
        if name not in self.arrays:
            self.arrays[name] = self.model.array(name)
        return self.arrays[name]


def facts_of(model: Model, shapes: Shapes) -> Facts:
    """Walk the model once. Reads its weights once or twice."""
    facts = Facts(model, shapes, sized=open_values(model, shapes, any(shapes.symbolic.values())))
    for value in model.inputs:
        kind, shape = shapes.dtype.get(value.name), shapes.shape.get(value.name)
        if shape is not None and kind in (BYTE, BOOLEAN):
            facts.known[value.name] = between(0.0, 255.0 if kind == BYTE else 1.0, len(shape))
    with np.errstate(all="ignore"):
        for index in range(len(model.nodes)):
            facts.known.update(_facts_of_node(facts, index))
    return facts


def _facts_of_node(facts: Facts, index: int) -> Iterator[tuple[str, Fact]]:
    model, shapes = facts.model, facts.shapes
    node = model.nodes[index]
    rule = RULES.get(node.op_type)
    own = node.domain in ("", "ai.onnx") or (node.domain, node.op_type) in FUSED
    if rule is None or not own or is_open(node) or model.constant_names.issuperset(node.output):
        return
    weighty = node.op_type in linear.table  # their rules read the weights as they are
    seen = Seen(
        index,
        node,
        model.opsets.get("", 1),
        tuple(
            None if not name or (weighty and i and name in model.constant_names) else facts.of(name)
            for i, name in enumerate(node.input)
        ),
        tuple(shapes.shape.get(name) if name else None for name in node.input),
        tuple(shapes.shape.get(name) if name else None for name in node.output),
        tuple(None if name in facts.sized else shapes.value.get(name) for name in node.input),
        tuple(name in model.constant_names for name in node.input),
        facts.array,
    )
    try:
        found = rule(seen) or []
    except (*NOT_COMPUTED, UncomputableError):  # damaged, or of sizes that are not known
        found = []
    for name, fact in zip(node.output, found, strict=False):
        shape = shapes.shape.get(name)
        if name and fact is not None and shape is not None and fact.fits(shape):
            exact = shapes.dtype.get(name) in REAL or node.op_type in PICKING
            yield name, _sound(coarse(fact if exact else fact.without_bounds))


def _sound(fact: Fact) -> Fact:
    """Bounds that arithmetic with infinities made nothing of are none."""
    nothing = np.isnan(fact.low) | np.isnan(fact.high) | (fact.low > fact.high)
    low = np.where(nothing, -np.inf, fact.low)
    high = np.where(nothing, np.inf, fact.high)
    return Fact(low, high, fact.kind, fact.mean)
