"""Plans compared by what they do: candidates near the optimum, and the smallest within a drop.

A candidate is cut, repaired on most of the calibration inputs and judged on the rest, which its
repair has not seen (after EagleEye, arXiv 2007.02491).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from graphprune.budget import Decision
from graphprune.calibrate.samples import split
from graphprune.coupling import Mask
from graphprune.cut import cut
from graphprune.distortion import agreement, distortion, divergence, relative_error, row_errors
from graphprune.errors import TargetError, UsageError
from graphprune.interface import fitted
from graphprune.ladders import BLOCKS
from graphprune.model import Array, Model
from graphprune.options import Options
from graphprune.planning import Judged, decide, refine_steps, settled
from graphprune.repair.damage import silent
from graphprune.runtime import Feeds, random_inputs, run_session, session
from graphprune.scoring import scorer_of
from graphprune.study import Progress, Study, refined, repaired

SPREAD = 0.5  # standard deviation of the logarithm by which a group's curve is first scaled
FOUND, MISSED = 1.5, 0.9  # what that is multiplied with after each draw: about one in five succeeds
OF_BLOCKS = (1.0, 0.3, 0.1, np.inf)  # factors on the curve of residual blocks; at last all stay
BISECTIONS = 7  # tries between the smallest and the whole model: steps of less than 1 %
LEAST_SHARE = 0.01  # of the MACs, below which no model is tried
TUNED_BISECTIONS = 4  # tries more where models are tuned as a whole, which takes longer
REACH_OF_TUNING = 0.32  # of the MACs, how much less a tuned model may have
JUDGED, RANDOM = 64, 8  # calibration inputs, else random ones, that compare finished plans


def best_weights(
    studied: Study,
    judged: Judged,
    options: Options,
    share: float | None,
    progress: Progress = silent,
) -> Mapping[int, float]:
    """Factors on the groups' distortion curves, from 1 in ``options.search`` random steps: those
    whose plan's outputs are nearest to the original's on inputs held out ((1+1) evolution strategy
    with the one-fifth rule)."""
    part, held = _split(studied)
    reference = _outputs(studied.original, held)
    rng = np.random.default_rng(options.scoring.seed)

    def found(factors: Mapping[int, float]) -> float:
        model = _candidate(part, judged, options, share, factors)
        pairs = _pairs(reference, model, held)
        return float(np.mean([distortion(a, b) for a, b in pairs]))

    best: Mapping[int, float] = dict.fromkeys(sorted(judged.evidence), 1.0)
    least, step = found(best), SPREAD
    for trial in range(options.search):
        progress((trial + 1) / (options.search + 1))
        draw = {g: f * float(np.exp(step * rng.standard_normal())) for g, f in best.items()}
        value = found(draw)
        step *= FOUND if value < least else MISSED
        if value < least:
            best, least = draw, value
    return best


def smallest_within(
    studied: Study, judged: Judged, options: Options, progress: Progress = silent
) -> float:
    """The least share of the MACs whose model stays within ``options.max_drop``: of accuracy where
    labelled data was given (0.01 is one point), else of the outputs, as relative error on inputs
    that the repair has not seen.

    Raises ``TargetError`` where not even the first step down stays within it.
    """
    most = options.max_drop
    assert most is not None
    part, held = _split(studied) if options.eval_data is None else (studied, [])
    if options.eval_data is not None:
        scorer = scorer_of(options.eval_data, studied.prepared.original)
        dense = scorer(studied.prepared.original, options.threads, options.provider)

        def drop(model: Model) -> float:
            return dense - scorer(model, options.threads, options.provider)
    elif not len(held):
        raise UsageError(
            "--max-drop compares outputs on calibration inputs, and nothing here looks at any",
            hint=f"Give --eval FILE, or leave out {options.by_weights}.",
        )
    else:
        reference = _outputs(studied.original, held)

        def drop(model: Model) -> float:
            pairs = _pairs(reference, model, held)
            return float(np.mean([relative_error(a, b) for a, b in pairs]))

    def within(share: float, tuned: bool) -> bool:
        try:
            decision = decide(part.prepared, judged, options, None, share)
        except TargetError:  # the grid does not reach so far down
            return False
        model = carried(part, judged, decision, options)
        steps = refine_steps(part, decision, options) if tuned else 0
        if steps:
            model = refined(part, model, decision.removed, steps)[0]
        return drop(model) <= most

    tries = BISECTIONS + (TUNED_BISECTIONS if options.refine_steps else 0)
    lowest, highest = LEAST_SHARE, 1.0
    for trial in range(tries):
        progress(trial / tries)
        if trial == BISECTIONS:  # tuned as a whole, as the result will be, it may go further down
            holds = highest == 1.0 or within(highest, tuned=True)
            further = max(LEAST_SHARE, highest - REACH_OF_TUNING)
            lowest, highest = (further, highest) if holds else (highest, 1.0)
        middle = (lowest + highest) / 2
        found = within(middle, tuned=trial >= BISECTIONS)
        lowest, highest = (lowest, middle) if found else (middle, highest)
    if highest == 1.0:
        raise TargetError(
            f"no smaller model stays within --max-drop {most:g}",
            hint="Allow a larger drop, or give more --calib samples.",
        )
    return highest


def settled_blocks(
    studied: Study,
    judged: Judged,
    options: Options,
    share: float | None,
    progress: Progress = silent,
) -> tuple[Judged, tuple[str, ...]]:
    """What was judged, with the curve of residual blocks multiplied by the one of ``OF_BLOCKS``
    whose plan's outputs, on inputs held out, are nearest to the original's: a block's loss was
    measured before what leads into it was repaired, and how much that makes up for shows here
    alone. So blocks leave only where that is better than taking channels and heads alone."""
    assert studied.inputs is not None
    analysis = studied.prepared.analysis
    if not analysis.coupling.groups or not len(split(studied.inputs.feeds)[1]):
        return judged, ()
    part, held = _split(studied)
    reference = _outputs(studied.original, held)
    found: dict[bytes, tuple[float, float, int]] = {}  # what leaves → error, factor, blocks gone
    for trial, factor in enumerate(OF_BLOCKS):
        progress(trial / len(OF_BLOCKS))
        weights = {BLOCKS: factor}
        try:
            decision = decide(part.prepared, judged, options, None, share, weights)
        except TargetError:  # out of reach without blocks
            continue
        if (key := decision.removed.tobytes()) in found:
            continue
        pairs = _pairs(reference, carried(part, judged, decision, options), held)
        error = float(np.mean([distortion(a, b) for a, b in pairs]))
        units = analysis.coupling.blocks
        found[key] = error, factor, int(decision.removed[units[units >= 0]].sum())
    if not found:  # layers of lower rank may reach further
        return judged, ()
    factor = min(found.values())[1]
    curves = {g: e for g, e in judged.evidence.items() if g != BLOCKS}
    if np.isfinite(factor):
        blocks = judged.evidence[BLOCKS]
        curves[BLOCKS] = replace(blocks, curve=blocks.curve * factor)
    count = int((analysis.coupling.blocks >= 0).sum())
    best = {bool(gone): (error, gone) for error, _, gone in sorted(found.values(), reverse=True)}
    least = [
        f"{error:.3g} with {f'{gone} of {count} blocks gone' if gone else 'all blocks'}"
        for error, gone in (best[some] for some in (True, False) if some in best)
    ]
    note = f"distortion on inputs held out: {', '.join(least)}"
    return replace(judged, evidence=curves), (note,)


def error_on(studied: Study) -> Callable[[Model], float]:
    """The mean relative error of a model's outputs against the original's: on calibration inputs
    (``JUDGED`` rows of them), on ``RANDOM`` random ones where there are none. The original runs
    once."""
    feeds = judged_inputs(studied)
    reference: list[list[Array]] = []

    def error(model: Model) -> float:
        if not reference:
            reference.extend(_outputs(studied.prepared.original, feeds))
        pairs = zip(reference, _outputs(model, feeds), strict=True)
        return float(np.mean([relative_error(a, b) for a, b in pairs]))

    return error


@dataclass(frozen=True)
class Nearness:
    """How near a model's outputs are to the original's: their mean distortion, the divergence of
    its predictions and the share of rows with the same largest class score (0 and 1 where there
    are no classes), and each row's error."""

    distortion: float
    divergence: float
    agreement: float
    rows: Array


