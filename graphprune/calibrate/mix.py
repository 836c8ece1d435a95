"""More pictures from those made up: parts of one in another, all of them shifted."""

from __future__ import annotations

import numpy as np

from graphprune.model import Array

SHIFT = 8  # pictures move by this fraction of a side at most
SMALLEST = 8  # sides of the smallest part, likewise


def mixed(pictures: Array, layout: str, rng: np.random.Generator) -> Array:
    """Each picture with a rectangle of another one (CutMix, Yun et al., arXiv 1905.04899, without
    labels), and all rolled by the same few pixels. ``pictures`` are [n, …] in ``layout``."""
    height, width = (2, 3) if layout == "nchw" else (1, 2)
    sides = pictures.shape[height], pictures.shape[width]
    made = pictures.copy()
    for row, other in enumerate(rng.permutation(len(pictures))):
        place: list[slice | int] = [slice(None)] * (pictures.ndim - 1)
        for axis, side in zip((height, width), sides, strict=True):
            length = int(rng.integers(max(1, side // SMALLEST), max(2, side)))
            start = int(rng.integers(0, side - length + 1))
            place[axis - 1] = slice(start, start + length)
        made[(row, *place)] = pictures[(int(other), *place)]
    moves = [int(rng.integers(-(side // SHIFT), side // SHIFT + 1)) for side in sides]
    return np.roll(made, moves, (height, width))
