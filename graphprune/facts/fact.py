"""What is known of a tensor before it runs: bounds of its elements, and which slices are equal."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Kinds = NDArray[np.uint64]
Shape = tuple[int, ...]
LIMIT = 1 << 17  # elements that a fact has at most; coarser ones are as true


@dataclass(frozen=True)
class Fact:
    """Bounds and kinds of a tensor's elements, in arrays of its rank whose axes are its own or of
    length 1, where the same is true all along.

    Slices (over the axes of length 1) of one ``kind`` are equal; ``None`` where nothing is known.
    ``mean``: along the last axis elements are at least 0 and add up to 1.
    """

    low: Floats
    high: Floats
    kind: Kinds | None = None
    mean: bool = False

    @property
    def without_bounds(self) -> Fact:
        """What is left where the numbers mean nothing."""
        return Fact(np.full_like(self.low, -np.inf), np.full_like(self.high, np.inf), self.kind)

    def fits(self, shape: Shape) -> bool:
        """Whether every axis is the tensor's own or of length 1."""
        arrays = [array for array in (self.low, self.high, self.kind) if array is not None]
        return all(
            a.ndim == len(shape) and all(n in (1, m) for n, m in zip(a.shape, shape, strict=True))
            for a in arrays
        )

    @property
    def known(self) -> NDArray[np.bool_]:
        """Where the bounds meet: the value itself is known."""
        return np.asarray((self.low == self.high) & np.isfinite(self.low))


@dataclass(frozen=True)
class Line:
    """A fact along one axis: arrays [size]."""

    low: Floats
    high: Floats
    kind: Kinds | None

    @property
    def known(self) -> NDArray[np.bool_]:
        return np.asarray((self.low == self.high) & np.isfinite(self.low))

    @property
    def value(self) -> Floats:
        """The value where it is known, else NaN."""
        return np.where(self.known, self.low, np.nan)


def unknown(rank: int) -> Fact:
    """Nothing is known of a tensor of this rank."""
    one = (1,) * rank
    return Fact(np.full(one, -np.inf), np.full(one, np.inf))


def between(low: float, high: float, rank: int) -> Fact:
    return Fact(np.full((1,) * rank, low), np.full((1,) * rank, high))


def exactly(array: NDArray[Any]) -> Fact:
    """A constant; of a large one its leading axes are summed up as bounds and kinds."""
    if array.size <= LIMIT:
        value = array.astype(np.float64) + 0.0
        fact = Fact(value, value, bits(value))
        return fact if np.isfinite(value).all() else replace(unknown(value.ndim), kind=fact.kind)
    axes = _leading(array.shape)
    low, high = (f(axis=axes, keepdims=True).astype(np.float64) for f in (array.min, array.max))
    return (
        Fact(low, high)
        if np.isfinite(low).all() and np.isfinite(high).all()
        else unknown(array.ndim)
    )


def coarse(fact: Fact) -> Fact:
    """The fact in arrays of at most ``LIMIT`` elements."""
    low, high, kind = fact.low, fact.high, fact.kind
    if low.size > LIMIT:
        low = low.min(axis=_leading(low.shape), keepdims=True)
    if high.size > LIMIT:
        high = high.max(axis=_leading(high.shape), keepdims=True)
    if kind is not None and kind.size > LIMIT:
        kind = _summed(kind, _leading(kind.shape))
    return Fact(low, high, kind, fact.mean)


def _leading(shape: Sequence[int]) -> tuple[int, ...]:
    """The first axes, without which no more than ``LIMIT`` elements are left."""
    count = next((i for i in range(len(shape)) if math.prod(shape[i:]) <= LIMIT), len(shape))
    return tuple(range(count))


def ranked(fact: Fact, rank: int) -> Fact:
    """The bounds with more axes in front."""
    low, high = (a.reshape((1,) * (rank - a.ndim) + a.shape) for a in (fact.low, fact.high))
    return Fact(low, high)


def collapsed(fact: Fact, axes: Sequence[int]) -> Fact:
    """What is true all along these axes."""
    axes = tuple(axes)
    low, high = fact.low.min(axis=axes, keepdims=True), fact.high.max(axis=axes, keepdims=True)
    return Fact(low, high, None if fact.kind is None else _summed(fact.kind, axes))


def along(fact: Fact, axis: int, size: int) -> Line:
    """The fact for each slot of one axis of ``size``."""
    other = [i for i in range(fact.low.ndim) if i != axis]
    whole = collapsed(fact, other)
    kind = None if whole.kind is None else whole.kind.reshape(-1)
    low, high = (np.broadcast_to(a.reshape(-1), (size,)) for a in (whole.low, whole.high))
    return Line(low, high, kind if kind is not None and len(kind) == size else None)


