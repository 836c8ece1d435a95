"""Repair of a model as a whole, after least squares operator by operator.

Scales and shifts of the linear operators' outputs, and gains of inputs that have other readers, are
moved by gradient until the pruned model's outputs agree with the original's on the calibration
inputs: the original teaches what is left of it (Hinton et al., arXiv 1503.02531), without labels,
and so few numbers move that a few hundred inputs can decide them. They are folded into weights and
biases, so no operator is added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from graphprune.calibrate.mix import mixed
from graphprune.calibrate.preprocess import PictureInput
from graphprune.calibrate.samples import batched_inputs, rows_per_run
from graphprune.gradient import gradients
from graphprune.gradient.descent import Adam
from graphprune.interface import fitted
from graphprune.model import Array, Model
from graphprune.repair.reconstruct import with_biases
from graphprune.repair.tuned import Tunable, compared, loss, spreads, target, tunable
from graphprune.rewriting import rewritten
from graphprune.runtime import Feeds, run_session, session
from graphprune.shapes import infer

RATE = 0.003  # of a channel's scale or gain, and of its shift in units of its spread
ROWS, FEWEST = 48, 8  # of inputs for a step; many steps on fewer rows do more than few on many
WORK = 1e13  # MACs of all steps, above which they take fewer rows
THERE_AND_BACK = 3  # times the MACs of a run
MEMORY, BYTES_PER_ELEMENT = 1e9, 8  # of a run, of targets; of activations, there and back
OLDEST = 9  # opset that gradients can be written in


@dataclass(frozen=True)
class Lesson:
    """The original, inputs in chunks to learn from, and what else the descent goes by.

    ``made_up`` names the input whose pictures are made up, which may be mixed; ``rows`` of inputs
    make a step.
    """

    original: Model
    feeds: Sequence[Feeds]
    made_up: PictureInput | None
    seed: int
    rows: int = ROWS


@dataclass(frozen=True)
class Refined:
    """What tuning did: ``steps`` taken, and the outputs' squared error over their variance on the
    calibration inputs, before and after; ``why`` says what kept it from changing anything."""

    steps: int = 0
    before: float | None = None
    after: float | None = None
    why: str = ""

    def __str__(self) -> str:
        if self.why or self.before is None or self.after is None:
            return f"not refined: {self.why}"
        return (
            f"refined in {self.steps} steps: error of the outputs on the calibration inputs "
            f"{self.before:.3g} -> {self.after:.3g}"
        )


def rows_within(macs: float, steps: int) -> int:
    """Rows of inputs for each of so many steps, of a model of so many MACs a row; fewer than
    ``FEWEST`` are not worth it."""
    return int(min(ROWS, WORK / max(THERE_AND_BACK * macs * steps, 1)))


def refine(
    model: Model, lesson: Lesson, steps: int, progress: Callable[[float], None]
) -> tuple[Model, Refined]:
    """The model with tuned weights and biases, or itself and why not."""
    if model.opsets.get("", 0) < OLDEST:
        return model, Refined(why=f"gradients need opset {OLDEST}, the model has less")
    descent = _Descent.of(model, lesson)
    if isinstance(descent, str):
        return model, Refined(why=descent)
    values = descent.made.neutral()
    before = descent.error(values)
    for taken, moved in enumerate(descent.path(steps), start=1):
        values = moved
        progress(taken / steps)
    after = descent.error(values)
    if not after < before:
        why = f"after {steps} steps the error of the outputs was {after:.3g}, before {before:.3g}"
        return model, Refined(why=why)
    return folded(descent.model, descent.made, values), Refined(steps, before, after)


@dataclass(frozen=True)
class _Exercise:
    """Inputs of the pruned model, and the targets of the outputs that are compared."""

    feeds: Feeds
    targets: list[Array]


class _Descent:
    """Adam over all scales and shifts, on random chunks; ``rows`` rows run at a time."""

    def __init__(self, model: Model, lesson: Lesson) -> None:
        self.model, self.lesson = model, lesson
        self.rows = _rows(model, lesson.feeds[0], lesson.rows)
        self.batched = batched_inputs(lesson.original)
        self.teacher = session(lesson.original)
        self.known: dict[tuple[int, int], list[Array]] = {}
        self.room = MEMORY
        self.first = self._first()
        self.made = tunable(model, _sizes(model, self.first[0]))
        several = [self._expected(piece) for piece in self.first]
        self.outputs = compared(model, self.made.shapes, several)

    @staticmethod
    def of(model: Model, lesson: Lesson) -> _Descent | str:
        """Ready to run, or why there is none."""
        made = _Descent(with_biases(model), lesson)
        if not made.made.sites or not made.outputs:
            return "no linear operator leads to an output of floats of known shape"
        made.open()
        if not any(made.flows):
            return "no gradient reaches a linear operator"
        return made

    @property
    def runs(self) -> int:
        """Runs for one step."""
        return max(1, -(-self.lesson.rows // self.rows))

    def open(self) -> None:
        """Write the loss and its gradients."""
        model, self.targets = loss(self.made, self.outputs)
        shapes = infer(model, self.made.shapes.inputs)
        found = gradients(model, shapes, self.made.inputs, model.outputs[0].name)
        self.judge, self.runner = session(model), session(found.model)
        self.flows = [name is not None for name in found.names]

    def path(self, steps: int) -> Iterator[list[Array]]:
        """Scales and shifts after each step; the rate falls to zero along a cosine."""
        values, adam = self.made.neutral(), Adam()
        units = spreads(self.made, [fitted(self.model, piece) for piece in self.first])
        lessons = self._lessons()
        for step in range(steps):
            slopes = [self._slope(values, next(lessons)) for _ in range(self.runs)]
            rate = RATE * (1 + np.cos(np.pi * step / steps)) / 2
            move = adam(np.mean(slopes, axis=0) * units) * rate * units
            if not np.isfinite(move).all():
                return
            values = _moved(values, move)
            yield values

    def error(self, values: Sequence[Array]) -> float:
        """The loss on all inputs once, mixed as those that are learnt from."""
        rng = np.random.default_rng([self.lesson.seed, 1])
        every = (e for chunk in range(len(self.lesson.feeds)) for e in self.exercises(chunk, rng))
        found = [run_session(self.judge, self._feeds(values, e))[0].item() for e in every]
        return float(np.mean(found)) if np.isfinite(found).all() else np.inf

    def pieces(self, feed: Feeds) -> list[Feeds]:
        """A chunk in feeds of ``rows`` rows each; the last is filled up with its own first rows."""
        count = max((len(feed[name]) for name in self.batched if name in feed), default=1)
        return [
            {name: self._part(name, array, start) for name, array in feed.items()}
            for start in range(0, count, self.rows)
        ]

    def exercises(self, chunk: int, rng: np.random.Generator) -> Iterator[_Exercise]:
        """Those of one chunk of the inputs."""
        for part, piece in enumerate(self.pieces(self.lesson.feeds[chunk])):
            feed = self._mixed(piece, rng)
            yield _Exercise(fitted(self.model, feed), self._targets(feed, (chunk, part)))

    def _targets(self, feed: Feeds, place: tuple[int, int]) -> list[Array]:
        """What the original says of a feed; remembered where the same feed comes again."""
        if place in self.known:
            return self.known[place]
        given = self._expected(feed)
        names = [value.name for value in self.model.outputs]
        targets = [
            target(given[one.place], one.tensor != names[one.place], one.logits).astype(np.float32)
            for one in self.outputs
        ]
        size = sum(array.nbytes for array in targets)
        if self.lesson.made_up is None and size <= self.room:
            self.known[place] = targets
            self.room -= size
        return targets

    def _first(self) -> list[Feeds]:
        """As many inputs as one step takes."""
        every = (piece for feed in self.lesson.feeds for piece in self.pieces(feed))
        return list(islice(every, self.runs))

    def _part(self, name: str, array: Array, start: int) -> Array:
        if name not in self.batched:
            return array
        part = array[start : start + self.rows]
        return part if len(part) == self.rows else np.resize(part, (self.rows, *array.shape[1:]))

    def _expected(self, feed: Feeds) -> list[Array]:
        """What the original gives, without what the pruned model's outputs have lost."""
        names = [value.name for value in self.lesson.original.outputs]
        found = dict(zip(names, run_session(self.teacher, feed), strict=True))
        return list(fitted(self.model, found).values())

    def _lessons(self) -> Iterator[_Exercise]:
        rng = np.random.default_rng(self.lesson.seed)
        while True:
            for chunk in rng.permutation(len(self.lesson.feeds)):
                yield from self.exercises(int(chunk), rng)

    def _mixed(self, feed: Feeds, rng: np.random.Generator) -> Feeds:
        """Made-up pictures mixed; all else as it is."""
        to = self.lesson.made_up
        return feed if to is None else {**feed, to.name: mixed(feed[to.name], to.layout, rng)}

    def _slope(self, values: Sequence[Array], exercise: _Exercise) -> Array:
        """The gradient by all numbers, in a row."""
        _, *given = run_session(self.runner, self._feeds(values, exercise))
        parts = iter(given)
        slopes = [
            next(parts) if flows else np.zeros_like(value)
            for value, flows in zip(values, self.flows, strict=True)
        ]
        return np.concatenate([slope.reshape(-1).astype(np.float64) for slope in slopes])

    def _feeds(self, values: Sequence[Array], exercise: _Exercise) -> dict[str, Any]:
        tuned = dict(zip(self.made.inputs, values, strict=True))
        return {**exercise.feeds, **tuned, **dict(zip(self.targets, exercise.targets, strict=True))}


