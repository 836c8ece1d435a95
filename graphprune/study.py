"""A prepared model at work on calibration inputs: evidence for the plan, and repair after it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from graphprune.calibrate.choose import Calibration, calibration, usual_count
from graphprune.calibrate.preprocess import Preprocess, picture_inputs
from graphprune.calibrate.samples import rows_per_run
from graphprune.calibrate.trial import tried
from graphprune.coupling import Group, Mask
from graphprune.criteria import Criterion, Scores
from graphprune.criteria.bypassed import BlockEvidence, weigh_blocks
from graphprune.criteria.evidence import Evidence, gather
from graphprune.criteria.surgeon import Consumer
from graphprune.model import Array, Model
from graphprune.options import Options
from graphprune.prepared import Prepared
from graphprune.repair.damage import Damage, Repair, Repaired, silent
from graphprune.repair.integers import known_to, mended, refined_integers
from graphprune.repair.refine import FEWEST, Lesson, Refined, rows_within
from graphprune.runtime import random_inputs, run_session, session
from graphprune.spelling import spelled

Progress = Callable[[float], None]


@dataclass(frozen=True)
class Study:
    """Calibration inputs (``None`` where weights alone decide) and the model they run through."""

    prepared: Prepared
    original: Model  # the normal form with BatchNormalization folded
    inputs: Calibration | None
    memory: float  # bytes
    seed: int
    notes: tuple[str, ...] = ()  # what a model of this size has to do without


def study(prepared: Prepared, options: Options, progress: Progress = silent) -> Study:
    """Choose, make or open the calibration inputs that the options ask for."""
    analysis = prepared.analysis
    original = prepared.folded(analysis.model)
    studied = Study(prepared, original, None, options.memory * 1e9, options.scoring.seed)
    if not options.needs_inputs(prepared.registry):
        return studied
    unoptimised = session(prepared.original, optimise=False)  # names the node at fault, if any
    run_session(unoptimised, random_inputs(prepared.original, analysis.shapes))
    inputs = calibration(
        options.calib,
        analysis.model.closed,
        analysis.shapes,
        analysis.cost.of(analysis.nothing_removed).macs,
        prepared.cache,
        count=options.samples,
        seed=options.scoring.seed,
        preprocess=None if options.preprocess is None else Preprocess.parse(options.preprocess),
        progress=progress,
    )
    if options.calib is not None:
        where = f"--calib {options.calib}"
        tried(unoptimised, prepared.original, analysis.shapes, inputs.feeds, where)
    return replace(studied, inputs=inputs, notes=inputs.notes)


def announced(prepared: Prepared, options: Options) -> str:
    """What calibration is about to look at, for people who wait."""
    if options.calib is not None and str(options.calib) != "none":
        return f" on {Path(options.calib).name}"
    analysis = prepared.analysis
    macs = analysis.cost.of(analysis.nothing_removed).macs
    kind = "pictures" if picture_inputs(analysis.model.closed, analysis.shapes) else "inputs"
    return f" on {options.samples or usual_count(macs)} made-up {kind}"


def evidence(
    studied: Study, criterion: Criterion, scores: Scores, progress: Progress = silent
) -> dict[int, Evidence]:
    """Evidence by group index. Units leave in the order that the criterion finds on the inputs, or
    in that of ``scores`` where it looks at weights alone."""
    assert studied.inputs is not None
    analysis = studied.prepared.analysis
    groups = analysis.coupling.groups
    plain = spelled(studied.original)
    if plain.replaced:
        analysis = replace(analysis, coupling=known_to(analysis.coupling, plain))

    def order(group: Group, consumers: list[Consumer]) -> NDArray[np.int64] | None:
        if criterion.greedy:
            return None
        if criterion.observed is None:
            return np.argsort(scores[group.units], kind="stable")
        found = np.sum([criterion.observed(consumer) for consumer in consumers], axis=0)
        return np.argsort(found, kind="stable")

    def make() -> Mapping[str, Array]:
        assert studied.inputs is not None
        found = gather(
            analysis,
            plain.model,
            studied.inputs.feeds,
            order,
            memory=studied.memory,
            seed=studied.seed,
            progress=progress,
        )
        arrays = {f"order_{g}": e.order for g, e in found.items()}
        return arrays | {f"curve_{g}": e.curve for g, e in found.items()}

    by_weights = not criterion.greedy and criterion.observed is None
    parts = (
        "evidence",
        plain.model.sha256,
        studied.inputs.key,
        criterion.name,
        studied.seed,
        [(group.name, len(group)) for group in groups],
        hashlib.sha256(scores.tobytes()).hexdigest() if by_weights else "",
    )
    kept = studied.prepared.cache(parts, make)
    indices = [int(name.removeprefix("order_")) for name in kept if name.startswith("order_")]
    return {g: Evidence(kept[f"order_{g}"], kept[f"curve_{g}"]) for g in sorted(indices)}


def block_evidence(studied: Study, progress: Progress = silent) -> BlockEvidence:
    """What the residual blocks that may leave are worth, on the inputs."""
    assert studied.inputs is not None
    analysis = studied.prepared.analysis
    units = analysis.coupling.blocks
    names = [b.name for b, unit in zip(analysis.blocks, units, strict=True) if unit >= 0]

    def make() -> Mapping[str, Array]:
        assert studied.inputs is not None
        feeds = studied.inputs.feeds
        memory = studied.memory
        found = weigh_blocks(analysis, studied.original, feeds, memory=memory, progress=progress)
        order, curve = found.greedy.order, found.greedy.curve
        return {"alone": found.alone, "turn": found.turn, "order": order, "curve": curve}

    parts = ("blocks", studied.original.sha256, studied.inputs.key, names)
    kept = studied.prepared.cache(parts, make)
    return BlockEvidence(kept["alone"], kept["turn"], Evidence(kept["order"], kept["curve"]))


def damage(studied: Study, cut_model: Model, removed: Mask, progress: Progress = silent) -> Damage:
    """What a repair needs to know about a model from which ``removed`` has been cut."""
    analysis = studied.prepared.analysis
    pruned = studied.prepared.folded(cut_model)
    return Damage(
        analysis.model.closed,
        studied.original,
        pruned,
        analysis.shapes,
        analysis.coupling,
        analysis.coupling.alive(removed),
        studied.inputs.feeds if studied.inputs else (),
        studied.memory,
        studied.seed,
        progress,
    )


def refined(
    studied: Study, model: Model, removed: Mask, steps: int, progress: Progress = silent
) -> tuple[Model, Refined]:
    """A repaired model, tuned as a whole in so many steps."""
    assert studied.inputs is not None
    inputs = studied.inputs
    rows = max(FEWEST, rows_within(macs_per_row(studied, removed), steps))
    lesson = Lesson(studied.original, inputs.feeds, inputs.made_up, studied.seed, rows)
    return refined_integers(model, lesson, steps, progress)


def macs_per_row(studied: Study, removed: Mask) -> float:
    """MACs of what is left, for one row of inputs."""
    macs = studied.prepared.analysis.cost.of(removed).macs
    return macs / (rows_per_run(studied.original) or 1)


def repaired(
    studied: Study, repair: Repair, cut_model: Model, removed: Mask, progress: Progress = silent
) -> tuple[Model, tuple[Repaired, ...]]:
    """The cut model with repaired weights; itself where nothing was cut."""
    if not removed.any():
        return cut_model, ()
    return mended(repair, damage(studied, cut_model, removed, progress))