# --- kinds ---


def word(*parts: object) -> Kinds:
    """A number for a text, the same in every run."""
    text = "|".join(map(str, parts)).encode()
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return np.frombuffer(digest, np.uint64).reshape(())


def bits(values: Floats) -> Kinds:
    """Equal numbers for equal values."""
    return np.asarray(values + 0.0, order="C").view(np.uint64).reshape(values.shape)


def mixed(*parts: Any) -> Kinds:
    """One number for several, in their order; arrays broadcast."""
    result: Kinds = np.array(0x9E3779B97F4A7C15, np.uint64)
    with np.errstate(over="ignore"):
        for part in parts:
            h = np.asarray(result) ^ np.asarray(part, np.uint64)
            h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            result = np.asarray((h ^ (h >> np.uint64(31))) + np.uint64(0x9E3779B97F4A7C15))
    return result


def _positions(shape: Shape, axis: int) -> Kinds:
    numbers = np.arange(shape[axis], dtype=np.uint64)
    return numbers.reshape([-1 if i == axis else 1 for i in range(len(shape))])


def _summed(kind: Kinds, axes: Sequence[int]) -> Kinds:
    """One number for all that stands along these axes."""
    for axis in axes:
        if kind.shape[axis] > 1:
            parts = mixed(kind, _positions(kind.shape, axis))
            kind = parts.sum(axis=axis, keepdims=True, dtype=np.uint64)
    return kind


def spread(kind: Kinds, real: Shape, to: Shape) -> Kinds:
    """Kinds along further axes: where a slice of a tensor of shape ``real`` is cut into positions,
    each is of a kind of its own; where it is repeated, it stays the same."""
    for axis, size in enumerate(to):
        if size > 1 and kind.shape[axis] == 1 and real[axis] > 1:
            kind = mixed(kind, _positions(to, axis))
    return np.broadcast_to(kind, to)


def joined(name: Kinds, facts: Sequence[Fact], shapes: Sequence[Shape], rank: int) -> Kinds | None:
    """Kinds of what is computed element by element from broadcast inputs."""
    kinds, real = [], []
    for fact, shape in zip(facts, shapes, strict=True):
        if fact.kind is None:
            return None
        more = (1,) * (rank - len(shape))
        kinds.append(fact.kind.reshape(more + fact.kind.shape))
        real.append(more + tuple(shape))
    to = np.broadcast_shapes(*(kind.shape for kind in kinds))
    if math.prod(to) > LIMIT:
        return None
    return mixed(name, *(spread(kind, shape, to) for kind, shape in zip(kinds, real, strict=True)))


# --- other shapes of the same elements ---


def regrouped(fact: Fact, x: Shape, y: Shape, name: Kinds) -> Fact | None:
    """The fact of the same row-major sequence of shape ``y`` instead of ``x``."""
    blocks = _blocks(x, y)
    if blocks is None:
        return None
    low, high = (_reshaped(a, x, y, blocks, False) for a in (fact.low, fact.high))
    kind = None if fact.kind is None else _reshaped(fact.kind, x, y, blocks, True)
    if low is None or high is None:
        return None
    last = bool(x) and bool(y) and blocks[-1][0] == [len(x) - 1] and blocks[-1][1] == [len(y) - 1]
    return Fact(low, high, None if kind is None else mixed(kind, name), fact.mean and last)


def _blocks(x: Shape, y: Shape) -> list[tuple[list[int], list[int]]] | None:
    """Runs of axes of both shapes that hold the same elements."""
    if 0 in x or math.prod(x) != math.prod(y):
        return None
    found: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(x) and j < len(y):
        mine, yours = [i], [j]
        a, b = x[i], y[j]
        while a != b:
            if a < b:
                i += 1
                mine.append(i)
                a *= x[i]
            else:
                j += 1
                yours.append(j)
                b *= y[j]
        found.append((mine, yours))
        i, j = i + 1, j + 1
    rest = list(range(i, len(x))), list(range(j, len(y)))
    return [*found, rest] if any(rest) else found


def _reshaped(
    array: Any, x: Shape, y: Shape, blocks: list[tuple[list[int], list[int]]], kinds: bool
) -> Any:
    whole, target = [1] * len(x), [1] * len(y)
    for mine, yours in blocks:
        if any(array.shape[i] > 1 for i in mine):
            for i in mine:
                whole[i] = x[i]
            for j in yours:
                target[j] = y[j]
    if math.prod(whole) > LIMIT:
        return None
    to = tuple(whole)
    array = spread(array, x, to) if kinds else np.broadcast_to(array, to)
    return array.reshape(target)
