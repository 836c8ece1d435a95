"""Types through control flow that was laid open (see ``graphprune.control``).

What a Loop carries is taken to keep the shape that it starts with. Where the body gives it another
one, those sizes are unknown, and the walk goes through the body once more.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from graphprune.control import ENTER, Parts, attribute, parts
from graphprune.model import Model
from graphprune.turns import Turning, turns

Type = onnx.TypeProto
LARGEST_COUNT = 2**31 - 1  # a Loop beyond it counts as endless: something else must stop it


@dataclass
class Flow:
    """The walk's state: types and small values so far, where bodies begin, and carried values whose
    shape changes."""

    model: Model
    types: MutableMapping[str, Type]
    value: MutableMapping[str, NDArray[Any]]
    found: dict[str, Type] = field(default_factory=dict)  # of the last node passed
    begin: dict[str, int] = field(default_factory=dict)  # token → position of its Enter
    carried: dict[str, list[str]] = field(default_factory=dict)  # token → the body's own names
    changing: set[str] = field(default_factory=set)
    turns: dict[str, int] = field(default_factory=dict)  # token → how often the body runs, if known

    def passed(self, node: onnx.NodeProto, position: int) -> int | None:
        """Types of the node's outputs in ``found``; where to go back to, if that is needed."""
        self.found = {}
        if node.op_type == ENTER:
            self._enter(node, position)
            return None
        if node.op_type == "Loop":
            return self._loop(node, parts(node), position)
        step = {"If": self._if, "Scan": self._scan}[node.op_type]
        return step(node, parts(node))

    def _enter(self, node: onnx.NodeProto, position: int) -> None:
        token, *formal = node.output
        self.begin[token], self.carried[token] = position, formal
        self.found[token] = helper.make_tensor_type_proto(TensorProto.BOOL, ())
        kind = attribute(node, "of", b"").decode()
        if kind == "Loop":
            names = [*node.input[2:]]
            self.found[formal[0]] = helper.make_tensor_type_proto(TensorProto.INT64, ())
            self.found[formal[1]] = helper.make_tensor_type_proto(TensorProto.BOOL, ())
            formal = formal[2:]
        elif kind == "Scan":
            scans = int(attribute(node, "num_scan_inputs", 0))
            states = len(node.input) - scans
            axes = attribute(node, "scan_input_axes", [0] * scans)
            for i, name in enumerate(formal[states:]):
                self.found[name] = _without_axis(self._type(node.input[states + i]), axes[i])
            names, formal = [*node.input[:states]], formal[:states]
        else:
            return
        for name, inner in zip(names, formal, strict=True):
            kept = self._type(name)
            self.found[inner] = _open(kept) if inner in self.changing else kept

    def _if(self, node: onnx.NodeProto, read: Parts) -> None:
        outcome = self.value.get(read.own[0])
        branches = [outputs for _, outputs in read.bodies]
        if outcome is not None and outcome.size == 1:
            taken = branches[0 if outcome.reshape(-1)[0] else 1]
            for name, source in zip(node.output, taken, strict=True):
                self.found[name] = self._type(source)
                if source in self.value:
                    self.value[name] = self.value[source]
            return
        for name, *sources in zip(node.output, *branches, strict=True):
            self.found[name] = _common(*(self._type(source) for source in sources))

    def _loop(self, node: onnx.NodeProto, read: Parts, position: int) -> int | None:
        ((token, given),) = read.bodies
        carried = self.carried[token][2:]
        again = self._unsettled(carried, given[1:])
        if again:
            return self.begin[token]
        inside = self.model.nodes[self.begin[token] + 1 : position]
        steps = self._iterations(read, Turning(inside, self.carried[token], given, read.own[2:]))
        if steps is not None:
            self.turns[token] = steps
        ends = [self._type(name) for name in carried]
        ends += [_with_axis(self._type(n), 0, steps) for n in given[1 + len(carried) :]]
        self.found = dict(zip(node.output, ends, strict=False))
        return None

    def _iterations(self, read: Parts, body: Turning) -> int | None:
        """How often a Loop runs, where that is known: up to its count, if nothing stops it."""
        most = self.value.get(read.own[0]) if read.own else None
        if not (len(read.own) < 2 or not read.own[1] or self._is_true(read.own[1])):
            return None
        given = body.given[0]
        while (source := self._copied(given)) is not None:
            given = source
        count = None if most is None else max(0, int(most.reshape(-1)[0]))
        if given != body.formal[1] and not self._is_true(given):
            count = turns(body, self.value, count, self.model.skeleton.opset_import)
        return count if count is not None and count <= LARGEST_COUNT else None

    def _copied(self, name: str) -> str | None:
        """What an Identity that writes ``name`` reads."""
        index = self.model.producer.get(name)
        node = None if index is None else self.model.nodes[index]
        return None if node is None or node.op_type != "Identity" else node.input[0]

    def _is_true(self, name: str) -> bool:
        return name in self.value and bool(self.value[name].all())

    def _scan(self, node: onnx.NodeProto, read: Parts) -> int | None:
        ((token, given),) = read.bodies
        scans = int(attribute(node, "num_scan_inputs", 0))
        states = len(read.own) - scans
        again = self._unsettled(self.carried[token][:states], given[:states])
        if again:
            return self.begin[token]
        axes = attribute(node, "scan_input_axes", [0] * scans)
        first = shape_of(self._type(read.own[states])) or ()
        steps = first[axes[0]] if -len(first) <= axes[0] < len(first) else None
        if steps is not None:
            self.turns[token] = steps
        ends = [self._type(name) for name in given[:states]]
        outputs = given[states:]
        places = attribute(node, "scan_output_axes", [0] * len(outputs))
        ends += [
            _with_axis(self._type(n), place, steps)
            for n, place in zip(outputs, places, strict=True)
        ]
        self.found = dict(zip(node.output, ends, strict=False))
        return None

    def _unsettled(self, carried: list[str], given: list[str]) -> bool:
        """Whether a carried value turns out to change its shape, which was not known before."""
        new = {
            inner
            for inner, outcome in zip(carried, given, strict=False)
            if inner not in self.changing
            and shape_of(self._type(inner)) is not None
            and shape_of(self._type(inner)) != shape_of(self._type(outcome))
        }
        self.changing |= new
        return bool(new)

    def _type(self, name: str) -> Type:
        return self.types.get(name, Type())


