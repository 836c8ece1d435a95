"""What a rule sees of a node, and the table of rules by operator."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper

from graphprune.gradient.tape import Tape, Value
from graphprune.model import Array, Model
from graphprune.shapes import Shape, Shapes


class StopError(Exception):
    """The gradient cannot pass this node: its form is one that the rule does not cover."""


@dataclass(frozen=True)
class Step:
    """One node on the way back: its tensors, its attributes, the cotangents of its outputs."""

    model: Model
    shapes: Shapes
    tape: Tape
    node: onnx.NodeProto
    active: frozenset[str]  # tensors that depend on what is differentiated by
    cotangents: list[Value | None] = field(default_factory=list)  # of the outputs
    given: list[tuple[str, Value]] = field(default_factory=list)

    @property
    def g(self) -> Value:
        """The cotangent of the first output."""
        first = self.cotangents[0]
        if first is None:
            raise StopError(f"{self.node.op_type} is read by another output than its first")
        return first

    @property
    def y(self) -> Value:
        return self.value(self.node.output[0])

    def x(self, index: int = 0) -> Value:
        return self.value(self.node.input[index])

    def value(self, name: str) -> Value:
        return Value(self.tape, name, self.shape_of(name), self.shapes.dtype[name])

    def shape_of(self, name: str) -> Shape:
        shape = self.shapes.shape.get(name)
        if shape is None:
            raise StopError(f"the shape of {name} is unknown")
        return shape

    def has(self, index: int) -> bool:
        """Whether an optional input is there."""
        return index < len(self.node.input) and bool(self.node.input[index])

    def wants(self, index: int) -> bool:
        """Whether the gradient has somewhere to go behind this input."""
        return self.has(index) and self.node.input[index] in self.active

    def constant(self, index: int) -> Array:
        """The value of an input that does not depend on any graph input."""
        name = self.node.input[index]
        if name in self.shapes.value:
            return self.shapes.value[name]
        if name not in self.model.constant_names:
            raise StopError(f"{name} is computed at run time")
        return self.model.array(name)

    def numbers(self, attribute: str, index: int) -> list[int] | None:
        """Integers that older opsets keep in an attribute and newer ones in an input."""
        if self.has(index):
            return [int(n) for n in np.atleast_1d(self.constant(index))]
        found = self.attribute(attribute)
        return None if found is None else [int(n) for n in found]

    def attribute(self, name: str, default: Any = None) -> Any:
        for entry in self.node.attribute:
            if entry.name == name:
                value = helper.get_attribute_value(entry)
                return value.decode() if isinstance(value, bytes) else value
        return default

    def output(self, index: int, dtype: int, shape: Shape) -> Value:
        """An output of the node; an optional one is switched on if it was not asked for."""
        while len(self.node.output) <= index:
            self.node.output.append("")
        if not self.node.output[index]:
            self.node.output[index] = self.tape.name("d_extra")
        return Value(self.tape, self.node.output[index], shape, dtype)

    def give(self, index: int, cotangent: Value) -> None:
        """Contribute to an input's cotangent; the shape may still lack broadcasting to its full."""
        if self.wants(index):
            self.given.append((self.node.input[index], cotangent))


Rule = Callable[[Step], None]
RULES: dict[str, Rule] = {}  # by operator of the standard domain


def rule(*op_types: str) -> Callable[[Rule], Rule]:
    """Register a vector-Jacobian rule for operators of the standard domain."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(op_types, function))
        return function

    return register


def one_hot(indices: Iterable[int], length: int) -> Array:
    """[len(indices), length]: row i picks element ``indices[i]``."""
    return np.eye(length, dtype=np.float32)[np.fromiter(indices, np.int64)]
