"""Calibration inputs made up from the model alone: pictures, signals, token ids, masks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from graphprune.calibrate.pictures import KINDS
from graphprune.calibrate.preprocess import (
    OPEN_SIDE,
    PictureInput,
    Preprocess,
    completed,
    picture_inputs,
)
from graphprune.calibrate.ranges import BYTES, candidates, choose
from graphprune.calibrate.samples import Samples, batched_inputs
from graphprune.errors import ModelError, UsageError
from graphprune.model import Array, Model
from graphprune.runtime import index_bounds, input_dtype, run_session, session
from graphprune.shapes import Shape, Shapes

Draw = Callable[[int, np.random.Generator], Array]  # how many rows → rows

BLOCK = 16  # rows that one seed makes: any stretch of rows comes out the same, however it is read
KEPT_BLOCKS = 4  # of the last read
PROBES = 48  # rows that a range is judged by
PROBED_PIXELS = 2**20  # of all of them: fewer rows where pictures are large
OPEN_LENGTH = 32  # for lengths that the model leaves open and nobody gave
RECIPE = 1  # changes with what a seed gives: part of the key


def synthesise(
    model: Model,
    shapes: Shapes,
    count: int,
    seed: int,
    kind: str = "mixture",
    preprocess: Preprocess | None = None,
) -> Samples:
    """``count`` samples from ``seed``. Pictures are of ``kind`` (mixture, dead-leaves, crops, pink,
    white), their range as in ``preprocess``, else inferred from the model.

    Other floats are half Gaussian noise, half 1/f along the last axis; integers that index a table
    uniform ids, or 0 where it has two rows (types); other integers and booleans one (masks).
    Raises ``UsageError`` for an unknown kind or an input that nothing can be made up for.
    """
    if kind not in KINDS:
        raise UsageError(f"there is no kind of input {kind!r}", hint=f"Known are {', '.join(KINDS)}.")
    sized = opened_sizes(model, shapes)
    pictures = picture_inputs(model, sized)

    def attempt(option: Preprocess) -> Samples:
        return _drawn(model, sized, rows, seed, kind, {p.name: (p, option) for p in pictures})

    if not pictures:
        return _drawn(model, sized, count, seed, kind, {})
    rows = min(PROBES, max(BLOCK, PROBED_PIXELS // (pictures[0].height * pictures[0].width)))
    if preprocess is None and pictures[0].dtype.kind != "f":
        preprocess = BYTES
    if preprocess is None:
        preprocess, _ = choose(model, sized, candidates(pictures[0].channels), attempt)
    chosen = {p.name: (p, completed(preprocess, p)) for p in pictures}
    return _drawn(model, sized, count, seed, kind, chosen)


def opened_sizes(model: Model, shapes: Shapes) -> Shapes:
    """``shapes`` with input sizes that say something where the analysis took 1 for open axes.

    Pictures get sides of 224, other open axes but the batch 32; where the model does not run on
    those, the sizes stay as they are.
    """
    pictures = {p.name: p for p in picture_inputs(model, shapes)}
    wider = {
        name: _widened(shape, shapes.symbolic.get(name, ()), name in pictures)
        for name, shape in shapes.inputs.items()
    }
    if wider == shapes.inputs:
        return shapes
    larger = replace(shapes, inputs=wider)
    draws = {value.name: _drawing(value, model, larger, "white", {}) for value in model.inputs}
    try:
        run_session(session(model), _rows(draws, model, larger, 1, np.random.default_rng(0)))
    except ModelError:  # the model's sizes depend on one another
        return shapes
    return larger


@dataclass(frozen=True)
class _Signal:
    """Rows of floats: even ones Gaussian, odd ones with a spectrum of 1/f along the last axis."""

    shape: Shape
    dtype: np.dtype[Any]

    def __call__(self, count: int, rng: np.random.Generator) -> Array:
        rows = rng.standard_normal((count, *self.shape), dtype=np.float32)
        if not self.shape or self.shape[-1] < 3:
            return np.asarray(rows.astype(self.dtype))
        length = self.shape[-1]
        frequency = np.fft.rfftfreq(length)
        frequency[0] = frequency[1]
        pink = np.fft.irfft(np.fft.rfft(rows[1::2]) / np.sqrt(frequency), n=length)
        axes = tuple(range(1, pink.ndim))
        rows[1::2] = pink / (pink.std(axis=axes, keepdims=True) + 1e-9)
        return np.asarray(rows.astype(self.dtype))
