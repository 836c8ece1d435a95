"""How the numbers of an integer tensor read: (q - zero point) * scale, per tensor, axis, block."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from graphprune.model import Array, Model

INTEGERS = {TensorProto.INT8, TensorProto.UINT8, TensorProto.INT32} | {
    TensorProto.INT16,
    TensorProto.UINT16,
}  # that numpy has too


@dataclass(frozen=True)
class Quantised:
    """Names of what dequantises a tensor; vectors run along ``axis``, and what lacks one axis of
    the tensor's lacks the last but one. Without a scale (a product of integers is scaled later)
    the numbers are shares of their largest magnitude."""

    axis: int
    scale: str | None = None
    zero_point: str | None = None
    block: int = 0

    def spread(self, parameter: Array, rank: int) -> Array:
        """A scale or zero point, shaped to meet a tensor of that rank."""
        if parameter.size == 1:
            return parameter.reshape(())
        if self.block:
            return np.repeat(parameter, self.block, axis=self.axis)
        if parameter.ndim == rank:
            return parameter
        if parameter.ndim == rank - 1 > 1:
            return np.expand_dims(parameter, -2)
        shape = [1] * rank
        shape[self.axis] = -1
        return parameter.reshape(shape)


def real(model: Model, name: str, how: Quantised) -> Array:
    """The numbers that a constant integer tensor stands for, in float32."""
    value = model.array(name).astype(np.float32)
    if how.zero_point is not None:
        zero = model.array(how.zero_point).astype(np.float32)
        value = value - how.spread(zero, value.ndim)
    if how.scale is None:
        return value / max(float(np.abs(value).max(initial=0.0)), 1.0)
    scale = model.array(how.scale).astype(np.float32)
    return np.asarray(value * how.spread(scale, value.ndim), dtype=np.float32)


def at_zero(value: Array, kept: Array, zero_point: Array | None) -> Array:
    """``value`` with its zero point wherever ``kept`` (broadcast to it) is false."""
    zero = np.zeros((), value.dtype) if zero_point is None else zero_point.astype(value.dtype)
    # numpy's where lacks the types of few bits; float32 holds all of them and of 16 bits exactly
    wide = np.float32 if value.dtype.itemsize < 4 else value.dtype
    return np.where(kept, value.astype(wide), zero.astype(wide)).astype(value.dtype)


def dequantised(model: Model) -> dict[str, tuple[str, Quantised]]:
    """Weights read from integers that nothing else reads: name → (the integers, how they read)."""
    names = [n.output[0] for n in model.nodes if n.op_type == "DequantizeLinear" and n.output]
    return {name: found for name in names if (found := source_of(model, name)) is not None}


def source_of(model: Model, name: str) -> tuple[str, Quantised] | None:
    """The integers that a weight is read from, and how; ``None`` where it is no such weight."""
    index = model.producer.get(name)
    if index is None or model.nodes[index].op_type != "DequantizeLinear":
        return None
    node = model.nodes[index]
    if len(node.input) < 2:
        return None
    stored = model.initializers.get(node.input[0])
    if stored is None or stored.data_type not in INTEGERS or name not in model.constant_names:
        return None
    numbers = {a.name: a.i for a in node.attribute}
    if len(model.consumers[stored.name]) != 1 or numbers.get("block_size"):
        return None
    axis = numbers.get("axis", 1) % max(1, len(stored.dims))
    zero = node.input[2] if len(node.input) > 2 and node.input[2] else None
    return stored.name, Quantised(axis, node.input[1], zero)


def requantised(model: Model, name: str, how: Quantised, value: Array) -> Array:
    """Integers for other numbers in the place of ``name``, on its grid; beyond it they clip."""
    dtype = model.array(name).dtype
    assert how.scale is not None
    scale = how.spread(model.array(how.scale).astype(np.float64), value.ndim)
    steps = value.astype(np.float64) / np.where(scale == 0, 1.0, scale)
    if how.zero_point is not None:
        steps = steps + how.spread(model.array(how.zero_point).astype(np.float64), value.ndim)
    span = np.iinfo(dtype)
    return np.clip(np.rint(steps), span.min, span.max).astype(dtype)
