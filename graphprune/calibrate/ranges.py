"""Which pixel values a model was trained on, where nobody says: the candidate it fits best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from graphprune.batch_norm import BatchNorm, batch_norm
from graphprune.calibrate.preprocess import PictureInput, Preprocess
from graphprune.calibrate.samples import Samples, batches
from graphprune.calibrate.taps import tapped
from graphprune.model import Model
from graphprune.runtime import run_session, session
from graphprune.shapes import Shapes

Attempt = Callable[[Preprocess, int], Samples]  # a range, how many rows → rows in that range
Floats = NDArray[np.float64]
Moments = tuple[Floats, Floats]  # mean and variance of a tensor by channel (axis 1)

FIRST_LAYERS = 3  # normalisations compared: later ones say more about content than about range
EARLY = 8  # products before them at most: behind other normalisations the range no longer shows
PRODUCTS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
CONVOLUTIONS = 32  # whose balance is looked at
FEWEST_CONVOLUTIONS = 4  # fewer prove nothing
MARGIN = 0.15  # nats by which an option must beat a more common one
TINY = 1e-12
PROBES, FEWEST_PROBES = 64, 8  # rows that a range is judged by
PROBED_PIXELS = 2**19  # of all of them: fewer rows where pictures are large

BYTES = Preprocess(scale=1.0)
UNIT = Preprocess()
SYMMETRIC = Preprocess(mean=(0.5,), std=(0.5,))  # (u8 - 127) / 128 is nearly the same
CENTRED = Preprocess(mean=(0.5,))
CENTRED_BYTES = Preprocess(mean=(127.5,), scale=1.0)
STANDARDISED = Preprocess(mean=(0.45,), std=(0.25,))  # zero mean, unit deviation of photographs
INK = Preprocess(mean=(0.13,), std=(0.31,))  # the same of digits on black
COLOUR = Preprocess(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))  # ImageNet
BGR_BYTES = Preprocess(mean=(104.0, 117.0, 123.0), scale=1.0, order="bgr")  # ImageNet in Caffe


@dataclass(frozen=True)
class Evidence:
    """Tensors to look at, and how badly their moments on some pictures fit the model."""

    reads: list[str]
    judge: Callable[[Sequence[Moments]], float]  # 0 is perfect


def candidates(channels: int) -> tuple[Preprocess, ...]:
    """The usual ranges for pictures of that many channels, the most common one first."""
    fractions, bytes_ = (UNIT, SYMMETRIC, CENTRED), (BYTES, CENTRED_BYTES)
    if channels == 3:
        return (COLOUR, *fractions, BGR_BYTES, *bytes_)
    return (STANDARDISED, *fractions, *bytes_, *((INK,) if channels == 1 else ()))


def infer_range(model: Model, shapes: Shapes, to: PictureInput, attempt: Attempt) -> Preprocess:
    """The usual range whose samples (``attempt`` makes them) fit the model best.

    Where there is no evidence, or it is weak, the most common one; of equals likewise.
    """
    if to.dtype.kind != "f":
        return BYTES
    options = candidates(to.channels)
    found = evidence(model, shapes)
    if found is None:
        return options[0]
    runner = session(tapped(model, found.reads, shapes))
    rows = max(FEWEST_PROBES, min(PROBES, PROBED_PIXELS // (to.height * to.width)))
    scores = [_score(runner, model, attempt(option, rows), found) for option in options]
    good = min(scores) + MARGIN
    return next(option for option, score in zip(options, scores, strict=True) if score <= good)


def evidence(model: Model, shapes: Shapes) -> Evidence | None:
    """What a model tells of its inputs: stored statistics, else how its biases balance."""
    layers = first_layers(model)
    if layers:
        reads = [layer.x for layer in layers]
        return Evidence(reads, lambda moments: mismatch(layers, moments))
    reads = _biased_convolutions(model, shapes)[1:]
    return None if len(reads) < FEWEST_CONVOLUTIONS else Evidence(reads, imbalance)


def first_layers(model: Model) -> list[BatchNorm]:
    """The first normalisations of inner tensors, in order, with stored mean and variance."""
    products = np.cumsum([node.op_type in PRODUCTS for node in model.nodes])
    early = [node for node, before in zip(model.nodes, products, strict=True) if before <= EARLY]
    found = (batch_norm(model, node) for node in early)
    return [layer for layer in found if layer and layer.x in model.producer][:FIRST_LAYERS]


def mismatch(layers: Sequence[BatchNorm], found: Sequence[Moments]) -> float:
    """How far moments (m, v) are from the stored (μ, σ²); 0 where they agree.

    Mean over layers and channels of log(1 + (m − μ)²/(σ² + ε) + log(v/(σ² + ε))²): the logarithm
    outside keeps a dead channel, whose variance is next to nothing, from deciding alone.
    """
    scores = []
    for layer, (mean, variance) in zip(layers, found, strict=True):
        ratio = np.log((variance + TINY) / layer.spread)
        distance = (mean - layer.mean) ** 2 / layer.spread + ratio**2
        scores.append(float(np.log1p(distance).mean()))
    return float(np.mean(scores))


def imbalance(found: Sequence[Moments]) -> float:
    """How far from centred convolutions are: mean of log(1 + m²/v) over layers and channels.

    Where a normalisation was folded into a convolution, its bias holds −γμ/σ, which cancels the
    mean of what comes in if that is in the range of training: m is β then and v is γ². In a wrong
    range (too small or too large) it does not cancel. The first convolution must be left out: on
    centred pictures its balance only ever improves with their scale.
    """
    return float(np.mean([np.log1p(m**2 / (v + TINY)).mean() for m, v in found]))


def _biased_convolutions(model: Model, shapes: Shapes) -> list[str]:
    """Outputs of the first convolutions of pictures with a constant bias, of their own or added."""
    found = []
    for node in model.nodes:
        if node.op_type != "Conv" or node.domain or len(shapes.shape[node.output[0]] or ()) != 4:
            continue
        own = len(node.input) == 3 and node.input[2] in model.constant_names
        output = node.output[0] if own else _with_added(model, node.output[0])
        if output is not None:
            found.append(output)
    return found[:CONVOLUTIONS]


def _with_added(model: Model, name: str) -> str | None:
    """What comes out of the Add of a constant that alone reads the tensor."""
    readers = model.consumers.get(name, [])
    node = model.nodes[readers[0][0]] if len(readers) == 1 else None
    if node is None or node.op_type != "Add" or name in model.output_names:
        return None
    return node.output[0] if model.constant_names & set(node.input) else None


def _score(runner: object, model: Model, samples: Samples, found: Evidence) -> float:
    """The evidence's judgement of the samples, infinite where they make the model overflow."""
    runs = [_moments(runner, feeds) for feeds in batches(samples, model, 1)]
    with np.errstate(all="ignore"):
        score = found.judge([_joined(parts) for parts in zip(*runs, strict=True)])
    return score if np.isfinite(score) else np.inf


def _moments(runner: object, feeds: dict[str, NDArray[np.generic]]) -> list[Moments]:
    moments = []
    with np.errstate(all="ignore"):
        for array in run_session(runner, feeds):
            values = array.astype(np.float32, copy=False)
            others = tuple(axis for axis in range(values.ndim) if axis != 1)
            mean, variance = values.mean(axis=others), values.var(axis=others)
            moments.append((mean.astype(np.float64), variance.astype(np.float64)))
    return moments


def _joined(parts: Sequence[Moments]) -> Moments:
    """Moments of equal parts as those of the whole: the parts' means vary too."""
    means = np.stack([mean for mean, _ in parts])
    return means.mean(axis=0), np.mean([v for _, v in parts], axis=0) + means.var(axis=0)
