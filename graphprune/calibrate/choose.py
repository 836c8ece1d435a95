"""Which inputs a model is calibrated on: the user's, or the best that can be made up for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from graphprune.batch_norm import batch_norms
from graphprune.cache import Cache
from graphprune.calibrate import Preprocess, Samples, open_samples
from graphprune.calibrate.match import class_scores, match_predictions, match_statistics
from graphprune.calibrate.preprocess import PictureInput, picture_inputs
from graphprune.calibrate.sameness import sameness
from graphprune.calibrate.samples import Chunked
from graphprune.calibrate.synthesise import opened_sizes
from graphprune.errors import ModelError
from graphprune.model import Array, Model
from graphprune.runtime import Feeds
from graphprune.shapes import Shapes
from graphprune.wording import counted

MOST, LEAST = 512, 64  # samples where nobody says how many
FEW = 32  # of the user's own: less says little of what a layer reads
WORK = 5e11  # MACs that one run over all samples may take
MATCHING_WORK = 1.5e13  # MACs that matching may take: each step costs about three runs,
RUNS_PER_STEP = 3.2
MACS_PER_ELEMENT = 100  # in which every activation takes as long as so many MACs
MATCHED, STEPS, FEWEST_STEPS = 512, 60, 12
SURE_STEPS, SURE_RATE = 40, 0.03  # to predictions: these are soon sure
CHUNKS, LARGEST_CHUNK = 10, 64  # chunks at least (some are held out), and rows of one at most
OLDEST = 9  # opset that gradients can be written in
BATCH_BYTES = 4e9  # of a forward pass that keeps everything,
BYTES_PER_ELEMENT = 8  # there and back


@dataclass(frozen=True)
class Calibration:
    """Calibration inputs in chunks, what they are, and a key that names them."""

    feeds: Sequence[Feeds]
    asked: int  # samples at most; matching and files may give fewer
    source: str
    key: str
    notes: tuple[str, ...] = ()  # what they fall short of
    made_up: PictureInput | None = None  # the input whose pictures are, which more can be made of


def calibration(
    given: str | Path | None,
    model: Model,
    shapes: Shapes,
    macs: float,
    cache: Cache,
    *,
    count: int | None = None,
    seed: int = 0,
    preprocess: Preprocess | None = None,
    progress: Callable[[float], None] = lambda share: None,
) -> Calibration:
    """The user's samples, else synthesised ones; these are matched to the statistics that
    BatchNormalization stored, where it is still in the graph. ``macs`` are those of one sample."""
    most = count or usual_count(macs)
    samples = open_samples(given, model, shapes, most, seed, preprocess)
    notes = samples.notes
    made_up = None
    if given in (None, "none", Path("none")):
        samples, notes = _matched(samples, model, shapes, macs, cache, seed, progress)
        pictures = picture_inputs(model, shapes)
        made_up = pictures[0] if len(pictures) == 1 else None
    else:
        notes += (*few(samples), *sameness(samples, model, shapes))
    chunk = min(LARGEST_CHUNK, max(1, -(-samples.count // CHUNKS)))
    feeds = Chunked(samples, model, chunk)
    if not len(feeds):
        raise ModelError(
            "there are no calibration inputs", samples.source, "Give samples with --calib."
        )
    return Calibration(feeds, most, samples.source, samples.key, notes, made_up)


def few(samples: Samples) -> tuple[str, ...]:
    if samples.count >= FEW:
        return ()
    count = counted(samples.count, "calibration input is", "calibration inputs are")
    return (f"{count} few (--calib, --samples): 200 to 500 are recommended, no labels needed",)


def usual_count(macs: float) -> int:
    """Samples where nobody says how many, of a model with so many MACs."""
    return int(np.clip(WORK / max(macs, 1.0), LEAST, MOST))


def _matched(
    samples: Samples,
    model: Model,
    shapes: Shapes,
    macs: float,
    cache: Cache,
    seed: int,
    progress: Callable[[float], None],
) -> tuple[Samples, tuple[str, ...]]:
    """The same pictures, moved until each BatchNormalization sees what it stored; where none is
    left, every second one until a classifier is sure of it. Other models keep what they have.

    What a model of this size takes too long for is left out, which is then said."""
    sized = opened_sizes(model, shapes)
    pictures = picture_inputs(model, sized)
    layers = batch_norms(model)
    if len(pictures) != 1 or pictures[0].dtype != np.float32:
        return samples, ()
    if (not layers and class_scores(model, shapes) is None) or model.opsets.get("", 0) < OLDEST:
        return samples, ()
    to = pictures[0]
    elements = _activations(model, shapes, to)
    every, wanted = (1, STEPS) if layers else (2, SURE_STEPS)
    runs = MATCHING_WORK / (RUNS_PER_STEP * (max(macs, 1.0) + MACS_PER_ELEMENT * elements))
    asked = min(-(-samples.count // every), MATCHED)
    count = min(asked, max(LEAST, int(runs / wanted)))
    steps = int(np.clip(runs / count, FEWEST_STEPS, wanted))
    batch = max(1, min(256, int(BATCH_BYTES / max(BYTES_PER_ELEMENT * elements, 1))))
    recipe = ("matched", samples.key, model.sha256, count, steps, batch)
    total = min(samples.count, count * every)
    search = match_statistics if layers else partial(match_predictions, rate=SURE_RATE)

    def match() -> dict[str, Array]:
        start = samples.read(0, total)[to.name]
        axes = (0, 2, 3) if to.layout == "nchw" else (0, 1, 2)
        found = search(
            model,
            sized,
            to.name,
            start[::every],
            start.min(axis=axes),
            start.max(axis=axes),
            steps=steps,
            batch=batch,
            seed=seed,
            spatial=(2, 3) if to.layout == "nchw" else (1, 2),
            progress=progress,
        )
        start[::every] = found.pictures
        losses = np.array([found.loss_before, found.loss_after])
        return {"pictures": start, "losses": losses}

    made = cache(recipe, match)
    first, last = (float(v) for v in made["losses"])
    how = f"{len(layers)} normalisation layers" if layers else "sure, balanced predictions"
    source = (
        f"{samples.source}; {len(made['pictures'][::every])} matched to {how} in {steps} steps "
        f"(loss {first:.3g} -> {last:.3g})"
    )

    def read(start: int, stop: int) -> dict[str, Array]:
        return {**samples.read(start, min(stop, total)), to.name: made["pictures"][start:stop]}

    key = samples.key + repr(recipe)
    notes: tuple[str, ...] = ()
    if (count, steps) != (asked, wanted):
        notes = (
            f"{count} made-up inputs matched in {steps} steps; {asked} in {wanted}, the most that "
            "helps, would take long here: samples of your own (--calib) serve better",
        )
    return replace(samples, count=total, source=source, key=key, read=read), notes


def _activations(model: Model, shapes: Shapes, to: PictureInput) -> float:
    """Elements of all activations of one sample."""
    analysed = shapes.inputs[to.name]
    scale = to.height * to.width * to.channels / max(1, int(np.prod(analysed[1:])))
    moving = (s for name, s in shapes.shape.items() if s and name not in model.constant_names)
    sizes = (np.prod(shape, dtype=np.float64) for shape in moving)
    return float(sum(sizes)) * scale / max(1, analysed[0])
