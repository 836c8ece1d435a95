"""Inputs that a model's own statistics vouch for: optimised by gradient, without data or labels.

Where BatchNormalization is still in the graph, each layer has stored the mean and the variance
that its input had on the training pictures. Pictures that reproduce all of them serve least-squares
repair as well as real ones (Yin et al., Dreaming to Distill, arXiv 1912.08795, section 3). Where it
was folded away, pictures of which the model is sure, equally many of each class, help a little.

One run of ONNX Runtime yields loss and gradient. Pictures that do not fit into one batch still
share their statistics: each batch adds its own moments to those the others had when last seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from graphprune.batch_norm import BatchNorm, batch_norms
from graphprune.errors import ModelError, UsageError
from graphprune.gradient import gradient
from graphprune.gradient.descent import Adam
from graphprune.gradient.extend import extended, tape_for, value_of
from graphprune.gradient.tape import Value
from graphprune.model import Array, Model
from graphprune.runtime import Feeds, input_dtype, random_inputs, run_session, session
from graphprune.shapes import Shape, Shapes, infer
from graphprune.sizes import declared

Floats = NDArray[np.float32]
Evaluate = Callable[[Floats], tuple[float, Floats]]  # pictures → loss, its gradient
Progress = Callable[[float], None]  # gets the share that is done, up to 1

SMOOTHNESS = 0.002  # weight of the total variation beside the statistics
SMOOTHNESS_OF_CLASSES = 0.02  # and beside the predictions
PICTURE = (2, 3)  # axes of height and width in NCHW


@dataclass(frozen=True)
class Matched:
    """Optimised inputs, the loss before and after (without the total variation), and the operators
    that the gradient could not pass."""

    pictures: Floats
    loss_before: float
    loss_after: float
    stopped: tuple[str, ...]


def class_scores(model: Model, shapes: Shapes) -> str | None:
    """The tensor of a classifier's logits: the first output where that is [n, classes], or what a
    final Softmax turns into it. ``None`` for any other model."""
    name = model.outputs[0].name
    shape = shapes.shape.get(name)
    if shape is None or len(shape) != 2 or shape[1] < 2 or shapes.dtype[name] != TensorProto.FLOAT:
        return None
    node = model.nodes[model.producer[name]] if name in model.producer else None
    if node is not None and node.op_type in ("Softmax", "LogSoftmax"):
        return str(node.input[0])
    return str(name)


def match_statistics(
    model: Model,
    shapes: Shapes,
    name: str,
    start: Array,
    low: Array | float,
    high: Array | float,
    *,
    steps: int = 60,
    rate: float = 0.03,
    batch: int = 256,
    seed: int = 0,
    spatial: Sequence[int] = PICTURE,
    threads: int = 0,
    progress: Progress | None = None,
) -> Matched:
    """Move ``start`` until each BatchNormalization sees the mean and variance that it stored.

    ``start`` is [n, …] in the layout and scale of the graph input ``name``; ``low`` and ``high``
    are its bounds (one for all, or one per channel), ``spatial`` the axes of height and width. The
    loss is the mean over the layers of mean_c (m − μ)²/(σ² + ε) + mean_c log²((v + ε)/(σ² + ε)),
    m and v being over all n pictures and positions, plus 0.002 · total variation in units of a
    quarter of the range (about the deviation of natural pictures). Adam takes ``steps`` steps of
    ``rate`` such units.

    ``batch`` pictures run at a time, or as many as the model itself fixes; memory is that of two
    forward passes which keep everything. ``seed`` feeds the model's other inputs. Deterministic.
    Raises ``ModelError`` where no layer has statistics to match.
    """
    layers = batch_norms(model)
    if not layers:
        raise ModelError(
            "no BatchNormalization with stored statistics is left in the graph",
            hint="Export the model with it kept; in PyTorch: training=TrainingMode.PRESERVE and "
            "do_constant_folding=False, on model.eval().",
        )
    search = _search(model, shapes, name, start, low, high, batch, spatial)
    run = _opened(model, search, _statistics_loss(model, search, layers), seed, threads)
    evaluate = _over_all_moments(search, run, sum(len(layer.mean) for layer in layers))
    return _descend(search, run, evaluate, SMOOTHNESS, steps, rate, progress)


def match_predictions(
    model: Model,
    shapes: Shapes,
    name: str,
    start: Array,
    low: Array | float,
    high: Array | float,
    *,
    steps: int = 60,
    rate: float = 0.03,
    batch: int = 256,
    seed: int = 0,
    spatial: Sequence[int] = PICTURE,
    threads: int = 0,
    progress: Progress | None = None,
) -> Matched:
    """Move ``start`` until the model is sure of each picture, of equally many for each class.

    Cross-entropy towards balanced labels (dealt by ``seed``) plus 0.02 · total variation; all else
    as in ``match_statistics``. Raises ``ModelError`` where the output is no [n, classes].
    """
    scores = class_scores(model, shapes)
    if scores is None:
        raise ModelError("the model's first output is no table of class scores")
    search = _search(model, shapes, name, start, low, high, batch, spatial)
    run = _opened(model, search, _prediction_loss(model, search, scores), seed, threads)
    classes = (shapes.shape[scores] or (0, 0))[1]
    labels = np.random.default_rng(seed).permutation(np.arange(len(search.pictures)) % classes)
    evaluate = _over_labels(search, run, np.eye(classes, dtype=np.float32)[labels])
    return _descend(search, run, evaluate, SMOOTHNESS_OF_CLASSES, steps, rate, progress)


@dataclass(frozen=True)
class _Search:
    """Where the pictures start, and within which bounds they move."""

    name: str
    inputs: dict[str, Shape]  # of the model, at the batch that runs
    pictures: Floats  # filled up to whole batches with repeats of the first ones
    asked: int  # how many of them count
    low: Floats
    high: Floats
    unit: Floats
    spatial: tuple[int, ...]

    @property
    def batch(self) -> int:
        return self.inputs[self.name][0]

    @property
    def parts(self) -> list[slice]:
        return [slice(i, i + self.batch) for i in range(0, len(self.pictures), self.batch)]


def _search(
    model: Model,
    shapes: Shapes,
    name: str,
    start: Array,
    low: Array | float,
    high: Array | float,
    batch: int,
    spatial: Sequence[int],
) -> _Search:
    value = next((value for value in model.inputs if value.name == name), None)
    if value is None or input_dtype(value) != np.float32 or not len(start):
        raise UsageError("only pictures for a float32 input can be matched", f"input {name!r}")
    fixed = (declared(value) or [None])[0]
    runs = -(-len(start) // (fixed or batch))
    size = fixed or -(-len(start) // runs)
    inputs = {
        other: (size, *shape[1:]) if 0 in shapes.symbolic.get(other, ()) else shape
        for other, shape in shapes.inputs.items()
    }
    inputs[name] = (size, *start.shape[1:])
    lowest, highest = (_per_channel(bound, start, spatial) for bound in (low, high))
    unit = (highest - lowest) * np.float32(0.25)
    if not (np.isfinite(unit) & (unit > 0)).all():
        raise UsageError("bounds of the pictures must be finite, the lower one below", name)
    filled = np.resize(np.arange(len(start)), runs * size)
    pictures = np.clip(start.astype(np.float32)[filled], lowest, highest)
    return _Search(name, inputs, pictures, len(start), lowest, highest, unit, tuple(spatial))


def _per_channel(bound: Array | float, start: Array, spatial: Sequence[int]) -> Floats:
    """A bound as it broadcasts to ``start``; the channel axis is the first that is not spatial."""
    bound = np.asarray(bound, np.float32)
    if bound.size == 1:
        return bound.reshape(1)
    axis = next(i for i in range(1, start.ndim) if i not in spatial)
    return bound.reshape([-1 if i == axis else 1 for i in range(start.ndim)])


@dataclass(frozen=True)
class _Run:
    """A session that yields the loss' outputs and, last, the gradient; and what never changes."""

    runner: Any
    fixed: Feeds
    extra: tuple[str, ...]  # inputs that the loss added
    flows: bool  # whether any gradient reaches the pictures
    stopped: tuple[str, ...]

    def __call__(self, feeds: Feeds) -> list[Array]:
        answers = run_session(self.runner, {**self.fixed, **feeds})
        return answers if self.flows else [*answers, np.zeros(1, np.float32)]


