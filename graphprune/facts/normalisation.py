"""Bounds through normalisations and softmax."""

from __future__ import annotations

import numpy as np

from graphprune.batch_norm import EPSILON
from graphprune.facts.fact import Fact, Floats, between, bits, mixed
from graphprune.facts.seen import Seen, Table

table = Table()


@table.rule("BatchNormalization")
def batch_normalization(seen: Seen) -> list[Fact | None]:
    """A factor and an offset for each channel."""
    if seen.attr("training_mode", 0) or not all(seen.fixed(i) for i in range(1, 5)):
        return [None]
    scale, shift, mean, variance = (seen.weight(i).astype(np.float64) for i in range(1, 5))
    x = seen.fact(0)
    to = [1] * x.low.ndim
    to[min(1, len(to) - 1)] = -1
    factor = scale / np.sqrt(variance + seen.attr("epsilon", EPSILON))
    offset = shift - mean * factor
    ends = [_times(end, factor.reshape(to)) + offset.reshape(to) for end in (x.low, x.high)]
    low, high = np.minimum(*ends), np.maximum(*ends)
    kind = None
    if x.kind is not None:
        kind = mixed(seen.function, x.kind, bits(factor.reshape(to)), bits(offset.reshape(to)))
    return [Fact(low, high, kind)]


def _times(end: Floats, factor: Floats) -> Floats:
    """Zero times anything is zero."""
    with np.errstate(invalid="ignore"):
        product = end * factor
    return np.where(factor == 0, 0.0, product)


@table.rule("LayerNormalization", "InstanceNormalization")
def normalisation(seen: Seen) -> list[Fact | None]:
    """Where its scale is zero only its bias is left."""
    x, rank = seen.fact(0), len(seen.shape(0))
    others: list[Fact | None] = [None] * (len(seen.node.output) - 1)
    if not seen.fixed(1) or (seen.has(2) and not seen.fixed(2)):
        return [None, *others]
    scale = seen.weight(1).astype(np.float64)
    shift = seen.weight(2).astype(np.float64) if seen.has(2) else np.zeros(scale.shape)
    if seen.node.op_type == "InstanceNormalization":
        to = [1] * rank
        to[1] = -1
        scale, shift = scale.reshape(to), shift.reshape(to)
    blank = np.full((1,) * x.low.ndim, np.inf)
    low, high = np.where(scale == 0, shift, -blank), np.where(scale == 0, shift, blank)
    return [Fact(low, high), *others]


@table.rule("Softmax")
def softmax(seen: Seen) -> list[Fact | None]:
    rank = len(seen.shape(0))
    axis = seen.attr("axis", -1 if seen.version >= 13 else 1) % rank
    shares = between(0.0, 1.0, rank)
    return [Fact(shares.low, shares.high, None, axis == rank - 1)]
