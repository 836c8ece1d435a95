"""Bounds through operators that move elements, or take the largest or the mean of some."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from graphprune.facts.fact import (
    Fact,
    Shape,
    bits,
    coarse,
    collapsed,
    exactly,
    mixed,
    regrouped,
    spread,
)
from graphprune.facts.seen import Seen, Table

table = Table()


def _moved(fact: Fact, move: Callable[[Any], Any], name: Any) -> Fact:
    """``move`` applied to every array of a fact; slices are then of kinds of their own."""
    kind = None if fact.kind is None else move(mixed(fact.kind, name))
    return Fact(move(fact.low), move(fact.high), kind)


@table.rule("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def regroup(seen: Seen) -> list[Fact | None]:
    return [regrouped(seen.fact(0), seen.shape(0), seen.result(), seen.name)]


@table.rule("Transpose")
def transpose(seen: Seen) -> list[Fact | None]:
    order = seen.attr("perm") or range(len(seen.shape(0)))[::-1]
    return [_moved(seen.fact(0), lambda a: a.transpose(order), seen.name)]


@table.rule("Concat")
def concat(seen: Seen) -> list[Fact | None]:
    """Along its axis one after the other; elsewhere what is true of each at its places."""
    axis = seen.attr("axis", 1) % len(seen.result())
    facts = [coarse(seen.fact(i)) for i in range(len(seen.x))]
    shapes = [seen.shape(i) for i in range(len(facts))]
    lows = _side_by_side([f.low for f in facts], shapes, axis, False)
    highs = _side_by_side([f.high for f in facts], shapes, axis, False)
    kinds = [f.kind for f in facts]
    kind = None if any(k is None for k in kinds) else _side_by_side(kinds, shapes, axis, True)
    return [coarse(Fact(lows, highs, kind))]


def _side_by_side(arrays: list[Any], shapes: list[Shape], axis: int, kinds: bool) -> Any:
    sizes = [max(a.shape[i] for a in arrays) for i in range(arrays[0].ndim)]
    parts = []
    for array, shape in zip(arrays, shapes, strict=True):
        to = tuple(shape[i] if i == axis else size for i, size in enumerate(sizes))
        parts.append(spread(array, shape, to) if kinds else np.broadcast_to(array, to))
    return np.concatenate(parts, axis=axis)


@table.rule("Split")
def split(seen: Seen) -> list[Fact | None]:
    axis = seen.attr("axis", 0) % len(seen.shape(0))
    x, start = seen.fact(0), 0
    found: list[Fact | None] = []
    for i in range(len(seen.node.output)):
        size = seen.result(i)[axis]
        found.append(_taken(x, axis, np.arange(start, start + size), mixed(seen.name, i)))
        start += size
    return found


def _taken(x: Fact, axis: int, places: Any, name: Any) -> Fact:
    """Some positions of an axis; of a slice that has them all some are another one."""

    def take(array: Any) -> Any:
        return array if array.shape[axis] == 1 else np.take(array, places, axis=axis)

    kind = x.kind
    if kind is not None and kind.shape[axis] == 1:
        kind = mixed(kind, name)
    return Fact(take(x.low), take(x.high), None if kind is None else take(kind))


@table.rule("Slice")
def slice_(seen: Seen) -> list[Fact | None]:
    x, shape = seen.fact(0), seen.shape(0)
    starts, ends = seen.list_of("starts", 1), seen.list_of("ends", 2)
    axes = seen.list_of("axes", 3) or list(range(len(starts or ())))
    steps = seen.list_of("steps", 4) or [1] * len(starts or ())
    if starts is None or ends is None:
        return [collapsed(x, range(len(shape)))]
    for i, axis in enumerate(axes):
        size, step = shape[axis], steps[i]
        low = ends[i] + size if ends[i] < 0 else ends[i]
        stop = None if step < 0 and low < 0 else ends[i]
        places = np.arange(size)[slice(starts[i], stop, step)]
        x = _taken(x, axis % len(shape), places, mixed(seen.name, i))
    return [x]


@table.rule("Gather")
def gather(seen: Seen) -> list[Fact | None]:
    """Rows of a table, or known positions of an axis."""
    x = seen.fact(0)
    if seen.fixed(0) and seen.x[0] is None:
        x = exactly(seen.weight(0))
    axis = seen.attr("axis", 0) % len(seen.shape(0))
    value, indices = seen.value(1), seen.shape(1)
    if value is not None and len(indices) <= 1:
        places = value.reshape(-1).astype(np.int64)
        x = _taken(x, axis, places, mixed(seen.name, bits(places.astype(np.float64)).sum()))
        if not indices:
            x = _moved(x, lambda a: a.take(0, axis=axis), seen.name)
        return [x]
    x = collapsed(x, [axis])
    rank = len(indices)

    def widened(array: Any) -> Any:
        return array.reshape(array.shape[:axis] + (1,) * rank + array.shape[axis + 1 :])

    return [Fact(widened(x.low), widened(x.high))]


@table.rule("Expand")
def expand(seen: Seen) -> list[Fact | None]:
    x, more = seen.fact(0), len(seen.result()) - len(seen.shape(0))
    return [_moved(x, lambda a: a.reshape((1,) * more + a.shape), seen.name)]


@table.rule("Tile")
def tile(seen: Seen) -> list[Fact | None]:
    axes = [i for i, (a, b) in enumerate(zip(seen.shape(0), seen.result(), strict=True)) if a != b]
    x = collapsed(seen.fact(0), axes)
    return [Fact(x.low, x.high)]


@table.rule("Pad")
def pad(seen: Seen) -> list[Fact | None]:
    """A number around it; along padded axes what is true of both."""
    x, pads = seen.fact(0), seen.list_of("pads", 1)
    rank = len(seen.shape(0))
    axes = [a % rank for a in seen.list_of("axes", 3) or range(rank)]
    if seen.attr("mode", "constant") != "constant" or pads is None:
        x = collapsed(x, range(rank))
        return [Fact(x.low, x.high)]
    value = float(seen.attr("value", 0.0))
    if seen.has(2):
        given = seen.weight(2) if seen.fixed(2) else None
        if given is None:
            return [None]
        value = float(given.reshape(-1)[0]) if given.size else 0.0
    for i, axis in enumerate(axes):
        before, after = pads[i], pads[len(axes) + i]
        if before == after == 0:
            continue
        along = x.low.shape[axis] > 1 and before >= 0 and after >= 0
        x = _padded(x, axis, before, after, value) if along else _hull(x, axis, value)
    return [coarse(Fact(x.low, x.high))]


def _padded(x: Fact, axis: int, before: int, after: int, value: float) -> Fact:
    widths = [(before, after) if i == axis else (0, 0) for i in range(x.low.ndim)]
    if x.high.shape[axis] != x.low.shape[axis]:
        return _hull(x, axis, value)
    low, high = (np.pad(a, widths, constant_values=value) for a in (x.low, x.high))
    return Fact(low, high)


def _hull(x: Fact, axis: int, value: float) -> Fact:
    x = collapsed(x, [axis])
    return Fact(np.minimum(x.low, value), np.maximum(x.high, value))


@table.rule("MaxPool", "GlobalMaxPool", "GlobalAveragePool", "AveragePool", "Resize", "Upsample")
def window(seen: Seen) -> list[Fact | None]:
    """What is true all over the places of a window."""
    name, rank = seen.node.op_type, len(seen.shape(0))
    axes = list(range(2, rank))
    if name in ("Resize", "Upsample"):
        if seen.attr("mode", "nearest") not in ("nearest", "linear"):
            return [None]
        if seen.attr("coordinate_transformation_mode", "") == "tf_crop_and_resize":
            return [None]
        axes = [i for i in range(rank) if seen.shape(0)[i] != seen.result()[i]]
        axes = sorted({*axes, *range(2, rank)})
    x = collapsed(seen.fact(0), axes)
    counted = seen.attr("count_include_pad", 0) and _padding(seen)
    if name == "AveragePool" and counted:
        x = Fact(np.minimum(x.low, 0), np.maximum(x.high, 0), x.kind)
    kind = None if x.kind is None else mixed(x.kind, seen.name)
    others: list[Fact | None] = [None] * (len(seen.node.output) - 1)
    return [Fact(x.low, x.high, kind), *others]


def _padding(seen: Seen) -> bool:
    same = seen.attr("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    return same or bool(seen.attr("ceil_mode", 0)) or any(seen.attr("pads", []) or [])


@table.rule("ReduceMean", "ReduceMax", "ReduceMin", "ReduceSum")
def reduce(seen: Seen) -> list[Fact | None]:
    """A mean or an extreme lies between the bounds; so does a sum of zeros."""
    x, rank = seen.fact(0), len(seen.shape(0))
    axes = seen.list_of("axes", 1)
    if seen.has(1) and axes is None:
        return [None]
    if not axes:
        axes = [] if seen.attr("noop_with_empty_axes", 0) else list(range(rank))
    axes = sorted({axis % rank for axis in axes})
    x = collapsed(x, axes)
    if seen.node.op_type == "ReduceSum" and axes:
        zero = (x.low == 0) & (x.high == 0)
        x = Fact(np.where(zero, 0.0, -np.inf), np.where(zero, 0.0, np.inf), x.kind)
    kept = [i for i in range(rank) if i not in axes]

    def squeezed(array: Any) -> Any:
        if seen.attr("keepdims", 1):
            return array
        return array.reshape([array.shape[i] for i in kept])

    return [_moved(x, squeezed, seen.name)]