def held_out(studied: Study, options: Options) -> tuple[Study, Callable[[Model], Nearness]]:
    """The study on most of its inputs, and how near a model is on the rest: on all of them where
    nothing is repaired, on random ones where there are none."""
    if studied.inputs is None:
        part, held = studied, judged_inputs(studied)
    elif options.repair_name == "none":
        part, held = studied, studied.inputs.feeds
    else:
        part, held = _split(studied)
    reference = _outputs(studied.original, held)

    def near(model: Model) -> Nearness:
        pairs = list(_pairs(reference, model, held))
        return Nearness(
            float(np.mean([distortion(a, b) for a, b in pairs])),
            float(np.mean([divergence(a, b) for a, b in pairs])),
            float(np.mean([agreement(a, b) for a, b in pairs])),
            np.concatenate([row_errors(a, b) for a, b in pairs]),
        )

    return part, near


def judged_inputs(studied: Study) -> Sequence[Feeds]:
    """``JUDGED`` rows of the calibration inputs, else ``RANDOM`` random ones."""
    prepared = studied.prepared
    if studied.inputs is None:
        seeds = range(studied.seed, studied.seed + RANDOM)
        return [random_inputs(prepared.original, prepared.analysis.shapes, s) for s in seeds]
    chosen: list[Feeds] = []
    rows = 0
    for feed in studied.inputs.feeds:
        if rows >= JUDGED:
            break
        chosen.append(feed)
        rows += rows_of_feed(feed)
    return chosen