def shape_of(proto: Type) -> tuple[int, ...] | None:
    """The concrete shape, or ``None``."""
    if not proto.HasField("tensor_type") or not proto.tensor_type.HasField("shape"):
        return None
    dims = proto.tensor_type.shape.dim
    if not all(d.HasField("dim_value") for d in dims):
        return None
    return tuple(d.dim_value for d in dims)


def _open(proto: Type) -> Type:
    """The same rank with no size known."""
    new = Type()
    new.CopyFrom(proto)
    if proto.HasField("tensor_type"):
        for dim in new.tensor_type.shape.dim:
            dim.Clear()
    return new


def _common(first: Type, *others: Type) -> Type:
    """What is true of all: sizes that differ are unknown, ranks that differ make the shape so."""
    new = Type()
    new.CopyFrom(first)
    for other in others:
        if new.WhichOneof("value") != other.WhichOneof("value"):
            return Type()
        if not new.HasField("tensor_type"):
            continue
        mine, theirs = new.tensor_type, other.tensor_type
        known = mine.HasField("shape") and theirs.HasField("shape")
        if not known or len(mine.shape.dim) != len(theirs.shape.dim):
            mine.ClearField("shape")
            continue
        for a, b in zip(mine.shape.dim, theirs.shape.dim, strict=True):
            if not a.HasField("dim_value") or a != b:
                a.Clear()
    return new


def _without_axis(proto: Type, axis: int) -> Type:
    dims = _dims(proto)
    if dims is None or not -len(dims) <= axis < len(dims):
        return Type()
    del dims[axis]
    return helper.make_tensor_type_proto(proto.tensor_type.elem_type, dims)


def _with_axis(proto: Type, axis: int, size: int | None) -> Type:
    dims = _dims(proto)
    if dims is None:
        return proto
    dims.insert(axis if axis >= 0 else len(dims) + 1 + axis, size)
    return helper.make_tensor_type_proto(proto.tensor_type.elem_type, dims)


def _dims(proto: Type) -> list[int | None] | None:
    """Sizes, ``None`` for unknown ones; ``None`` where not even the rank is known."""
    if not proto.HasField("tensor_type") or not proto.tensor_type.HasField("shape"):
        return None
    return [d.dim_value if d.HasField("dim_value") else None for d in proto.tensor_type.shape.dim]
