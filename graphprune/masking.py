"""Zeros where slots left, on what a contraction reads; on integers, their zero point.

A mask on the reading of an integer tensor goes before the node that dequantises it: a runtime that
computes such a pattern in integers does so with the mask as without it, and both round alike.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

from graphprune import external
from graphprune.coupling import Mask
from graphprune.model import Array, Model, set_initializer
from graphprune.quantisation import Quantised, at_zero
from graphprune.relations import Contraction, Relations
from graphprune.shapes import Shapes

CHOSEN_TYPES = {TensorProto.INT8, TensorProto.UINT8, TensorProto.INT32}  # that Where is built for


class Masks:
    """Masked copies of tensors: the nodes that make them, and new constants in ``tensors``."""

    def __init__(self, model: Model, shapes: Shapes, relations: Relations) -> None:
        self.model = model
        self.shapes = shapes
        self.relations = relations
        self.tensors: dict[str, onnx.TensorProto] = {}
        self.origin: dict[str, str] = {}  # masked copy → the tensor it is a copy of
        self.readings: dict[str, onnx.NodeProto] = {
            name: model.nodes[index] for name, index in relations.dequantised.items()
        }

    def apply(
        self, name: str, contraction: Contraction, kept: Mask
    ) -> tuple[str, list[onnx.NodeProto]]:
        """Name of ``name``, masked where ``kept`` (one per slot) is false, and nodes to insert."""
        mask = kept.reshape(self._along(name, contraction.axis))
        reading = self.readings.get(name)
        if reading is not None and self._can_choose(reading.input[0]):
            how = self.relations.quantised[self._original(reading.input[0])]
            source, nodes = self._at_zero(reading.input[0], how, mask)
            copy = onnx.NodeProto()
            copy.CopyFrom(reading)
            copy.input[0] = source
            copy.output[0] = copy.name = self._new(name)
            self.readings[copy.output[0]] = copy
            return copy.output[0], [*nodes, copy]
        if contraction.quantised is not None:
            return self._at_zero(name, contraction.quantised, mask)
        dtype = helper.tensor_dtype_to_np_dtype(self.shapes.dtype[self._original(name)])
        product = self._new(name)
        factor = self._constant(f"{product}/mask", mask.astype(dtype))
        return product, [helper.make_node("Mul", [name, factor], [product], name=product)]

    def _at_zero(self, name: str, how: Quantised, mask: Array) -> tuple[str, list[onnx.NodeProto]]:
        result = self._new(name)
        stored = self.tensors.get(name, self.model.initializers.get(name))
        known = how.zero_point is None or how.zero_point in self.model.constant_names
        if stored is not None and known:
            value = external.array(stored)
            zero = self.model.array(how.zero_point) if how.zero_point else None
            spread = None if zero is None else how.spread(zero, value.ndim)
            return self._constant(result, at_zero(value, mask, spread)), []
        nodes = []
        if how.zero_point is None:
            dtype = helper.tensor_dtype_to_np_dtype(self.shapes.dtype[self._original(name)])
            zero_name = self._constant(f"{result}/zero", np.zeros((), dtype))
        elif self._is_vector(how.zero_point):
            zero_name = f"{result}/zero"
            shape = np.array(self._along(name, how.axis), np.int64)
            inputs = [how.zero_point, self._constant(f"{result}/shape", shape)]
            nodes.append(helper.make_node("Reshape", inputs, [zero_name], name=zero_name))
        else:
            zero_name = how.zero_point
        condition = self._constant(f"{result}/mask", mask)
        inputs = [condition, name, zero_name]
        nodes.append(helper.make_node("Where", inputs, [result], name=result))
        return result, nodes

    def _can_choose(self, name: str) -> bool:
        """Whether the integers can be masked: stored ones always, others of some types."""
        if name in self.tensors or name in self.model.initializers:
            return True
        original = self._original(name)
        blocks = self.relations.quantised[original].block
        return self.shapes.dtype.get(original) in CHOSEN_TYPES and not blocks

    def _is_vector(self, name: str) -> bool:
        return bool(np.prod(self.shapes.shape.get(name) or (1,)) > 1)

    def _along(self, name: str, axis: int) -> list[int]:
        shape = [1] * len(self.shapes.shape[self._original(name)] or ())
        shape[axis] = -1
        return shape

    def _original(self, name: str) -> str:
        return self.origin.get(name, name)

    def _new(self, name: str) -> str:
        result = f"graphprune/masked_{len(self.origin)}"
        self.origin[result] = self._original(name)
        return result

    def _constant(self, name: str, value: Array) -> str:
        self.tensors[name] = set_initializer(name, value)
        return name
