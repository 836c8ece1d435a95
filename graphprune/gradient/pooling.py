"""Pools and reductions."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from graphprune.gradient.rules import Step, StopError, rule
from graphprune.gradient.tape import Value
from graphprune.gradient.window import Window
from graphprune.model import Array


def _spatial(value: Value) -> list[int]:
    return list(range(2, value.rank))


@rule("GlobalAveragePool")
def global_average_pool(node: Step) -> None:
    x = node.x()
    node.give(0, node.g * (1 / np.prod(x.shape[2:]).item()))


@rule("GlobalMaxPool")
def global_max_pool(node: Step) -> None:
    """To each position that holds the maximum."""
    node.give(0, node.g * (1.0 - node.x().below(node.y)))


@rule("AveragePool")
def average_pool(node: Step) -> None:
    """The mean over a window is a product of means along each axis: so is its transpose."""
    x, g = node.x(), node.g
    window = Window.of(node, node.attribute("kernel_shape"), x.shape[2:], g.shape[2:])
    counts_padding = bool(node.attribute("count_include_pad", 0))
    for axis in _spatial(x):
        means = _means(window, axis - 2, x.shape[axis], g.shape[axis], counts_padding)
        g = g.along(axis, means.T)
    node.give(0, g)


def _means(window: Window, axis: int, size: int, places: int, counts_padding: bool) -> Array:
    """[places, size]: each row averages the taps of one place."""
    taps = window.taps(axis, size, places)
    inside = (taps >= 0) & (taps < size)
    counted = (taps < size + window.after[axis]) if counts_padding else inside
    matrix = np.zeros((places, size))
    rows = np.broadcast_to(np.arange(places)[:, None], taps.shape)
    np.add.at(matrix, (rows[inside], taps[inside]), 1.0)
    means: Array = matrix / np.maximum(counted.sum(axis=1, keepdims=True), 1)
    return means


@rule("MaxPool")
def max_pool(node: Step) -> None:
    """Each cotangent returns to the tap that won: a one-hot over the taps, laid out again by a
    transposed convolution whose kernel is the identity."""
    x, g = node.x(), node.g
    if node.attribute("storage_order", 0):
        raise StopError("column-major indices")
    window = Window.of(node, node.attribute("kernel_shape"), x.shape[2:], g.shape[2:])
    planes, places, size = x.shape[0] * x.shape[1], g.shape[2:], x.shape[2:]
    index = node.output(1, TensorProto.INT64, g.shape).reshape((planes, 1, *places))
    offset = np.arange(planes).reshape(planes, *[1] * (x.rank - 1)) * np.prod(size, dtype=int)
    taps = index.tape.constant(_tap_indices(window, size, places))
    local = index - index.tape.constant(offset)
    shape = (planes, taps.shape[1], *places)
    won = index.tape.write("Equal", [local, taps], shape, TensorProto.BOOL).cast(g.dtype)
    spread = won * g.reshape((planes, 1, *places))
    kernel = np.eye(taps.shape[1]).reshape(taps.shape[1], 1, *window.kernel)
    canvas = [
        s * (n - 1) + d * (k - 1) + 1
        for s, n, d, k in zip(window.strides, places, window.dilations, window.kernel, strict=True)
    ]
    laid = g.tape.write(
        "ConvTranspose",
        [spread, g.constant(kernel)],
        (planes, 1, *canvas),
        strides=window.strides,
        dilations=window.dilations,
    )
    rest = [n + b - c for n, b, c in zip(size, window.before, canvas, strict=True)]
    node.give(0, laid.pad([0, 0, *(-b for b in window.before)], [0, 0, *rest]).reshape(x.shape))


def _tap_indices(window: Window, size: tuple[int, ...], places: tuple[int, ...]) -> Array:
    """[1, taps, *places]: the flat index in the plane that each tap reads, −1 in the padding."""
    rank = len(size)
    flat = np.zeros((*window.kernel, *places), np.int64)
    inside = np.ones(flat.shape, bool)
    for axis in range(rank):
        taps = window.taps(axis, size[axis], places[axis]).T  # [kernel, places]
        shape = [1] * 2 * rank
        shape[axis], shape[rank + axis] = taps.shape
        flat = flat * size[axis] + taps.reshape(shape)
        inside &= ((taps >= 0) & (taps < size[axis])).reshape(shape)
    return np.where(inside, flat, -1).reshape(1, -1, *places)


def _axes(node: Step) -> list[int]:
    x = node.x()
    axes = node.numbers("axes", 1)
    if axes is None or (not axes and not node.attribute("noop_with_empty_axes", 0)):
        return list(range(x.rank))
    return [axis % x.rank for axis in axes]


def _kept(node: Step, value: Value) -> Value:
    """A reduced value with its axes back, of length one."""
    axes = _axes(node)
    return value.reshape([1 if i in axes else n for i, n in enumerate(node.x().shape)])


@rule("ReduceSum")
def reduce_sum(node: Step) -> None:
    node.give(0, _kept(node, node.g))


@rule("ReduceMean")
def reduce_mean(node: Step) -> None:
    count = np.prod([node.x().shape[axis] for axis in _axes(node)], dtype=int).item()
    node.give(0, _kept(node, node.g) * (1 / count))


@rule("ReduceSumSquare")
def reduce_sum_square(node: Step) -> None:
    node.give(0, node.x() * (_kept(node, node.g) * 2.0))


@rule("ReduceL2")
def reduce_l2(node: Step) -> None:
    node.give(0, node.x() * _kept(node, node.g / node.y))


@rule("ReduceMax", "ReduceMin")
def reduce_extreme(node: Step) -> None:
    """To each element that reached the extreme."""
    beaten = Value.below if node.node.op_type == "ReduceMax" else Value.above
    x = node.x()
    node.give(0, (1.0 - beaten(x, _kept(node, node.y))) * _kept(node, node.g))
