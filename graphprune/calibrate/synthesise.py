"""Calibration inputs made up from the model alone: pictures, signals, token ids, masks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import onnx
from numpy.typing import NDArray

from graphprune.calibrate.pictures import KINDS
from graphprune.calibrate.preprocess import (
    PictureInput,
    Preprocess,
    check_channels,
    completed,
    picture_input,
    picture_inputs,
)
from graphprune.calibrate.ranges import infer_range
from graphprune.calibrate.samples import Samples, batched_inputs
from graphprune.errors import ModelError, UsageError
from graphprune.lookups import index_bounds
from graphprune.model import Array, Model
from graphprune.runtime import asked_for, input_dtype, run_session, session
from graphprune.shapes import Shape, Shapes
from graphprune.sizes import axis_names, batch_names

Draw = Callable[[int, np.random.Generator], Array]  # how many rows → rows

BLOCK = 16  # rows that one seed makes: any stretch of rows comes out the same, however it is read
KEPT_BLOCKS = 4  # of the last read
SHORTEST_SIGNAL = 8  # values: less has no spectrum to speak of
# Tried in turn for sizes that the model leaves open and nobody gave: sides of pictures, and others.
OPEN_SIZES = ((224, 32), (256, 64), (320, 128), (640, 512), (128, 256), (64, 16), (48, 8), (32, 4))
RECIPE = 2  # changes with what a seed gives: part of the key


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

    Other floats are half Gaussian noise, half 1/f along the last axis; numbers that index a table
    uniform ids, or 0 where it has two rows (types); other integers what they are compared with,
    else one, as booleans (masks).
    Raises ``UsageError`` for an unknown kind, a ``preprocess`` that does not fit, or an input that
    nothing can be made up for.
    """
    if kind not in KINDS:
        raise UsageError(
            f"there is no kind of input {kind!r}", hint=f"Known are {', '.join(KINDS)}."
        )
    sized = opened_sizes(model, shapes)
    pictures = picture_inputs(model, sized)
    if preprocess is not None:
        pictures = _described(preprocess, model, sized, pictures)

    def drawn(option: Preprocess, rows: int) -> Samples:
        ranges = {p.name: (p, completed(option, p)) for p in pictures}
        return _drawn(model, sized, rows, seed, kind, ranges)

    if preprocess is None and pictures:
        preprocess = infer_range(model, sized, pictures[0], drawn)
    return drawn(preprocess or Preprocess(), count)


def _described(
    preprocess: Preprocess, model: Model, sized: Shapes, pictures: Sequence[PictureInput]
) -> list[PictureInput]:
    """The model's pictures as the user describes them; raises ``UsageError`` where that cannot
    be."""
    if len(model.inputs) == 1:
        return [picture_input(model, sized, preprocess)]
    if not pictures:
        raise UsageError(
            "--preprocess describes pictures, and the model takes none", hint="Leave it out."
        )
    for to in pictures:
        check_channels(preprocess, to)
    return list(pictures)


def opened_sizes(model: Model, shapes: Shapes) -> Shapes:
    """``shapes`` with input sizes that say something where the analysis had to assume some.

    Pictures get sides of 224, other open axes but the batch 32, or the next of a short list on
    which the model runs; where there is none the sizes stay as they are.
    """
    decided = replace(shapes, assumed=frozenset())
    if _opened(model, shapes, *OPEN_SIZES[0]).inputs == shapes.inputs:
        return decided
    runner = session(model)
    for side, length in OPEN_SIZES:
        larger = _opened(model, shapes, side, length)
        try:
            run_session(runner, _drawn(model, larger, 1, 0, "white", {}).read(0, 1))
        except ModelError:  # not a size for this model
            continue
        return replace(decided, inputs=larger.inputs)
    return decided


def _opened(model: Model, shapes: Shapes, side: int, length: int) -> Shapes:
    """The same with other sizes on open axes that nobody gave and that are not the batch."""
    pictures = {p.name for p in picture_inputs(model, shapes, side)}
    batch = batch_names(model)
    inputs = {}
    for value in model.inputs:
        sizes = list(shapes.inputs[value.name])
        for axis in shapes.symbolic.get(value.name, ()):
            if value.name in shapes.assumed and axis and axis_names(value)[axis] not in batch:
                sizes[axis] = side if value.name in pictures else length
        inputs[value.name] = tuple(sizes)
    return replace(shapes, inputs=inputs)