def _opened(model: Model, search: _Search, loss: Model, seed: int, threads: int) -> _Run:
    shapes = infer(loss, search.inputs)
    result = gradient(loss, shapes, search.name, loss.outputs[0].name)
    fixed = random_inputs(model, replace(shapes, inputs=search.inputs), seed)
    extra = tuple(value.name for value in loss.inputs if value.name not in fixed)
    del fixed[search.name]
    runner = session(result.model, threads)
    return _Run(runner, fixed, extra, result.name is not None, result.stopped)


def _statistics_loss(model: Model, search: _Search, layers: Sequence[BatchNorm]) -> Model:
    """The model up to its layers, with outputs loss, means and squares (of all channels of all
    layers in a row), and as further inputs what the other batches add to these two."""
    shapes = infer(model, search.inputs)
    tape = tape_for(model)
    share = 1 / len(search.parts)
    means, squares = [], []
    for layer in layers:
        x = value_of(tape, shapes, layer.x)
        x = x if x.dtype == TensorProto.FLOAT else x.cast(TensorProto.FLOAT)
        axes = [axis for axis in range(x.rank) if axis != 1]
        count = prod(x.shape[axis] for axis in axes)
        means.append(x.mean(axes).reshape(layer.mean.shape))
        squares.append((x.sum_of_squares(axes) * (1 / count)).reshape(layer.mean.shape))
    total = (sum(len(layer.mean) for layer in layers),)
    own = [tape.write("Concat", several, total, axis=0) for several in (means, squares)]
    rest = [Value(tape, tape.name("others"), total, TensorProto.FLOAT) for _ in own]
    mean, square = (mine * share + others for mine, others in zip(own, rest, strict=True))
    variance = (square - mean * mean).op("Relu")  # rounding may leave it just below zero
    epsilon = np.concatenate([np.full(len(layer.mean), layer.epsilon) for layer in layers])
    stored = np.concatenate([layer.mean for layer in layers])
    spread = np.concatenate([layer.spread for layer in layers])
    weight = np.concatenate([np.full(len(n.mean), 1 / len(n.mean) / len(layers)) for n in layers])
    off = mean - mean.constant(stored)
    ratio = ((variance + mean.constant(epsilon)) / mean.constant(spread)).op("Log")
    per_channel = off * off / mean.constant(spread) + ratio * ratio
    loss = (per_channel * mean.constant(weight)).sum([0])
    return extended(model, tape, [loss, *own], rest)


