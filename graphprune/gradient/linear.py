"""Linear operators with constant weights, and matrix products.

The input gradient of a convolution of stride one is written as another convolution, with the
kernel flipped and its channels exchanged: with two threads ONNX Runtime computes that in about
half the time of a transposed convolution. Other strides become a transposed convolution.
"""

from __future__ import annotations

import numpy as np

from graphprune.gradient.rules import Step, StopError, rule
from graphprune.gradient.tape import Value
from graphprune.gradient.window import Window
from graphprune.model import Array


def _weight(node: Step) -> Array:
    if node.wants(1):
        raise StopError("the weight depends on the input")
    return node.constant(1)


@rule("Conv")
def conv(node: Step) -> None:
    weight, group = _weight(node), node.attribute("group", 1)
    x, g = node.x(), node.g
    window = Window.of(node, weight.shape[2:], x.shape[2:], g.shape[2:])
    if max(window.strides) > 1:
        node.give(0, _transposed(window, g, weight, group, x))
        return
    reach = [d * (k - 1) for d, k in zip(window.dilations, window.kernel, strict=True)]
    before = [r - p for r, p in zip(reach, window.before, strict=True)]
    after = [
        size - out + r - b
        for size, out, r, b in zip(x.shape[2:], g.shape[2:], reach, before, strict=True)
    ]
    cut = [min(0, n) for n in before], [min(0, n) for n in after]  # more padding than reach
    g = g.pad([0, 0, *cut[0]], [0, 0, *cut[1]])
    pads = [max(0, n) for n in (*before, *after)]
    kernel = g.constant(_flipped(weight, group))
    node.give(
        0,
        g.tape.write(
            "Conv", [g, kernel], x.shape, pads=pads, dilations=window.dilations, group=group
        ),
    )


def _flipped(weight: Array, group: int) -> Array:
    """[out, in/g, *k] → [in, out/g, *k], mirrored in space."""
    rows, columns, *kernel = weight.shape
    blocks = weight.reshape(group, rows // group, columns, *kernel).swapaxes(1, 2)
    exchanged = blocks.reshape(group * columns, rows // group, *kernel)
    return np.flip(exchanged, tuple(range(2, exchanged.ndim)))


def _transposed(window: Window, g: Value, weight: Array, group: int, x: Value) -> Value:
    extra = [
        size - (s * (out - 1) + d * (k - 1) + 1 - before - after)
        for size, out, s, d, k, before, after in zip(
            x.shape[2:],
            g.shape[2:],
            window.strides,
            window.dilations,
            window.kernel,
            window.before,
            window.after,
            strict=True,
        )
    ]
    return g.tape.write(
        "ConvTranspose",
        [g, g.constant(weight)],
        x.shape,
        strides=window.strides,
        dilations=window.dilations,
        pads=[*window.before, *window.after],
        output_padding=extra,
        group=group,
    )


@rule("ConvTranspose")
def conv_transpose(node: Step) -> None:
    """A convolution with the same weight; its window runs over the output."""
    weight, group = _weight(node), node.attribute("group", 1)
    x, g = node.x(), node.g
    extra = node.attribute("output_padding", [0] * (x.rank - 2))
    window = Window.of(node, weight.shape[2:], g.shape[2:], x.shape[2:], extra)
    node.give(
        0,
        g.tape.write(
            "Conv",
            [g, g.constant(weight)],
            x.shape,
            strides=window.strides,
            dilations=window.dilations,
            pads=[*window.before, *window.after],
            group=group,
        ),
    )


@rule("MatMul")
def matmul(node: Step) -> None:
    """Vectors become matrices of one row or one column first, as ONNX does."""
    a, b = node.x(0), node.x(1)
    rows = a.reshape((1, *a.shape)) if a.rank == 1 else a
    columns = b.reshape((*b.shape, 1)) if b.rank == 1 else b
    batch = np.broadcast_shapes(rows.shape[:-2], columns.shape[:-2])
    g = node.g.reshape((*batch, rows.shape[-2], columns.shape[-1]))
    if node.wants(0):
        node.give(0, g.matmul(columns.swap_last()).sum_to(rows.shape).reshape(a.shape))
    if node.wants(1):
        node.give(1, rows.swap_last().matmul(g).sum_to(columns.shape).reshape(b.shape))


@rule("Gemm")
def gemm(node: Step) -> None:
    """α·A'·B' + β·C."""
    alpha, beta = node.attribute("alpha", 1.0), node.attribute("beta", 1.0)
    flip_a, flip_b = node.attribute("transA", 0), node.attribute("transB", 0)
    a, b, g = node.x(0), node.x(1), node.g
    scaled = g if alpha == 1 else g * alpha
    if node.wants(0):
        inner = scaled.matmul(b if flip_b else b.swap_last())
        node.give(0, inner.swap_last() if flip_a else inner)
    if node.wants(1):
        inner = (a if flip_a else a.swap_last()).matmul(scaled)
        node.give(1, inner.swap_last() if flip_b else inner)
    if node.wants(2):
        node.give(2, (g * beta).sum_to(node.x(2).shape))