def _drawn(
    model: Model,
    shapes: Shapes,
    count: int,
    seed: int,
    kind: str,
    pictures: Mapping[str, tuple[PictureInput, Preprocess]],
) -> Samples:
    """Samples of inputs whose sizes and ranges are decided; made in blocks, when they are read."""
    draws = {v.name: _drawing(v, model, shapes, kind, pictures) for v in model.inputs}
    batched = batched_inputs(model)

    @lru_cache(KEPT_BLOCKS)
    def block(index: int) -> dict[str, Array]:
        rng = np.random.default_rng([seed, 1 + index])
        return {name: draw(BLOCK, rng) for name, draw in draws.items() if name in batched}

    rng = np.random.default_rng([seed, 0])
    whole = {name: draw(1, rng)[0] for name, draw in draws.items() if name not in batched}

    def read(start: int, stop: int) -> dict[str, Array]:
        first, last = start // BLOCK, max(start, min(stop, count) - 1) // BLOCK
        blocks = [block(i) for i in range(first, last + 1)]
        rows = slice(start - first * BLOCK, min(stop, count) - first * BLOCK)
        joined = {name: np.concatenate([b[name] for b in blocks])[rows] for name in blocks[0]}
        return {**joined, **whole}

    ranges = {name: (to, option.document()) for name, (to, option) in pictures.items()}
    recipe = repr((RECIPE, kind, count, seed, shapes.inputs, ranges))
    return Samples(
        count, _source(count, kind, pictures), hashlib.sha256(recipe.encode()).hexdigest(), read
    )


def _source(count: int, kind: str, pictures: Mapping[str, tuple[PictureInput, Preprocess]]) -> str:
    options = list(dict.fromkeys(str(option) for _, option in pictures.values()))
    if not options:
        return f"synthesised: signals and ids, {count}"
    words = "dead leaves + photographs" if kind == "mixture" else kind.replace("-", " ")
    return f"synthesised: {words}, {count}, as {' and '.join(options)}"


def _drawing(
    value: onnx.ValueInfoProto,
    model: Model,
    shapes: Shapes,
    kind: str,
    pictures: Mapping[str, tuple[PictureInput, Preprocess]],
) -> Draw:
    """How the rows of an input are made; all of an input that is fed whole counts as one row."""
    name, dtype = value.name, input_dtype(value)
    if name in pictures:
        to, option = pictures[name]
        paint = KINDS[kind]
        return lambda n, rng: option.encode(paint(n, to.channels, to.height, to.width, rng), to)
    shape = shapes.inputs[name][name in batched_inputs(model) :]
    bounds = index_bounds(model, shapes, name) if dtype.kind in "iuf" else []
    rows = min(bounds, default=0)
    if rows > 2:
        return lambda n, rng: rng.integers(0, rows, (n, *shape)).astype(dtype)
    if dtype.kind == "f" or dtype.name == "bfloat16":
        return lambda n, rng: np.asarray(_signals(n, shape, rng).astype(dtype))
    if dtype.kind not in "biu":
        raise UsageError(
            f"no inputs of type {dtype} can be made up", f"input {name!r}", "Give --calib FILE.npz."
        )
    same = 1 if dtype.kind == "b" else 0 if bounds else asked_for(model, shapes, name)
    return lambda n, rng: np.full((n, *shape), same, dtype)


def _signals(count: int, shape: Shape, rng: np.random.Generator) -> NDArray[np.float32]:
    """Rows of unit variance: even ones white, odd ones with power 1/f along the last axis."""
    rows = rng.standard_normal((count, *shape), dtype=np.float32)
    if not shape or shape[-1] < SHORTEST_SIGNAL:
        return rows
    frequency = np.fft.rfftfreq(shape[-1])
    frequency[0] = frequency[1]
    pink = np.fft.irfft(np.fft.rfft(rows[1::2]) / np.sqrt(frequency), n=shape[-1])
    spread = pink.std(axis=tuple(range(1, pink.ndim)), keepdims=True)
    rows[1::2] = pink / np.maximum(spread, 1e-9)
    return rows
