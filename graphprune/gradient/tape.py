"""Write ONNX nodes as arithmetic: a tape that collects nodes, and values that stand on it.

``g * y * (1.0 - y)`` with values ``g`` and ``y`` appends the nodes that compute it. Each value
knows its shape and element type, so that a rule reads like the formula it states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from graphprune.model import Array, set_initializer
from graphprune.shapes import Shape


@dataclass
class Tape:
    """Nodes and constants in the order of writing; ``opset`` decides how some are written."""

    opset: int
    taken: set[str]
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, onnx.TensorProto] = field(default_factory=dict)
    known: dict[tuple[str, Shape, bytes], Value] = field(default_factory=dict)

    def name(self, stem: str) -> str:
        """A tensor name that nothing else bears."""
        number = len(self.taken)
        while f"{stem}_{number}" in self.taken:
            number += 1
        self.taken.add(f"{stem}_{number}")
        return f"{stem}_{number}"

    def write(
        self, op_type: str, inputs: Sequence[Value], shape: Shape, dtype: int = 0, **attributes: Any
    ) -> Value:
        """Append a node with one output; its element type is the first input's unless given."""
        name = self.name(f"d_{op_type}")
        self.nodes.append(helper.make_node(op_type, [v.name for v in inputs], [name], **attributes))
        return Value(self, name, shape, dtype or inputs[0].dtype)

    def constant(self, array: Array) -> Value:
        """An initialiser; equal arrays are stored once."""
        array = np.ascontiguousarray(array).reshape(np.shape(array))
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self.known:
            name = self.name("d_constant")
            self.constants[name] = set_initializer(name, array)
            dtype = helper.np_dtype_to_tensor_dtype(array.dtype)
            self.known[key] = Value(self, name, array.shape, dtype)
        return self.known[key]


