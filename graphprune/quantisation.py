"""How the numbers of an integer tensor read: (q - zero point) * scale, per tensor, axis, block."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto

from graphprune.model import Array, Model, set_initializer

INTEGERS = {TensorProto.INT8, TensorProto.UINT8, TensorProto.INT32} | {
    TensorProto.INT16,
    TensorProto.UINT16,
}  # that numpy has too

REACHES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)  # shares of the largest number that a grid may reach to
NOISE = 1e-6  # squared error of a number, in steps, that is none
CLEARLY = 0.9  # share of the error on the present grid that another one must come below


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


@dataclass(frozen=True)
class Written:
    """Integers that stand for other numbers, and by how much their scale grows (``None``: stays):
    one factor, or one along the axis."""

    integers: Array
    growth: Array | None = None


def requantised(
    model: Model, name: str, how: Quantised, value: Array, growth: Array | None = None
) -> Array:
    """Integers for other numbers in the place of ``name``, on its grid (or that grown by so much);
    beyond it they clip."""
    stored = model.array(name)
    assert how.scale is not None
    scale = model.array(how.scale).astype(np.float64)
    scale = how.spread(scale if growth is None else scale * growth.reshape(scale.shape), value.ndim)
    steps = value.astype(np.float64) / np.where(scale == 0, 1.0, scale)
    zero = _zero_point(model, how, value.ndim)
    low, high = _span(stored, zero)
    return np.clip(np.rint(steps + zero), low, high).astype(stored.dtype)


def regridded(model: Model, name: str, how: Quantised, value: Array) -> Written:
    """As ``requantised``, with scales that lose least where the grid does not reach far enough, or
    is coarser than it need be."""
    assert how.scale is not None
    scale = model.array(how.scale).astype(np.float64)
    kept = requantised(model, name, how, value)
    if how.block or scale.ndim > 1 or not value.size or (scale <= 0).any():
        return Written(kept)
    zero = _zero_point(model, how, value.ndim)
    unit = how.spread(scale, value.ndim)
    low, high = _span(model.array(name), zero)
    steps = value.astype(np.float64) / unit
    over = tuple(i for i in range(value.ndim) if scale.size == 1 or i != how.axis)
    with np.errstate(divide="ignore", invalid="ignore"):
        reach = np.where(steps < 0, steps / (low - zero), steps / (high - zero))
    reach = np.where(np.isfinite(reach), reach, 1.0).max(axis=over, keepdims=True)
    best = np.ones(reach.shape)
    least = CLEARLY * _lost(steps, zero, best, low, high, over) - NOISE * value.size
    for share in REACHES:
        growth = np.maximum(reach * share, np.finfo(np.float32).tiny)
        lost = _lost(steps, zero, growth, low, high, over)
        best = np.where(lost < least, growth, best)
        least = np.minimum(lost, least)
    if (best == 1).all():
        return Written(kept)
    narrow = (scale * best.reshape(scale.shape)).astype(model.array(how.scale).dtype)
    growth = (narrow / scale).reshape(-1)  # as the scale's type holds it
    return Written(requantised(model, name, how, value, growth), growth)


def grown(model: Model, how: Quantised, growth: Array | None) -> dict[str, onnx.TensorProto]:
    """The scale, times that."""
    if growth is None or how.scale is None:
        return {}
    scale = model.array(how.scale)
    grown = (scale.astype(np.float64) * growth.reshape(scale.shape)).astype(scale.dtype)
    return {how.scale: set_initializer(how.scale, grown)}


def _lost(
    steps: Array, zero: Array, growth: Array, low: Array, high: Array, over: tuple[int, ...]
) -> Array:
    """Squared error of rounding and clipping on a grid that has grown, in steps of the old one."""
    found = np.clip(np.rint(steps / growth + zero), low, high) - zero
    return np.asarray(np.square(found * growth - steps).sum(axis=over, keepdims=True))


def _zero_point(model: Model, how: Quantised, rank: int) -> Array:
    if how.zero_point is None:
        return np.zeros(())
    return how.spread(model.array(how.zero_point).astype(np.float64), rank)


def _span(stored: Array, zero: Array) -> tuple[Array, Array]:
    """The integers that may be used: half of them where only such are, as for processors that add
    up products of two bytes in sixteen bits."""
    span = np.iinfo(stored.dtype)
    low, high = np.asarray(float(span.min)), np.asarray(float(span.max))
    if stored.dtype.itemsize > 1 or not stored.size:
        return low, high
    half = (high - low + 1) / 4
    if np.abs(stored - np.float64(0 if span.min < 0 else 64)).max() <= half:
        middle = 0.0 if span.min < 0 else half
        return np.asarray(np.minimum(middle - half, zero)), np.asarray(
            np.maximum(middle + half, zero)
        )
    return low, high
