"""Normalisations: with stored statistics a scale, with computed ones a projection."""

from __future__ import annotations

from math import prod

import numpy as np

from graphprune.gradient.rules import Step, StopError, rule
from graphprune.gradient.tape import Value


@rule("BatchNormalization")
def batch_normalization(node: Step) -> None:
    if node.attribute("training_mode", 0) or any(node.node.output[1:]):
        raise StopError("training mode")
    scale, _, _, variance = (node.constant(i).astype(np.float64) for i in range(1, 5))
    factor = scale / np.sqrt(variance + node.attribute("epsilon", 1e-5))
    node.give(0, node.g * node.g.constant(factor.reshape(-1, *[1] * (node.g.rank - 2))))


def _normalised(x: Value, g: Value, axes: list[int], epsilon: float) -> Value:
    """The cotangent of x for y = (x − mean)/deviation over ``axes``, from that of y:
    (g − mean(g) − y·mean(g·y))/deviation."""
    centred = x - x.mean(axes)
    deviation = ((centred * centred).mean(axes) + epsilon).op("Sqrt")
    y = centred / deviation
    return (g - g.mean(axes) - y * (g * y).mean(axes)) / deviation


def _per_channel(value: Value, rank: int) -> Value:
    return value.reshape((1, value.shape[0], *[1] * (rank - 2)))


@rule("LayerNormalization")
def layer_normalization(node: Step) -> None:
    x = node.x()
    axes = list(range(node.attribute("axis", -1) % x.rank, x.rank))
    node.give(0, _normalised(x, node.g * node.x(1), axes, node.attribute("epsilon", 1e-5)))


@rule("InstanceNormalization")
def instance_normalization(node: Step) -> None:
    x = node.x()
    g = node.g * _per_channel(node.x(1), x.rank)
    node.give(0, _normalised(x, g, list(range(2, x.rank)), node.attribute("epsilon", 1e-5)))


@rule("GroupNormalization")
def group_normalization(node: Step) -> None:
    """The scale is per group in opset 18 and per channel from opset 21."""
    x, scale, groups = node.x(), node.x(1), node.attribute("num_groups")
    each = prod(x.shape[1:]) // groups
    by_group = (x.shape[0], groups, each)
    g = node.g
    if scale.shape[0] == x.shape[1]:
        g = (g * _per_channel(scale, x.rank)).reshape(by_group)
    else:
        g = g.reshape(by_group) * scale.reshape((1, groups, 1))
    epsilon = node.attribute("epsilon", 1e-5)
    node.give(0, _normalised(x.reshape(by_group), g, [2], epsilon).reshape(x.shape))


@rule("RMSNormalization")
def rms_normalization(node: Step) -> None:
    """y = x/r with r = √(mean(x²) + ε): (g − y·mean(g·y))/r."""
    x = node.x()
    axes = list(range(node.attribute("axis", -1) % x.rank, x.rank))
    r = ((x * x).mean(axes) + node.attribute("epsilon", 1e-5)).op("Sqrt")
    g, y = node.g * node.x(1), x / r
    node.give(0, (g - y * (g * y).mean(axes)) / r)


def _softmax_axes(node: Step) -> list[int]:
    """Up to opset 12 everything from the axis on is one distribution."""
    rank = node.y.rank
    if node.tape.opset < 13:
        return list(range(node.attribute("axis", 1) % rank, rank))
    return [node.attribute("axis", -1) % rank]


@rule("Softmax")
def softmax(node: Step) -> None:
    product = node.g * node.y
    node.give(0, product - node.y * product.sum(_softmax_axes(node)))


@rule("LogSoftmax")
def log_softmax(node: Step) -> None:
    node.give(0, node.g - node.y.op("Exp") * node.g.sum(_softmax_axes(node)))


@rule("LRN")
def local_response_normalization(node: Step) -> None:
    """y = x·s^(−β) with s = k + α/n · (sum of x² over n neighbouring channels):
    g·s^(−β) − 2·αβ/n · x·(sum over the neighbours of g·x·s^(−β−1))."""
    x, g, size = node.x(), node.g, node.attribute("size")
    alpha, beta = node.attribute("alpha", 1e-4) / size, node.attribute("beta", 0.75)
    channels = np.arange(x.shape[1])
    apart = channels[None, :] - channels[:, None]
    near = ((apart >= -((size - 1) // 2)) & (apart <= size // 2)).astype(np.float32)
    s = (x * x).along(1, near) * alpha + node.attribute("bias", 1.0)
    shared = (g * x * s ** (-beta - 1)).along(1, near.T)
    node.give(0, g * s**-beta - x * shared * (2 * alpha * beta))