@dataclass(frozen=True)
class Value:
    """A tensor on a tape: name, shape and ONNX element type."""

    tape: Tape
    name: str
    shape: Shape
    dtype: int

    @property
    def rank(self) -> int:
        return len(self.shape)

    def constant(self, array: Array | float) -> Value:
        """A constant of this value's element type."""
        return self.tape.constant(np.asarray(array, helper.tensor_dtype_to_np_dtype(self.dtype)))

    def indices(self, numbers: Sequence[int]) -> Value:
        return self.tape.constant(np.array(numbers, np.int64))

    def op(self, op_type: str, **attributes: Any) -> Value:
        """An operator of one input that keeps the shape."""
        return self.tape.write(op_type, [self], self.shape, **attributes)

    def _pair(
        self, op_type: str, left: Value | float, right: Value | float, dtype: int = 0
    ) -> Value:
        values = [v if isinstance(v, Value) else self.constant(v) for v in (left, right)]
        shape = np.broadcast_shapes(values[0].shape, values[1].shape)
        return self.tape.write(op_type, values, shape, dtype)

    def __add__(self, other: Value | float) -> Value:
        return self._pair("Add", self, other)

    def __sub__(self, other: Value | float) -> Value:
        return self._pair("Sub", self, other)

    def __mul__(self, other: Value | float) -> Value:
        return self._pair("Mul", self, other)

    def __truediv__(self, other: Value | float) -> Value:
        return self._pair("Div", self, other)

    def __radd__(self, other: float) -> Value:
        return self + other

    def __rsub__(self, other: float) -> Value:
        return self._pair("Sub", other, self)

    def __rmul__(self, other: float) -> Value:
        return self * other

    def __rtruediv__(self, other: float) -> Value:
        return self._pair("Div", other, self)

    def __neg__(self) -> Value:
        return self.op("Neg")

    def __pow__(self, exponent: Value | float) -> Value:
        return self._pair("Pow", self, exponent)

    def above(self, bound: Value | float) -> Value:
        """1 where this value exceeds the bound, else 0, in this value's element type."""
        return self._pair("Greater", self, bound, TensorProto.BOOL).cast(self.dtype)

    def below(self, bound: Value | float) -> Value:
        """1 where the bound exceeds this value, else 0."""
        return self._pair("Less", self, bound, TensorProto.BOOL).cast(self.dtype)

    def cast(self, dtype: int) -> Value:
        return self.tape.write("Cast", [self], self.shape, dtype, to=dtype)

    def reshape(self, shape: Sequence[int]) -> Value:
        if tuple(shape) == self.shape:
            return self
        return self.tape.write("Reshape", [self, self.indices(shape)], tuple(shape))

    def expand(self, shape: Shape) -> Value:
        """Broadcast to a larger shape."""
        if shape == self.shape:
            return self
        return self.tape.write("Expand", [self, self.indices(shape)], shape)

    def transpose(self, order: Sequence[int]) -> Value:
        shape = tuple(self.shape[axis] for axis in order)
        return self.tape.write("Transpose", [self], shape, perm=list(order))

    def swap_last(self) -> Value:
        """The last two axes exchanged."""
        axes = list(range(self.rank))
        return self.transpose([*axes[:-2], axes[-1], axes[-2]])

    def matmul(self, other: Value) -> Value:
        """Product of matrices (rank 2 or more on both sides), batch axes broadcast."""
        batch = np.broadcast_shapes(self.shape[:-2], other.shape[:-2])
        return self.tape.write("MatMul", [self, other], (*batch, self.shape[-2], other.shape[-1]))

    def sum(self, axes: Sequence[int]) -> Value:
        """Sum over the axes, which stay with length one."""
        return self._reduce("ReduceSum", axes, axes_are_input=self.tape.opset >= 13)

    def mean(self, axes: Sequence[int]) -> Value:
        """Mean over the axes, which stay with length one."""
        return self._reduce("ReduceMean", axes, axes_are_input=self.tape.opset >= 18)

    def sum_of_squares(self, axes: Sequence[int]) -> Value:
        """Sum of squares over the axes, which stay with length one."""
        return self._reduce("ReduceSumSquare", axes, axes_are_input=self.tape.opset >= 18)

    def _reduce(self, op_type: str, axes: Sequence[int], axes_are_input: bool) -> Value:
        axes = [axis % self.rank for axis in axes]
        if not axes:
            return self
        shape = tuple(1 if axis in axes else size for axis, size in enumerate(self.shape))
        if axes_are_input:
            return self.tape.write(op_type, [self, self.indices(axes)], shape, keepdims=1)
        return self.tape.write(op_type, [self], shape, keepdims=1, axes=axes)

    def sum_to(self, shape: Shape) -> Value:
        """Undo a broadcast: sum over the axes along which ``shape`` was stretched to this one."""
        extra = self.rank - len(shape)
        axes = [
            axis
            for axis, size in enumerate(self.shape)
            if axis < extra or (shape[axis - extra] == 1 and size != 1)
        ]
        return self.sum(axes).reshape(shape)

    def pad(self, before: Sequence[int], after: Sequence[int]) -> Value:
        """Zeros around; negative numbers cut off."""
        if not any(before) and not any(after):
            return self
        shape = tuple(size + b + a for size, b, a in zip(self.shape, before, after, strict=True))
        pads = [*before, *after]
        if self.tape.opset >= 11:
            return self.tape.write("Pad", [self, self.indices(pads)], shape)
        return self.tape.write("Pad", [self], shape, pads=pads)

    def slice(self, axis: int, start: int, stop: int) -> Value:
        """The range ``start:stop`` along one axis."""
        if (start, stop) == (0, self.shape[axis]):
            return self
        shape = (*self.shape[:axis], stop - start, *self.shape[axis + 1 :])
        if self.tape.opset >= 10:
            bounds = [self.indices([n]) for n in (start, stop, axis)]
            return self.tape.write("Slice", [self, *bounds], shape)
        return self.tape.write("Slice", [self], shape, starts=[start], ends=[stop], axes=[axis])

    def along(self, axis: int, matrix: Array) -> Value:
        """Contract one axis (length m) with a constant [k, m]: it gets length k."""
        before, after = prod(self.shape[:axis]), prod(self.shape[axis + 1 :])
        shape = (*self.shape[:axis], len(matrix), *self.shape[axis + 1 :])
        if after == 1:
            flat = self.reshape((before, self.shape[axis]))
            return flat.matmul(self.constant(matrix.T)).reshape(shape)
        cube = self.reshape((before, self.shape[axis], after))
        return self.constant(matrix).matmul(cube).reshape(shape)
