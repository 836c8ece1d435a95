"""Calibration inputs that are read in pieces, and the batches in which a model takes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx

from graphprune.model import Array, Model
from graphprune.runtime import Feeds
from graphprune.sizes import declared

HELD_OUT = 5  # of so many chunks one judges what was learnt from the others


@dataclass(frozen=True)
class Samples:
    """Calibration inputs, read in pieces so that they are never all in memory at once."""

    count: int  # samples: rows along axis 0
    source: str  # one line for people: "512 rows of calib.npz"
    key: str  # sha256 hex of content, preprocessing and seed: names the cache
    read: Callable[[int, int], dict[str, Array]]  # rows start..stop (exclusive) by graph input
    notes: tuple[str, ...] = ()  # what to say of them


def batched_inputs(model: Model) -> frozenset[str]:
    """Graph inputs whose axis 0 counts samples; the others are fed whole.

    The first input of rank 2 or more decides (of rank 1 where there is none): another is batched
    if it declares the same first size, or leaves it open too.
    """
    ranked = [value for value in model.inputs if declared(value) != []]
    if not ranked:
        return frozenset()
    tables = [value for value in ranked if len(declared(value) or (None, None)) > 1]
    batch = _first_size((tables or ranked)[0])
    return frozenset(value.name for value in ranked if _first_size(value) == batch)


def rows_per_run(model: Model) -> int | None:
    """Rows that one run must take: the declared batch; ``None`` where any number will do.

    An input that is fed whole but leaves a size open, or whose second axis is 1 (a recurrent state
    is [layers, batch, width]), may hold the batch there: then one row at a time is the only size
    that is always right.
    """
    batched = batched_inputs(model)
    for value in model.inputs:
        sizes = declared(value) or []
        if value.name not in batched and (None in sizes or (len(sizes) == 3 and sizes[1] == 1)):
            return 1
    first = next((value for value in model.inputs if value.name in batched), None)
    return None if first is None else _first_size(first)


@dataclass(frozen=True)
class Chunked(Sequence[Feeds]):
    """Samples as a sequence of feeds of ``size`` rows; each is read when it is asked for."""

    samples: Samples
    model: Model
    size: int

    def __len__(self) -> int:
        fixed = rows_per_run(self.model)
        if fixed is None:
            return math.ceil(self.samples.count / self.size)
        return max(self.samples.count // fixed, min(self.samples.count, 1))

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        step = rows_per_run(self.model) or self.size
        part = rows_of(self.samples, index * step, (index + 1) * step)
        return next(batches(part, self.model, step))


@dataclass(frozen=True)
class Picked(Sequence[Feeds]):
    """Some of a sequence of feeds, by their places in it."""

    whole: Sequence[Feeds]
    places: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        return self.whole[self.places[index]]


def rows_of(samples: Samples, start: int, stop: int) -> Samples:
    """The rows from ``start`` to ``stop`` (exclusive) alone."""
    last = min(stop, samples.count)
    return replace(
        samples, count=last - start, read=lambda a, b: samples.read(start + a, min(start + b, last))
    )


def split(feeds: Sequence[Feeds]) -> tuple[Picked, Picked]:
    """Chunks to learn from, and every fifth to judge by: few samples fit anything."""
    places = range(len(feeds))
    held = tuple(i for i in places if i % HELD_OUT == HELD_OUT - 1)
    return Picked(feeds, tuple(i for i in places if i not in held)), Picked(feeds, held)


def batches(samples: Samples, model: Model, size: int) -> Iterator[dict[str, Array]]:
    """All samples in feeds of ``size`` rows, or of as many as the model declares.

    Where the model declares its batch, an incomplete last one is left out, unless it is the only
    one: then its rows are repeated.
    """
    fixed = rows_per_run(model)
    step = fixed or size
    whole = samples.count // step * step if fixed else samples.count
    for start in range(0, whole, step):
        yield samples.read(start, min(start + step, samples.count))
    if whole or not samples.count:
        return
    batched = batched_inputs(model)
    few = samples.read(0, samples.count)
    yield {
        name: np.resize(rows, (step, *rows.shape[1:])) if name in batched else rows
        for name, rows in few.items()
    }


def _first_size(value: onnx.ValueInfoProto) -> int | None:
    dims = declared(value)
    return dims[0] if dims else None
