"""Rows that stand for a tensor, and what a rule may ask while they walk the graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from graphprune.linear import Linear, Matrix
from graphprune.model import Array, Model
from graphprune.runtime import run_session, session
from graphprune.shapes import Shape, Shapes

Index = NDArray[np.int64]
LARGEST = 1 << 26  # elements of rows at a time: a wider tensor is unknown


class StopError(Exception):
    """Nothing is known of what this node computes."""


@dataclass(frozen=True)
class Rows:
    """``values`` [rows, columns], and the column that each element of the tensor reads.

    ``index`` has the tensor's rank, length 1 along axes where all positions are alike; -1 is zero.
    """

    values: Matrix
    index: Index

    @staticmethod
    def of(array: Array) -> Rows:
        """From [rows, *axes of the tensor]."""
        columns = np.arange(prod(array.shape[1:]), dtype=np.int64)
        values = array.reshape(len(array), -1).astype(np.float64)
        return Rows(values, columns.reshape(array.shape[1:]))

    def full(self) -> Matrix:
        """[rows, *index.shape]."""
        if len(self.values) * self.index.size > LARGEST:
            raise StopError("too wide")
        columns = self.index.reshape(-1)
        if columns.size == self.values.shape[1] and (columns == np.arange(columns.size)).all():
            return self.values.reshape(-1, *self.index.shape)
        if (self.index >= 0).all():
            return np.asarray(self.values[:, self.index])
        zero = np.zeros((len(self.values), 1))
        return np.asarray(np.concatenate([self.values, zero], axis=1)[:, self.index])

    def along(self, axis: int, length: int) -> Index:
        """The column of each of the ``length`` elements along ``axis``; all else must be alike."""
        if self.index.size != self.index.shape[axis] or self.index.size not in (1, length):
            raise StopError("its positions differ")
        return np.broadcast_to(self.index.reshape(-1), length)


@dataclass(frozen=True)
class Step:
    """One node: the rows of its inputs (constants have none), and the model around it."""

    model: Model
    shapes: Shapes
    node: onnx.NodeProto
    linear: Linear | None  # the node as a linear operator
    given: Mapping[str, Rows]
    fixed: Mapping[str, Array]  # constants that neither ``shapes`` nor ``model`` knows
    rows: int
    rng: np.random.Generator

    @property
    def x(self) -> Rows:
        """The first input's rows."""
        found = self.given.get(self.node.input[0]) if self.node.input else None
        if found is None:
            raise StopError("its first input is a constant, or nothing is known of it")
        return found

    @property
    def names(self) -> list[str]:
        """Every tensor that the node reads, once."""
        return list(dict.fromkeys(name for name in self.node.input if name))

    def attribute(self, name: str, default: Any = None) -> Any:
        found = next((a for a in self.node.attribute if a.name == name), None)
        return default if found is None else helper.get_attribute_value(found)

    def value(self, name: str) -> Array:
        found = self.shapes.value.get(name, self.fixed.get(name))
        if found is None and name not in self.model.constant_names:
            raise StopError(f"nothing is known of {name!r}")
        return self.model.array(name) if found is None else found

    def option(self, name: str, place: int) -> Array | None:
        """A list that older operator sets keep in an attribute, later ones in an input."""
        if self.attribute(name) is not None:
            return np.asarray(self.attribute(name))
        if place < len(self.node.input) and self.node.input[place]:
            return self.value(self.node.input[place]).reshape(-1)
        return None

    def shape(self, name: str) -> Shape:
        found = self.shapes.shape.get(name)
        if found is None:
            raise StopError("unknown shape")
        return found

    def run(self, arrays: Mapping[str, Array], node: onnx.NodeProto | None = None) -> Rows:
        """The node itself (or another), on rows in front of the tensor's axes: its first output."""
        node = node or self.node
        types = {name: self._type(name, arrays[name]) for name in self.names}
        feeds = {
            name: np.asarray(arrays[name]).astype(helper.tensor_dtype_to_np_dtype(types[name]))
            for name in self.names
        }
        first = node.output[0]
        outputs = {first: self.shapes.dtype.get(first) or int(TensorProto.FLOAT)}
        return Rows.of(alone(self.model, node, feeds, types, outputs)[0])

    def _type(self, name: str, array: Array) -> int:
        return self.shapes.dtype.get(name) or int(helper.np_dtype_to_tensor_dtype(array.dtype))


def alone(
    model: Model,
    node: onnx.NodeProto,
    feeds: Mapping[str, Array],
    types: Mapping[str, int],
    outputs: Mapping[str, int],
) -> list[Array]:
    """The node run as a model of its own; shapes are left open."""
    skeleton = onnx.ModelProto(ir_version=model.skeleton.ir_version)
    skeleton.opset_import.extend(model.skeleton.opset_import)
    skeleton.graph.name = "alone"
    skeleton.graph.node.append(node)
    for side, table in ((skeleton.graph.input, types), (skeleton.graph.output, outputs)):
        for name, kind in table.items():
            side.append(helper.make_value_info(name, helper.make_tensor_type_proto(kind, None)))
    return run_session(session(Model(skeleton, {}), threads=1), feeds)
