"""The Python door: ``prune`` and its steps, each usable alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx

from graphprune.budget import Decision
from graphprune.cache import Cache, beside
from graphprune.carry_out import carry_out, make
from graphprune.clock import Clock, Stage
from graphprune.early import check_early
from graphprune.errors import (
    AccuracyGateError,
    GraphPruneError,
    LatencyGateError,
    TargetError,
    UsageError,
    VerificationError,
)
from graphprune.ladders import BLOCKS
from graphprune.low_rank import Way, settled_ranks
from graphprune.memory import fitted, too_large
from graphprune.model import Model
from graphprune.options import Options
from graphprune.output import check_data, check_outputs, write_result
from graphprune.pace import in_milliseconds, paced, timed
from graphprune.plan import Plan, check_model, read_plan
from graphprune.planning import Judged, decide, judge, planned, rehearse, settled, written
from graphprune.prepared import Prepared, analyse, prepare, registry
from graphprune.replay import replayed
from graphprune.result import Result
from graphprune.scoring import check_eval
from graphprune.search import best_weights, error_on, settled_blocks, smallest_within
from graphprune.storage import load, source_bytes
from graphprune.study import Study, announced, study
from graphprune.summing import sum_up
from graphprune.targets import choose
from graphprune.unconstrained import carried_over, chosen, opened

__all__ = ["analyse", "apply", "plan", "prepare", "prune", "prune_each", "registry"]

MISSED = (TargetError, VerificationError, AccuracyGateError, LatencyGateError)  # one plan's own

NOTHING_TO_VARY = "--search had nothing to vary: nothing that may leave has a distortion curve"


def prune(
    model: str | Path | onnx.ModelProto,
    flops: float | None = None,
    *,
    output: str | Path | None = None,
    plan_out: str | Path | None = None,
    stage: Stage | None = None,
    **options: Any,
) -> Result:
    """Prune ``model`` to a budget.

    ``flops``, ``params``, ``size`` and ``peak_memory`` are shares in (0, 1] that may remain; the
    other keywords are the fields of ``Options``. With ``output`` the result is also written there.

    >>> result = prune("models/fashion_resnet.onnx", flops=0.5)      # doctest: +SKIP
    >>> print(result)                                                # doctest: +SKIP
    """
    wanted = Options.of(flops=flops, **options)
    wanted.check()
    check_outputs(model, output, plan_out)
    clock = Clock(stage)
    studied, wanted = _studied(model, output, wanted, clock)
    judged = clock("score", lambda progress: judge(studied, wanted, progress))
    result = _pruned(studied, judged, wanted, clock)
    replaced = clock("save", lambda _: write_result(result, result.made, output, plan_out))
    return replace(result, seconds=clock.spent(), replaced=replaced)


def prune_each(
    model: str | Path | onnx.ModelProto,
    asked: Sequence[Mapping[str, Any]],
    outputs: Sequence[Path | None],
    clock: Clock,
    **options: Any,
) -> Iterator[tuple[Result | GraphPruneError, float | None]]:
    """As ``prune`` for each of several budgets, from one analysis, one set of calibration inputs
    and one set of scores: the result, and the error of its outputs (``search.error_on``) where it
    was to be measured.

    ``asked`` are the options in which they differ, the least demanding first: what that one cannot
    have is an error; what another cannot have comes in place of its result. ``clock`` takes the
    seconds of what all share, a result those of its own.
    """
    variants = [Options.of(**{**options, **each}) for each in asked]
    for variant, output in zip(variants, outputs, strict=True):
        variant.check()
        check_outputs(model, output, None)
    studied, first = _studied(model, outputs[0], variants[0], clock)
    for output in outputs:
        check_data(studied.prepared.original, output)
    judged = clock("score", lambda progress: judge(studied, first, progress))
    error_of = error_on(studied)
    for each, output in zip(asked, outputs, strict=True):
        own = replace(first, **each)
        label = f"{', '.join(f'{value:g}' for value in each.values())}: "
        yield _one_of_several(studied, judged, own, output, error_of, clock, label)


def _one_of_several(
    studied: Study,
    judged: Judged,
    options: Options,
    output: Path | None,
    error_of: Callable[[Model], float],
    shared: Clock,
    label: str,
) -> tuple[Result | GraphPruneError, float | None]:
    clock = Clock(shared.stage, label)
    try:
        result = _pruned(studied, judged, options, clock)
    except MISSED as failure:
        return failure, None
    error = clock("measure", lambda _: error_of(result.made)) if options.measure else None
    replaced = clock("save", lambda _: write_result(result, result.made, output, None))
    return replace(result, seconds=clock.spent(), replaced=replaced), error


def plan(prepared: Prepared, options: Options) -> tuple[Plan, Decision]:
    """Score the units and choose which leave; nothing is cut."""
    studied = study(prepared, options)
    judged = judge(studied, options)
    if "ranks" in options.units:
        way = settled_ranks(studied, Way(judged, None, None), options)
        studied, judged = _noted(studied, way), way.judged
    if options.unconstrained:
        wide = chosen(studied, judged, options, None, None)
        studied, judged = wide.studied, wide.judged
    decision = decide(studied.prepared, judged, options)
    studied, judged, decision = settled(studied, judged, decision)
    return written(studied, judged, decision, options), decision


def _studied(
    model: str | Path | onnx.ModelProto,
    output: str | Path | None,
    options: Options,
    clock: Clock,
    made: Plan | None = None,
) -> tuple[Study, Options]:
    """Load and analyse; then see that a plan is possible at all, or that the one already ``made``
    is for this model, before minutes go into calibration."""
    original = clock("load", lambda _: load(model))
    offered = clock("load", lambda _: registry())
    check_data(original, output)
    check_early(options, original)
    options, notes = fitted(options, original)
    size = source_bytes(model, original)
    cache = Cache(beside(model) if options.cache else None)
    prepared = clock("analyse", lambda _: analyse(original, size, options.scope, offered, cache))
    if made is None and options.timed:
        if too_large(original):
            raise UsageError(
                "the model is too large to be run here, and so to be timed",
                "--target-latency",
                "Give another budget.",
            )
        prepared = clock("time", lambda _: timed(prepared, options))
        options = in_milliseconds(prepared, options)
    plain = prepared  # what makes the calibration inputs, and finds them again
    if options.unconstrained and (options.masks is not None or made is not None):
        # each reader has its own
        prepared = clock("analyse", lambda _: opened(plain)[0])
    if options.eval_data is not None:
        notes = (*notes, *check_eval(options.eval_data, original, prepared.analysis.shapes))
    if made is not None:
        check_model(made, prepared.analysis)
    needed = options.needs_inputs(prepared.registry)
    if needed and too_large(original):
        raise UsageError(
            "the model is too large to be run here",
            f"--criterion {options.criterion_name} with --repair {options.repair_name} runs it",
            "Leave them out, or choose ones that look at weights alone.",
        )
    if made is None and needed:
        clock("plan", lambda _: rehearse(prepared, options))
    if needed:
        more = announced(plain, options)
        studied = clock("calibrate", lambda progress: study(plain, options, progress), more)
    else:
        studied = study(plain, options)
    if prepared is not plain:
        studied = carried_over(studied, prepared)
    return replace(studied, notes=(*notes, *studied.notes)), options


def _pruned(studied: Study, judged: Judged, options: Options, clock: Clock) -> Result:
    """Search where that is asked for, then plan, cut, prove, repair and measure."""
    share, weights = None, None
    if options.max_drop is not None:
        share = clock(
            "search", lambda progress: smallest_within(studied, judged, options, progress)
        )
    if BLOCKS in judged.evidence:
        plain, lower = replace(judged, ranks=None), judged.ranks
        plain, notes = clock(
            "blocks", lambda progress: settled_blocks(studied, plain, options, share, progress)
        )
        judged = replace(plain, ranks=lower)
        studied = replace(studied, notes=(*studied.notes, *notes))
    if options.search and not judged.evidence:
        studied = replace(studied, notes=(*studied.notes, NOTHING_TO_VARY))
    elif options.search:
        weights = clock(
            "search", lambda progress: best_weights(studied, judged, options, share, progress)
        )
    found = None
    if options.latency is not None:
        found = clock("pace", lambda progress: paced(studied.prepared, judged, options, progress))
    if "ranks" in options.units:
        way = Way(judged, share, found)
        way = clock(
            "ranks", lambda progress: settled_ranks(studied, way, options, weights, progress)
        )
        studied, judged, share, found = _noted(studied, way), way.judged, way.share, way.found
    if options.unconstrained:
        wide = clock(
            "unconstrained",
            lambda progress: chosen(studied, judged, options, share, found, progress),
        )
        weights = None if wide.widened else weights  # of other groups
        studied, judged, share, found = wide.studied, wide.judged, wide.share, wide.found
    made = make(studied, judged, options, clock, share, weights, found)
    return sum_up(made.studied, made, options, clock, found)


def _noted(studied: Study, way: Way) -> Study:
    return replace(studied, notes=(*studied.notes, *[way.note] * bool(way.note)))


def apply(
    model: str | Path | onnx.ModelProto,
    made: Plan | str | Path,
    *,
    output: str | Path | None = None,
    stage: Stage | None = None,
    options: Options | None = None,
) -> Result:
    """Cut ``model`` as a plan, or the file of one, says, and repair it as the plan does; a plan for
    another model, or one repaired on other calibration inputs, is refused."""
    made = made if isinstance(made, Plan) else read_plan(Path(made))
    check_outputs(model, output, None)
    clock = Clock(stage)
    options = options or Options()
    options.check_gates()
    given, inputs = replayed(made.options, options)
    studied, given = _studied(model, output, given, clock, made)
    if inputs and studied.inputs is not None and studied.inputs.key != inputs.get("key"):
        raise UsageError(
            "the calibration inputs are not those of the plan",
            f"{studied.inputs.source}; the plan's were {inputs['source']}",
            "Give the same --calib, or make a new plan.",
        )
    studied, removed = clock("plan", lambda _: planned(studied, made))
    target = choose(studied.prepared.registry.targets, "generic")
    done = carry_out(studied, made, Decision(removed, target), given, clock)
    result = sum_up(studied, done, given, clock)
    replaced = clock("save", lambda _: write_result(result, done.model, output, None))
    return replace(result, seconds=clock.spent(), replaced=replaced)
