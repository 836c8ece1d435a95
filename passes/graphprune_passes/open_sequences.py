"""Sequences whose length is known become the tensors in them.

Exporters write a split whose sizes they do not know, or a list that Python appended to, as a
sequence and positions in it. Where all of that is known after all, Split and Concat say the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx
from onnx import helper

from graphprune.errors import GraphPruneError
from graphprune.model import Array, Model, label, set_initializer
from graphprune.pipeline import Change, Context, PassResult, Skipped
from graphprune.shapes import Shapes, infer
from graphprune_passes.lift_constants import rename_inputs

BUILD = {"SplitToSequence", "SequenceConstruct", "SequenceEmpty", "SequenceInsert", "SequenceErase"}
CHANGE = {"SequenceInsert", "SequenceErase"}
READ = {"SequenceAt", "ConcatFromSequence", "SequenceLength"}
INPUTS_NOT_ATTRIBUTES = 13  # opset of Split and Unsqueeze
LONGEST = 1024
LARGER = (2, 37)  # times the sizes of open axes
ROUNDS = 8  # the size of what is split may be known once what it was taken from is open


@dataclass(frozen=True)
class OpenSequences:
    """1. SplitToSequence becomes Split, ConcatFromSequence becomes Concat, SequenceAt nothing.
    2. A sequence that is an output, enters a body, has a length that inputs decide, or is read at a
       position that they decide, is left alone, and so is what it is made from.
    """

    name: str = "open_sequences"

    def run(self, model: Model, context: Context) -> PassResult:
        changes: list[Change] = []
        skipped: tuple[Skipped, ...] = ()
        for _ in range(ROUNDS):
            if not any(_is(node, BUILD) for node in model.nodes):
                break
            shapes = infer(model, context.scope.input_shapes)
            found = _Found(model, [shapes, *_otherwise(model, shapes)])
            for node in model.nodes:
                found.look_at(node)
            found.leave_alone()
            done = found.rewritten(self.name)
            model, skipped = done.model, done.skipped
            changes += done.changes
            if not done.modified:
                break
        return PassResult(model, tuple(changes), skipped)


@dataclass
class _Found:
    """Names of the tensors in every sequence that is known."""

    model: Model
    sizes: Sequence[Shapes]  # the model's, and where input sizes are open those at others
    members: dict[str, list[str]] = field(default_factory=dict)
    made: dict[str, onnx.NodeProto] = field(default_factory=dict)  # sequence → its Split
    alias: dict[str, str] = field(default_factory=dict)
    constants: dict[str, onnx.TensorProto] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)

    def look_at(self, node: onnx.NodeProto) -> None:
        if not _is(node, BUILD):
            return
        members = self._members(node)
        if members is None or len(members) > LONGEST:
            why = "a sequence of unknown length"
            if members is not None:
                why = f"a sequence of more than {LONGEST} tensors"
            self.skipped.append(Skipped(label(node), why))
        else:
            self.members[node.output[0]] = members

    def _members(self, node: onnx.NodeProto) -> list[str] | None:
        if node.op_type == "SplitToSequence":
            return self._parts(node)
        if node.op_type in ("SequenceConstruct", "SequenceEmpty"):
            return list(node.input)
        before = self.members.get(node.input[0])
        if before is None:
            return None
        inserts = node.op_type == "SequenceInsert"
        last = len(before) - (not inserts)
        at = self._position(node, 2 if inserts else 1, last)
        if at is None or not -len(before) <= at <= last:
            return None
        at += len(before) if at < 0 else 0
        return [*before[:at], *([node.input[1]] if inserts else []), *before[at + (not inserts) :]]

    def _position(self, node: onnx.NodeProto, index: int, default: int = -1) -> int | None:
        if index >= len(node.input) or not node.input[index]:
            return default
        value = self._value(node.input[index])
        return None if value is None or value.size != 1 else int(value.reshape(-1)[0])

    def _value(self, name: str) -> Array | None:
        """What is the same at all sizes."""
        values = [shapes.value.get(name) for shapes in self.sizes]
        first = values[0]
        if first is None or not all(v is not None and np.array_equal(v, first) for v in values):
            return None
        return first

    def _parts(self, node: onnx.NodeProto) -> list[str] | None:
        shapes = [known.shape.get(node.input[0]) for known in self.sizes]
        first = shapes[0]
        if first is None or not first:
            return None
        axis = int(_attribute(node, "axis", 0)) % len(first)
        lengths = {shape[axis] if shape else -1 for shape in shapes}
        split = len(node.input) > 1 and node.input[1] != ""
        value = self._value(node.input[1]) if split else np.array(1)
        if value is None or len(lengths) > 1 or value.min(initial=0) < 0:
            return None
        whole = max(lengths)
        pieces = [int(v) for v in value.reshape(-1)]
        if value.ndim == 0:
            step = max(1, pieces[0])
            pieces = [min(step, whole - i) for i in range(0, whole, step)]
        squeezed = not split and not _attribute(node, "keepdims", 1)
        if squeezed or sum(pieces) != whole:
            return None
        names = [f"{node.output[0]}/graphprune_part_{i}" for i in range(len(pieces))]
        self.made[node.output[0]] = self._split(node, names, pieces, axis)
        return names

    def _split(
        self, node: onnx.NodeProto, names: list[str], pieces: list[int], axis: int
    ) -> onnx.NodeProto:
        new = helper.make_node("Split", [node.input[0]], names, node.name, axis=axis)
        new.metadata_props.extend(node.metadata_props)
        if self.model.opsets.get("", 1) < INPUTS_NOT_ATTRIBUTES:
            new.attribute.append(helper.make_attribute("split", pieces))
            return new
        sizes = f"{node.output[0]}/graphprune_sizes"
        self.constants[sizes] = set_initializer(sizes, np.array(pieces, np.int64))
        new.input.append(sizes)
        return new

    def leave_alone(self) -> None:
        """Forget sequences that somebody reads as such, and those made from or for these."""
        left = {value.name for value in self.model.outputs}
        left |= {n for n in self.members if any(p < 0 for _, p in self._readers(n))}
        for node in self.model.nodes:
            known = self.members.get(node.input[0]) if node.input else None
            if known is None or not (_is(node, READ) and self._can_read(node, known)):
                first = 1 if _is(node, CHANGE) else 0
                left.update(node.input[first:])
        beside: dict[str, list[str]] = {}
        for node in self.model.nodes:
            if not _is(node, CHANGE):
                continue
            ends = node.input[0], node.output[0]
            beside.setdefault(ends[0], []).append(ends[1])
            beside.setdefault(ends[1], []).append(ends[0])
            if any(name not in self.members for name in ends):
                left.update(ends)
        waiting = list(left & beside.keys())
        while waiting:
            more = set(beside[waiting.pop()]) - left
            left |= more
            waiting += more
        for name in left & self.members.keys():
            del self.members[name]

    def _readers(self, name: str) -> Sequence[tuple[int, int]]:
        return self.model.consumers.get(name, ())

    def _can_read(self, node: onnx.NodeProto, members: list[str]) -> bool:
        if node.op_type == "SequenceAt":
            at = self._position(node, 1, len(members))
            return at is not None and -len(members) <= at < len(members)
        return node.op_type == "SequenceLength" or bool(members)

    def rewritten(self, name: str) -> PassResult:
        nodes: list[onnx.NodeProto] = []
        changes = []
        outputs = {value.name for value in self.model.outputs}
        for node in self.model.nodes:
            known = self.members.get(node.input[0]) if node.input else None
            if _is(node, BUILD) and node.output[0] in self.members:
                new = [self.made[node.output[0]]] if node.output[0] in self.made else []
            elif known is not None and _is(node, READ):
                new = self._read(node, known, outputs)
            else:
                nodes.append(rename_inputs(node, self.alias))
                continue
            nodes += [rename_inputs(each, self.alias) for each in new]
            after = ", ".join(each.op_type for each in new) or "nothing"
            changes.append(Change(name, label(node), "sequence", node.op_type, after, ""))
        if not changes:
            return PassResult(self.model, (), tuple(self.skipped))
        constants = [*self.model.initializers.values(), *self.constants.values()]
        model = self.model.with_graph(nodes, constants)
        return PassResult(model, tuple(changes), tuple(self.skipped))

    def _read(
        self, node: onnx.NodeProto, members: list[str], outputs: set[str]
    ) -> list[onnx.NodeProto]:
        """The nodes in the place of one that reads a sequence of these tensors."""
        result = node.output[0]
        if node.op_type == "SequenceLength":
            if result not in outputs:
                self.constants[result] = set_initializer(result, np.array(len(members), np.int64))
                return []
            node = _like(node, "Constant", [], [result])
            value = set_initializer(result, np.array(len(members), np.int64))
            node.attribute.append(helper.make_attribute("value", value))
            return [node]
        members = [self.alias.get(member, member) for member in members]
        if node.op_type == "SequenceAt":
            at = self._position(node, 1)
            assert at is not None
            if result in outputs or any(p < 0 for _, p in self._readers(result)):
                return [_like(node, "Identity", [members[at]], [result])]
            self.alias[result] = members[at]
            return []
        axis = int(_attribute(node, "axis", 0))
        whole = _like(node, "Concat", members, [result])
        whole.attribute.append(helper.make_attribute("axis", axis))
        if not _attribute(node, "new_axis", 0):
            return [whole]
        whole.input[:] = [f"{result}/graphprune_part_{i}" for i in range(len(members))]
        parts = zip(members, whole.input, strict=True)
        return [*(self._unsqueezed(node, a, b, axis) for a, b in parts), whole]

    def _unsqueezed(
        self, node: onnx.NodeProto, source: str, result: str, axis: int
    ) -> onnx.NodeProto:
        new = _like(node, "Unsqueeze", [source], [result])
        new.name = result
        if self.model.opsets.get("", 1) < INPUTS_NOT_ATTRIBUTES:
            new.attribute.append(helper.make_attribute("axes", [axis]))
            return new
        axes = f"{node.output[0]}/graphprune_axes"
        self.constants[axes] = set_initializer(axes, np.array([axis], np.int64))
        new.input.append(axes)
        return new


def _is(node: onnx.NodeProto, kinds: set[str]) -> bool:
    return node.op_type in kinds and node.domain in ("", "ai.onnx")


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((int(a.i) for a in node.attribute if a.name == name), default)


def _like(
    node: onnx.NodeProto, kind: str, inputs: Sequence[str], outputs: Sequence[str]
) -> onnx.NodeProto:
    new = helper.make_node(kind, inputs, outputs, node.name)
    new.metadata_props.extend(node.metadata_props)
    return new


def _otherwise(model: Model, shapes: Shapes) -> list[Shapes]:
    """Shapes at other sizes of the inputs, where some are open: a little larger and far larger,
    since what is padded to a multiple stays the same for a while."""
    if not any(shapes.symbolic.values()):
        return []
    found = []
    for factor in LARGER:
        larger = {
            name: tuple(
                factor * size + 1 if axis in shapes.symbolic.get(name, ()) else size
                for axis, size in enumerate(shape)
            )
            for name, shape in shapes.inputs.items()
        }
        try:
            found.append(infer(model, larger))
        except GraphPruneError:
            found.append(replace(shapes, shape={}, value={}))
    return found
