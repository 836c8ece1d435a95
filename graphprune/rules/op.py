"""The read-only view of a node that a rule gets, and the words it speaks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from graphprune.control import integers, said
from graphprune.model import Array
from graphprune.quantisation import Quantised
from graphprune.relations import (
    Choice,
    Contraction,
    Count,
    Default,
    Fold,
    Macs,
    Pin,
    Read,
    Relations,
    Renumber,
    Reuse,
    Role,
    Tie,
)
from graphprune.slots import Axis, SlotArray, SlotTensor

Rule = Callable[["Op"], None]
Slotted = Axis | SlotArray


class Table(dict[tuple[str, str], Rule]):
    """Operator → rule. ``@table.rule("Relu", "Tanh")`` gives one rule to several operators."""

    def rule(self, *names: str, domain: str = "") -> Callable[[Rule], Rule]:
        def enter(function: Rule) -> Rule:
            for name in names:
                if (domain, name) in self:
                    raise ValueError(f"two rules for {domain}::{name} in one table")
                self[domain, name] = function
            return function

        return enter


class RefusedError(Exception):
    """A rule cannot describe this node; everything it touches is pinned with the reason."""


@dataclass(frozen=True)
class Op:
    """One node: inputs ``x`` and outputs ``y`` as slots (``None`` for an absent optional)."""

    index: int
    node: onnx.NodeProto
    version: int
    x: tuple[SlotTensor | None, ...]
    y: tuple[SlotTensor | None, ...]
    values: tuple[Array | None, ...]
    constant: tuple[bool, ...]
    relations: Relations
    varying: tuple[bool, ...] = ()  # whether a value is another where inputs have other sizes
    places: tuple[int, ...] = ()  # where inputs stand in the node, if a view shows only some
    integers: tuple[Quantised | None, ...] = ()  # how inputs read that are quantised

    # --- what the node says ---

    @property
    def type(self) -> str:
        return self.node.op_type

    def attr(self, name: str, default: Any = None) -> Any:
        return said(self.node, name, default)

    def axis(self, name: str = "axis", default: int | None = None, rank: int | None = None) -> int:
        """An axis attribute, as a non-negative number for the first input's rank."""
        value = self.attr(name, default)
        if value is None:
            raise RefusedError(f"attribute {name!r} is missing")
        return int(value) % max(1, self.input(0).rank if rank is None else rank)

    def has(self, index: int) -> bool:
        return index < len(self.x) and self.x[index] is not None

    def input(self, index: int) -> SlotTensor:
        tensor = self.x[index] if index < len(self.x) else None
        if tensor is None:
            raise RefusedError(f"input {index} is absent")
        return tensor

    def output(self, index: int = 0) -> SlotTensor:
        tensor = self.y[index] if index < len(self.y) else None
        if tensor is None:
            raise RefusedError(f"output {index} is absent")
        return tensor

    def place(self, index: int) -> int:
        """Where input ``index`` stands in the node."""
        return self.places[index] if index < len(self.places) else index

    def value(self, index: int) -> Array | None:
        """The value of an input where shapes and constants decide it."""
        return self.values[index] if index < len(self.values) else None

    def varies(self, index: int) -> bool:
        """Whether the value of an input is another where the model's inputs have other sizes."""
        return index < len(self.varying) and self.varying[index]

    def list_of(self, attr: str, index: int) -> list[int] | None:
        """A list given as attribute (older opsets) or as input ``index`` (newer ones)."""
        found = integers(self.attr(attr), self.value(index))
        if found is not None:
            return found
        place = self.place(index)
        if place < len(self.node.input) and self.node.input[place]:
            raise RefusedError(f"input {index} ({attr}) is not known before run time")
        return None

    # --- what a rule says ---

    def tie(self, a: Slotted, b: Slotted) -> None:
        """Slots of ``a`` and ``b`` live or die together, pairwise."""
        first, second = _flat(a), _flat(b)
        if len(first) != len(second):
            raise RefusedError(f"axes of {len(first)} and {len(second)} slots do not correspond")
        self.relations.ties.append(Tie(first, second, self.index))

    def read(self, source: Slotted, read: Slotted) -> None:
        """``read`` copies ``source``, pairwise, for one reader, which may do without some of it."""
        self.free(source, read)
        self.relations.reads.append(Read(_flat(source), _flat(read), self.index))

    def same(self, a: SlotTensor, b: SlotTensor, but: Sequence[int] = ()) -> None:
        """Tie equal axes of two tensors of one rank, except ``but`` (non-negative axes)."""
        for i, (p, q) in enumerate(zip(a, b, strict=True)):
            if i not in but:
                self.tie(p, q)

    def same_axes(self, a: Sequence[Axis], b: Sequence[Axis]) -> None:
        """Tie axes pairwise."""
        for p, q in zip(a, b, strict=True):
            self.tie(p, q)

    def broadcast(self, a: SlotTensor, y: SlotTensor, to: int | None = None) -> None:
        """Tie ``a`` to ``y`` as numpy broadcasts it, right-aligned at axis ``to`` (exclusive)."""
        end = y.rank if to is None else to
        for axis, target in zip(a.axes[::-1], y.axes[:end][::-1], strict=False):
            if len(axis) == len(target):
                self.tie(axis, target)
            elif len(axis) == 1:
                self.free(axis)

    def free(self, *axes: Slotted) -> None:
        """These slots may leave without anything else leaving."""
        for axis in axes:
            self.relations.ties.append(Tie(_flat(axis), _flat(axis), self.index))

    def fold(self, whole: Slotted, parts: Sequence[Slotted]) -> None:
        """``whole`` is the row-major product of ``parts``; one part at most carries removals."""
        if math.prod(len(part) for part in parts) != len(whole):
            raise RefusedError(f"an axis of {len(whole)} is no product of its parts")
        real = [_flat(part) for part in parts if len(part) != 1]
        for part in parts:
            if len(part) == 1:
                self.free(part)
        if len(real) == 1:
            self.tie(whole, real[0])
        elif not real:
            self.free(whole)
        else:
            self.relations.folds.append(Fold(_flat(whole), tuple(real), self.index))

    def virtual(self, size: int) -> SlotArray:
        """Slots of an axis that no tensor has, such as the groups of a grouped convolution."""
        start = self.relations.total
        self.relations.total += size
        return np.arange(start, start + size, dtype=np.int64)

    def contract(self, index: int, axis: int, partner: Axis | None = None) -> None:
        """The node sums over this axis of input ``index``: zeros there are as good as absence."""
        slots = self.input(index)[axis].slots
        how = self.integers[index] if index < len(self.integers) else None
        contraction = Contraction(self.index, self.place(index), axis, slots, how, partner)
        self.relations.contractions.append(contraction)
        self.relations.roles.append((slots, Role.CONSUMER))
        self.free(slots)

    def consume(self, x: Axis, index: int, axis: int) -> None:
        """Input ``index``'s ``axis`` reads ``x`` and sums over it."""
        self.tie(x, self.input(index)[axis])
        self.contract(index, axis, x)

    def produce(self, w: Axis, y: Slotted) -> None:
        """Each slot of ``w`` computes the slot of ``y`` it is tied to."""
        self.tie(w, y)
        self.relations.roles.append((w.slots, Role.PRODUCER))

    def plays(self, slots: Slotted, role: Role) -> None:
        """These slots of a parameter take part in their groups as ``role``."""
        self.relations.roles.append((_flat(slots), role))

    def scale(self, index: int, x: Axis, role: Role = Role.SCALE) -> None:
        """Vector input ``index`` scales ``x`` (a normalisation's scale or its stored variance)."""
        if self.has(index):
            w = self.input(index)[0]
            self.tie(w, x)
            self.relations.roles.append((w.slots, role))

    def shift(self, *axes: Slotted) -> None:
        """Removing these slots is not the same as zeroing them (statistics over the axis)."""
        for axis in axes:
            slots = _flat(axis)
            if len(slots) > 1:
                reason = f"{self.type} takes statistics over the axis"
                self.relations.shifts.append(Pin(slots, reason, self.index))
            self.free(slots)

    def choose(self, index: int, axis: int, least: int = 1, smallest: bool = False) -> None:
        """The node takes ``least`` of the largest along this axis of input ``index``, or divides
        one among them: a very low number there is as good as absence."""
        slots = self.input(index)[axis].slots
        choice = Choice(self.index, self.type, self.place(index), axis, slots, least, smallest)
        self.relations.choices.append(choice)
        self.free(slots)

    def experts(self, axis: Slotted) -> None:
        """Weights are stacked along this axis, one for each slot."""
        self.relations.experts.append(_flat(axis))
        self.relations.roles.append((_flat(axis), Role.PRODUCER))

    def weigh(self, axis: Slotted) -> None:
        """Each slot of the output is what one expert counts."""
        slots = _flat(axis)
        self.relations.weighed.append(Choice(self.index, self.type, 0, 0, slots))

    def numbers(self, index: int, axis: Slotted) -> None:
        """Output ``index`` holds positions along this axis."""
        if index < len(self.y) and self.y[index] is not None:
            self.relations.positions[self.output(index).name] = _flat(axis)

    def look_up(self, index: int, axis: Axis) -> bool:
        """Whether input ``index`` holds positions along an axis that ``axis`` corresponds to, which
        is then said."""
        place = self.place(index)
        slots = self.relations.positions.get(self.node.input[place])
        if slots is None or len(slots) != len(axis):
            return False
        self.relations.looked_up.add((self.index, place))
        self.tie(axis, slots)
        return True

    def count_attr(
        self, attr: str, slots: Slotted, element: int | None = None, negative: bool = False
    ) -> None:
        """Attribute ``attr`` (or one element of it) is the number of surviving slots."""
        self.relations.counts.append(
            Count(self.index, _flat(slots), attr=attr, element=element, negative=negative)
        )

    def count_input(
        self, index: int, element: int | None, slots: Slotted, negative: bool = False
    ) -> None:
        """One element of input ``index`` is the number of surviving slots."""
        self.relations.counts.append(
            Count(
                self.index,
                _flat(slots),
                input=self.place(index),
                element=element,
                negative=negative,
            )
        )

    def default(self, attr: str, value: float, slots: Slotted) -> None:
        """Attribute ``attr`` is left out and means ``value``, which depends on these slots."""
        self.relations.defaults.append(Default(self.index, attr, value, _flat(slots)))

    def renumber(self, index: int, slots: Slotted) -> None:
        """Input ``index`` holds positions along these slots."""
        self.relations.renumbers.append(Renumber(self.index, _flat(slots), self.place(index)))

    def quantised(self, index: int, how: Quantised) -> None:
        """Input ``index`` is an integer tensor that stands for real numbers."""
        name = self.input(index).name
        known = self.relations.quantised.get(name)
        if known is None or known.scale is None:
            self.relations.quantised[name] = how

    def heads(self, axis: Slotted) -> None:
        """This axis counts heads: a Reshape that splits into heads carries removals here."""
        self.relations.heads.append(_flat(axis))

    def channels(self, axis: Slotted) -> None:
        """These are channels, even where a Reshape takes the axis around them for heads."""
        self.relations.channels.append(_flat(axis))

    def macs(self, *factors: Slotted) -> None:
        """The node's multiply-accumulates are the product of these axes' lengths."""
        self.relations.macs.append(Macs(self.index, tuple(_flat(f) for f in factors)))

    def view(self) -> None:
        """The output is the first input's memory under another name or shape."""
        self.relations.reuses.append(Reuse(self.index, self.place(0), view=True))

    def in_place(self, *inputs: int) -> None:
        """The output may take the place of one of these inputs, the first that ends here."""
        reuses = [Reuse(self.index, self.place(i), view=False) for i in inputs]
        self.relations.reuses.extend(reuses)

    def pin(self, axis: Slotted, reason: str) -> None:
        self.relations.pins.append(Pin(_flat(axis), f"{self.type}: {reason}", self.index))

    def reads_shape(self) -> None:
        """The output is the input's sizes; downstream it must go on meaning the original's."""
        self.relations.shape_reads.append(self.index)


def _flat(axis: Slotted) -> SlotArray:
    return (axis.slots if isinstance(axis, Axis) else axis).reshape(-1)
