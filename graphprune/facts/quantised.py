"""Bounds through quantisers: integers stand for numbers between those that they are made of."""

from __future__ import annotations

import numpy as np

from graphprune.facts.fact import Fact, Floats, joined
from graphprune.facts.seen import Seen, Table

table = Table()
DOUBT = 1e-4  # of a step: where arithmetic of 32 bits may round otherwise


@table.rule("QuantizeLinear")
def quantise(seen: Seen) -> list[Fact | None]:
    """``x / scale`` to the nearest integer, plus the zero point, within the integer's range."""
    scale, zero = _parameter(seen, 1), _parameter(seen, 2)
    if scale is None or zero is None or (scale <= 0).any():
        return [None]
    kind = seen.weight(2).dtype if seen.has(2) else np.dtype(np.uint8)
    if kind.kind not in "iu" or (not seen.has(2) and seen.attr("output_dtype", 0)):
        return [None]
    ends = np.iinfo(kind)
    x = seen.fact(0)
    low, high = (
        np.clip(np.rint(bound / scale + side * _doubt(bound / scale)) + zero, ends.min, ends.max)
        for bound, side in ((x.low, -1), (x.high, 1))
    )
    return [Fact(low, high, _kind(seen))]


@table.rule("DequantizeLinear")
def dequantise(seen: Seen) -> list[Fact | None]:
    """``(x - zero point) * scale``."""
    scale, zero = _parameter(seen, 1), _parameter(seen, 2)
    if scale is None or zero is None or (scale < 0).any():
        return [None]
    x = seen.fact(0)
    low, high = ((bound - zero) * scale for bound in (x.low, x.high))
    return [Fact(low, high, _kind(seen))]


def _doubt(steps: Floats) -> Floats:
    return DOUBT * np.maximum(1.0, np.where(np.isfinite(steps), np.abs(steps), 0.0))


def _parameter(seen: Seen, index: int) -> Floats | None:
    """A scale or zero point as it is broadcast to the input; ``None`` where it is computed, or one
    for each block."""
    rank = len(seen.shape(0))
    if not seen.has(index):
        return np.zeros((1,) * rank)
    if not seen.fixed(index) or seen.attr("block_size", 0):
        return None
    value = seen.weight(index)
    if value.dtype.kind not in "iuf" or value.ndim > 1:
        return None
    shape = [1] * rank
    if value.size > 1:
        shape[seen.attr("axis", 1) % rank] = value.size
    elif not rank:
        return value.astype(np.float64).reshape(())
    return np.asarray(value, np.float64).reshape(shape)


def _kind(seen: Seen) -> np.ndarray[tuple[int, ...], np.dtype[np.uint64]] | None:
    """Equal slices are equal afterwards, where they have one scale and zero point."""
    x, rank = seen.fact(0), len(seen.shape(0))
    if x.kind is None or any(seen.has(i) and seen.weight(i).size > 1 for i in (1, 2)):
        return None
    return joined(seen.name, [x], [seen.shape(0)], rank)