def rows_of_feed(feed: Feeds) -> int:
    """How many samples a feed holds."""
    return max((len(array) for array in feed.values() if np.ndim(array)), default=1)


def _split(studied: Study) -> tuple[Study, Sequence[Feeds]]:
    """The study on four fifths of its inputs, and the rest."""
    if studied.inputs is None:
        return studied, []
    fit, held = split(studied.inputs.feeds)
    if not len(held):
        raise UsageError(
            "too few calibration inputs to hold some out",
            studied.inputs.source,
            "Plans are compared on inputs that none was made with: give more with --samples, or "
            "in --calib.",
        )
    return replace(studied, inputs=replace(studied.inputs, feeds=fit)), held


def _candidate(
    studied: Study,
    judged: Judged,
    options: Options,
    share: float | None,
    weights: Mapping[int, float] | None,
) -> Model:
    """The model that a plan would give, cut and repaired."""
    decision = decide(studied.prepared, judged, options, None, share, weights)
    return carried(studied, judged, decision, options)


def carried(studied: Study, judged: Judged, decision: Decision, options: Options) -> Model:
    """The model that a decision gives, cut and repaired."""
    studied, _, decision = settled(studied, judged, decision)
    return candidate(studied, decision.removed, options)


def candidate(studied: Study, removed: Mask, options: Options) -> Model:
    """The model without ``removed``, cut and repaired."""
    prepared = studied.prepared
    analysis = prepared.analysis
    alive = analysis.coupling.alive(removed)
    model = cut(analysis.model, analysis.shapes, analysis.coupling, alive)[0]
    if options.repair_name == "none":
        return model
    return repaired(studied, prepared.registry.repair(options.repair_name), model, removed)[0]


def _outputs(model: Model, feeds: Sequence[Feeds]) -> list[list[Array]]:
    runner = session(model)
    return [run_session(runner, fitted(model, feed)) for feed in feeds]


def _pairs(
    reference: Sequence[list[Array]], model: Model, feeds: Sequence[Feeds]
) -> Iterator[tuple[list[Array], list[Array]]]:
    """The original's outputs, as far as the model still has them, and the model's own."""
    names = [value.name for value in model.outputs]
    for expected, actual in zip(reference, _outputs(model, feeds), strict=True):
        yield list(fitted(model, dict(zip(names, expected, strict=True))).values()), actual
