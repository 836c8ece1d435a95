"""Number the slots: every index along every axis of every tensor is one integer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from graphprune.shapes import Shape

SlotArray = NDArray[np.int64]
LARGEST_AXIS = 1 << 21  # an axis beyond this is treated as of unknown size, so pinned


@dataclass(frozen=True)
class Axis:
    """The slots along one axis of one tensor."""

    tensor: str
    index: int
    slots: SlotArray

    def __len__(self) -> int:
        return len(self.slots)

    def __str__(self) -> str:
        return f"{self.tensor}:{self.index}"


@dataclass(frozen=True)
class SlotTensor:
    """A tensor as a rule sees it: its axes, each an array of slots."""

    name: str
    axes: tuple[Axis, ...]

    @property
    def rank(self) -> int:
        return len(self.axes)

    @property
    def shape(self) -> Shape:
        return tuple(len(axis) for axis in self.axes)

    def __getitem__(self, index: int) -> Axis:
        return self.axes[index]

    def __iter__(self) -> Iterator[Axis]:
        return iter(self.axes)


@dataclass(frozen=True)
class Slots:
    """The numbering: tensor name → its slots (absent where the shape is unknown)."""

    tensors: dict[str, SlotTensor]
    total: int

    @property
    def axes(self) -> list[Axis]:
        return [axis for tensor in self.tensors.values() for axis in tensor.axes]


def number(shape: Mapping[str, Shape | None]) -> Slots:
    """Give every known axis of every tensor consecutive slots, in the order of ``shape``."""
    tensors: dict[str, SlotTensor] = {}
    start = 0
    for name, sizes in shape.items():
        if sizes is None or max(sizes, default=0) > LARGEST_AXIS:
            continue
        axes = []
        for index, size in enumerate(sizes):
            axes.append(Axis(name, index, np.arange(start, start + size, dtype=np.int64)))
            start += size
        tensors[name] = SlotTensor(name, tuple(axes))
    return Slots(tensors, start)
