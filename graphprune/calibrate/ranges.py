"""Which pixel values a model was trained on, where nobody says: the candidate it fits best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from graphprune.calibrate.preprocess import Preprocess
from graphprune.calibrate.samples import Samples, batches
from graphprune.calibrate.taps import tapped
from graphprune.model import Array, Model
from graphprune.runtime import run_session, session
from graphprune.shapes import Shapes

Attempt = Callable[[Preprocess], Samples]
Floats = NDArray[np.float64]

FIRST_LAYERS = 3  # normalisations compared: later ones say more about content than about range
ROWS = 16  # samples per run

BYTES = Preprocess(scale=1.0)
UNIT = Preprocess()
SYMMETRIC = Preprocess(mean=(0.5,), std=(0.5,))  # (u8 - 127) / 128 is nearly the same
CENTRED = Preprocess(mean=(0.5,))
CENTRED_BYTES = Preprocess(mean=(127.5,), scale=1.0)
STANDARDISED = Preprocess(mean=(0.45,), std=(0.25,))  # zero mean, unit deviation of photographs
GREY = Preprocess(mean=(0.13,), std=(0.31,))  # digits and silhouettes on black
COLOUR = Preprocess(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))  # ImageNet
BGR_BYTES = Preprocess(mean=(104.0, 117.0, 123.0), scale=1.0, order="bgr")  # ImageNet in Caffe


@dataclass(frozen=True)
class Layer:
    """A normalisation with stored statistics: the tensor it reads, and what it expects there."""

    reads: str
    mean: Floats  # [channels]
    variance: Floats  # [channels], epsilon included


def candidates(channels: int) -> tuple[Preprocess, ...]:
    """The usual ranges for pictures of that many channels; the first is the least surprising."""
    common = (STANDARDISED, UNIT, BYTES, SYMMETRIC, CENTRED, CENTRED_BYTES)
    if channels == 3:
        return (COLOUR, *common[1:], BGR_BYTES)
    return (*common, GREY) if channels == 1 else common


def choose(
    model: Model, shapes: Shapes, options: Sequence[Preprocess], attempt: Attempt
) -> tuple[Preprocess, str]:
    """The option whose samples (``attempt`` makes them) suit the model best, and by what evidence.

    Stored statistics of the first normalisations where there are any, else how surely and how
    variedly the model tells the samples apart, else the first option.
    """
    layers = first_layers(model)
    if layers:
        scores = _all_scores(
            tapped(model, [layer.reads for layer in layers], shapes),
            options,
            attempt,
            lambda outputs: mismatch(layers, outputs),
        )
        return options[int(np.argmin(scores))], "BatchNormalization statistics"
    column = _class_scores(model, shapes)
    if column is None:
        return options[0], "nothing: assumed"
    scores = _all_scores(
        model, options, attempt, lambda outputs: -mutual_information(outputs[column])
    )
    return options[int(np.argmin(scores))], "varied and sure predictions"


def first_layers(model: Model) -> list[Layer]:
    """The first normalisations, in order, whose mean and variance are stored in the model."""
    return [layer for node in model.nodes if (layer := _layer(model, node))][:FIRST_LAYERS]


def mismatch(layers: Sequence[Layer], inputs: Sequence[Array]) -> float:
    """How far the moments of the layers' inputs are from the stored ones; 0 where they agree.

    Mean over layers and channels of log(1 + (m − μ)²/(σ² + ε) + log(v/(σ² + ε))²): the logarithm
    outside keeps a dead channel, whose variance is next to nothing, from deciding alone.
    """
    total = 0.0
    for layer, array in zip(layers, inputs, strict=True):
        others = tuple(axis for axis in range(array.ndim) if axis != 1)
        values = array.astype(np.float64)
        mean, variance = values.mean(axis=others), values.var(axis=others)
        ratio = np.log((variance + 1e-12) / layer.variance)
        distance = (mean - layer.mean) ** 2 / layer.variance + ratio**2
        total += float(np.log1p(distance).mean())
    return total / len(layers)


def mutual_information(scores: Array) -> float:
    """H(mean p) − mean H(p) in nats of class scores [rows, classes]: how sure, and how varied."""
    values = scores.astype(np.float64)
    sums = values.sum(axis=1)
    if values.min() < 0 or not np.allclose(sums, 1, atol=1e-3):
        values = np.exp(values - values.max(axis=1, keepdims=True))
        values /= values.sum(axis=1, keepdims=True)
    return float(_entropy(values.mean(axis=0)) - _entropy(values).mean())


def _entropy(p: Floats) -> Floats:
    return np.asarray(-(p * np.log(np.maximum(p, 1e-30))).sum(axis=-1))


def _layer(model: Model, node: onnx.NodeProto) -> Layer | None:
    constants = list(node.input[1:])
    if node.op_type != "BatchNormalization" or node.domain or len(constants) != 4:
        return None
    if not set(constants) <= model.constant_names or node.input[0] not in model.producer:
        return None
    settings = {a.name: a for a in node.attribute}
    if "training_mode" in settings and settings["training_mode"].i:
        return None
    epsilon = settings["epsilon"].f if "epsilon" in settings else 1e-5
    mean, variance = (model.array(name).astype(np.float64) for name in constants[2:])
    return Layer(node.input[0], mean, variance + epsilon)


def _class_scores(model: Model, shapes: Shapes) -> int | None:
    """Which output holds class scores: the first of floats, rank 2 and two columns or more."""
    for i, value in enumerate(model.outputs):
        shape = shapes.shape.get(value.name)
        kind = shapes.dtype.get(value.name)
        if shape and len(shape) == 2 and shape[1] >= 2 and kind in (1, 10, 11):
            return i
    return None


def _all_scores(
    model: Model,
    options: Sequence[Preprocess],
    attempt: Attempt,
    score: Callable[[list[Array]], float],
) -> list[float]:
    """The score of each option, infinite where it makes the model overflow."""
    runner = session(model)
    scores = []
    for option in options:
        runs = [run_session(runner, feeds) for feeds in batches(attempt(option), model, ROWS)]
        outputs = [np.concatenate(parts) for parts in zip(*runs, strict=True)]
        with np.errstate(all="ignore"):
            found = score(outputs)
        scores.append(found if np.isfinite(found) else np.inf)
    return scores
