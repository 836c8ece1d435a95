"""The read-only view of a node that a rule of facts gets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx

from graphprune.control import integers, said
from graphprune.facts.fact import Fact, Kinds, Shape, unknown, word
from graphprune.model import Array

Rule = Callable[["Seen"], list[Fact | None] | None]


class Table(dict[str, Rule]):
    """Operator → what is known of its outputs."""

    def rule(self, *names: str) -> Callable[[Rule], Rule]:
        def enter(function: Rule) -> Rule:
            self.update(dict.fromkeys(names, function))
            return function

        return enter


@dataclass(frozen=True)
class Seen:
    """One node: facts and shapes of its inputs (``None`` where nothing is known), shapes of its
    outputs, and the values of constant inputs."""

    index: int
    node: onnx.NodeProto
    version: int
    x: tuple[Fact | None, ...]
    shapes: tuple[Shape | None, ...]
    results: tuple[Shape | None, ...]
    values: tuple[Array | None, ...]  # small ones, that shapes and constants decide
    constant: tuple[bool, ...]
    array: Callable[[str], Array]

    def attr(self, name: str, default: Any = None) -> Any:
        return said(self.node, name, default)

    def has(self, index: int) -> bool:
        return index < len(self.node.input) and bool(self.node.input[index])

    def fixed(self, index: int) -> bool:
        return self.has(index) and self.constant[index]

    def weight(self, index: int) -> Array:
        return self.array(self.node.input[index])

    def value(self, index: int) -> Array | None:
        return self.values[index] if index < len(self.values) else None

    def shape(self, index: int) -> Shape:
        """Raises ``ValueError`` where it is not known."""
        shape = self.shapes[index]
        if shape is None:
            raise ValueError("no shape")
        return shape

    def result(self, index: int = 0) -> Shape:
        shape = self.results[index]
        if shape is None:
            raise ValueError("no shape")
        return shape

    def fact(self, index: int) -> Fact:
        found = self.x[index]
        return unknown(len(self.shape(index))) if found is None else found

    def list_of(self, attr: str, index: int) -> list[int] | None:
        """A list given as attribute (older opsets) or as input (newer ones), if it is known."""
        return integers(self.attr(attr), self.value(index))

    @property
    def name(self) -> Kinds:
        """A kind of this node's own."""
        return word(self.index, self.node.op_type)

    @property
    def function(self) -> Kinds:
        """A kind that nodes of the same operator and attributes share."""
        said = sorted(a.SerializeToString(deterministic=True).hex() for a in self.node.attribute)
        return word(self.node.op_type, *said)