def _rows(model: Model, feed: Feeds, wanted: int) -> int:
    """Rows for a run: about those ``wanted``, of a chunk or of what fits into ``MEMORY``; no option
    decides it, since a plan is to give the same weights again."""
    sizes = _sizes(model, feed)
    counts = [sizes[name][0] for name in batched_inputs(model) if name in sizes]
    count = max(counts, default=1)
    shapes = infer(model, sizes)
    moving = (s for name, s in shapes.shape.items() if s and name not in model.constant_names)
    elements = sum(float(np.prod(s, dtype=np.float64)) for s in moving) / max(count, 1)
    most = int(MEMORY / (BYTES_PER_ELEMENT * max(elements, 1)))
    fitting = max(1, min(count, most))
    parts = max(1, round(fitting / wanted))  # about as many rows in each
    return rows_per_run(model) or -(-fitting // parts)


def _sizes(model: Model, feed: Feeds) -> dict[str, tuple[int, ...]]:
    return {name: np.shape(array) for name, array in fitted(model, feed).items()}


def _moved(values: Sequence[Array], move: Array) -> list[Array]:
    """The values less a step, which holds all of theirs in a row."""
    ends = np.cumsum([value.size for value in values])
    steps = np.split(move, ends[:-1])
    return [
        (value - step.reshape(value.shape)).astype(value.dtype)
        for value, step in zip(values, steps, strict=True)
    ]


def folded(model: Model, made: Tunable, values: Sequence[Array]) -> Model:
    """Scales, shifts and gains multiplied into weights and added to biases."""
    found = {name: v.astype(np.float64) for name, v in zip(made.inputs, values, strict=True)}
    changed = []
    for site in made.sites:
        linear, matrix = site.linear, site.linear.matrix(model)
        groups, rows = matrix.shape[:2]
        scale, shift = (found[dial.name].reshape(groups, rows) for dial in (site.scale, site.shift))
        offset = linear.offset(model, groups * rows) * scale + shift
        matrix = matrix * scale[..., None]
        if site.gain is not None:  # a channel is as many columns as the kernel has taps
            gain = found[site.gain.name].reshape(groups, 1, -1)
            matrix = matrix * np.repeat(gain, linear.taps, axis=2)
        changed.append((linear, matrix, offset))
    return rewritten(model, changed)