def _prediction_loss(model: Model, search: _Search, scores: str) -> Model:
    """The model with the loss as its output, and one-hot labels as a further input. The sum of all
    runs' losses is the mean over all pictures."""
    shapes = infer(model, search.inputs)
    tape = tape_for(model)
    logits = value_of(tape, shapes, scores)
    target = Value(tape, tape.name("target"), logits.shape, logits.dtype)
    likelihood = tape.write("LogSoftmax", [logits], logits.shape, axis=1) * target
    loss = likelihood.sum([0, 1]).reshape([1]) * (-1 / len(search.pictures))
    return extended(model, tape, [loss], [target])


def _over_all_moments(search: _Search, run: _Run, channels: int) -> Evaluate:
    """Loss of all pictures together; each batch takes the others' moments as last seen."""
    parts = search.parts
    moments = np.zeros((2, len(parts), channels))  # mean and mean square by batch and channel

    def visit(index: int, pictures: Floats) -> list[Array]:
        others = (moments.sum(axis=1) - moments[:, index]) / len(parts)
        added = dict(zip(run.extra, others.astype(np.float32), strict=True))
        loss, *moments[:, index], slope = run({search.name: pictures[parts[index]], **added})
        return [loss, slope]

    def evaluate(pictures: Floats) -> tuple[float, Floats]:
        if len(parts) > 1 and not moments.any():
            for index in range(len(parts)):
                visit(index, pictures)
        answers = [visit(index, pictures) for index in range(len(parts))]
        return float(answers[-1][0].item()), np.concatenate([slope for _, slope in answers])

    return evaluate


def _over_labels(search: _Search, run: _Run, targets: Floats) -> Evaluate:
    def evaluate(pictures: Floats) -> tuple[float, Floats]:
        answers = [
            run({search.name: pictures[part], run.extra[0]: targets[part]}) for part in search.parts
        ]
        loss = sum(float(loss.item()) for loss, _ in answers)
        return loss, np.concatenate([slope for _, slope in answers])

    return evaluate


def _descend(
    search: _Search,
    run: _Run,
    evaluate: Evaluate,
    smoothness: float,
    steps: int,
    rate: float,
    progress: Progress | None,
) -> Matched:
    """Adam within the bounds."""
    pictures, unit = search.pictures.copy(), search.unit
    before, slope = evaluate(pictures)
    after = before
    adam = Adam()
    for step in range(1, steps + 1 if run.flows else 1):
        slope = slope * unit + smoothness * _variation_slope(pictures / unit, search.spatial)
        slope *= slope.size  # of a sum rather than a mean: Adam's epsilon stays tiny beside it
        pictures -= rate * unit * adam(slope)
        np.clip(pictures, search.low, search.high, out=pictures)
        after, slope = evaluate(pictures)
        if progress is not None:
            progress(step / steps)
    if not (np.isfinite(before) and np.isfinite(after) and np.isfinite(pictures).all()):
        raise ModelError(
            "the model computes no finite numbers on its inputs",
            hint="Give samples with --calib, or look at weights alone (--fast).",
        )
    return Matched(pictures[: search.asked], before, after, run.stopped)


def _variation_slope(pictures: Floats, spatial: Sequence[int]) -> Floats:
    """Gradient of the total variation: per axis, the mean |difference| of neighbours."""
    slope = np.zeros_like(pictures)
    for axis in spatial:
        signs = np.sign(np.diff(pictures, axis=axis))
        signs /= max(signs.size, 1)
        place = [slice(None)] * pictures.ndim
        place[axis] = slice(1, None)
        slope[tuple(place)] += signs
        place[axis] = slice(None, -1)
        slope[tuple(place)] -= signs
    return slope
