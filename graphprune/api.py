"""The Python door: ``prune`` and its steps, each usable alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import onnx

from graphprune.analysis import inexact, pinned_reasons
from graphprune.budget import SLACK, Decision
from graphprune.cache import Cache, beside
from graphprune.cost import count_params
from graphprune.coupling import USUAL_UNITS, Mask
from graphprune.criteria import Scoring
from graphprune.errors import (
    AccuracyGateError,
    GraphPruneError,
    LatencyGateError,
    TargetError,
    UsageError,
    VerificationError,
)
from graphprune.interface import reshaped
from graphprune.memory import fitted, too_large
from graphprune.model import Model
from graphprune.options import Options
from graphprune.output import check_data, check_outputs, write_result
from graphprune.pace import PACED_ROUNDS, Paced, held, in_milliseconds, paced, timed
from graphprune.pipeline import Change, Pass, PassResult, Pipeline
from graphprune.plan import Plan, removed_units
from graphprune.planning import FALLBACK, Judged, decide, judge, rehearse, written
from graphprune.prepared import Prepared, analyse, prepare, registry
from graphprune.repair.damage import Repaired, silent
from graphprune.result import Result, Summary
from graphprune.search import best_weights, error_on, smallest_within
from graphprune.storage import load, source_bytes
from graphprune.study import Progress, Study, repaired, study
from graphprune.targets import choose
from graphprune.validate import Proof, Verdict, measure, scorer_of, verify, verify_normal

__all__ = ["analyse", "apply", "plan", "prepare", "prune", "prune_each", "registry"]

MARGIN = 64  # bytes kept free when a file's size is the budget
MISSED = (TargetError, VerificationError, AccuracyGateError, LatencyGateError)  # one plan's own
Stage = Callable[[str], AbstractContextManager[Progress]]
Done = TypeVar("Done")


class Clock:
    """Seconds per named stage; each stage also shows on the caller's progress display."""

    def __init__(self, stage: Stage | None) -> None:
        self.stage = stage or (lambda name: nullcontext(silent))
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, work: Callable[[Progress], Done]) -> Done:
        start = time.perf_counter()
        with self.stage(name) as progress:
            done = work(progress)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        return done


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
    chosen = Options.of(flops=flops, **options)
    chosen.check()
    check_outputs(model, output, plan_out)
    clock = Clock(stage)
    studied, chosen = _studied(model, output, chosen, clock)
    judged = clock("score", lambda progress: judge(studied, chosen, progress))
    result = _pruned(studied, judged, chosen, clock)
    clock("save", lambda _: write_result(result, result.made, output, plan_out))
    return replace(result, seconds=dict(clock.seconds))


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
    studied, chosen = _studied(model, outputs[0], variants[0], clock)
    for output in outputs:
        check_data(studied.prepared.original, output)
    judged = clock("score", lambda progress: judge(studied, chosen, progress))
    error_of = error_on(studied)
    for each, output in zip(asked, outputs, strict=True):
        yield _one_of_several(studied, judged, replace(chosen, **each), output, error_of, clock)


def _one_of_several(
    studied: Study,
    judged: Judged,
    options: Options,
    output: Path | None,
    error_of: Callable[[Model], float],
    shared: Clock,
) -> tuple[Result | GraphPruneError, float | None]:
    clock = Clock(shared.stage)
    try:
        result = _pruned(studied, judged, options, clock)
    except MISSED as failure:
        return failure, None
    error = clock("measure", lambda _: error_of(result.made)) if options.measure else None
    clock("save", lambda _: write_result(result, result.made, output, None))
    return replace(result, seconds=dict(clock.seconds)), error


def plan(prepared: Prepared, options: Options) -> tuple[Plan, Decision]:
    """Score the units and choose which leave; nothing is cut."""
    studied = study(prepared, options)
    judged = judge(studied, options)
    decision = decide(prepared, judged, options)
    return written(studied, judged, decision, options), decision


def _studied(
    model: str | Path | onnx.ModelProto,
    output: str | Path | None,
    options: Options,
    clock: Clock,
    wanted: bool = True,
) -> tuple[Study, Options]:
    """Load and analyse; then, unless the plan is there already, see that one is possible at all
    before minutes go into calibration."""
    original = clock("load", lambda _: load(model))
    check_data(original, output)
    options, notes = fitted(options, original)
    size = source_bytes(model, original)
    cache = Cache(beside(model) if options.cache else None)
    prepared = clock("analyse", lambda _: analyse(original, size, options.scope, cache=cache))
    if wanted and options.timed:
        if too_large(original):
            raise UsageError(
                "the model is too large to be run here, and so to be timed",
                "--target-latency",
                "Give another budget.",
            )
        prepared = clock("time", lambda _: timed(prepared, options))
        options = in_milliseconds(prepared, options)
    if options.eval_data is not None:
        scorer_of(options.eval_data, original)  # a wrong file is said now, not after minutes
    needed = options.needs_inputs(prepared.registry)
    if needed and too_large(original):
        raise UsageError(
            "the model is too large to be run here",
            f"--criterion {options.criterion_name} with --repair {options.repair_name} runs it",
            "Leave them out, or choose ones that look at weights alone.",
        )
    if wanted and needed:
        clock("plan", lambda _: rehearse(prepared, options))
    studied = clock("calibrate", lambda progress: study(prepared, options, progress))
    return replace(studied, notes=(*notes, *studied.notes)), options


def _pruned(studied: Study, judged: Judged, options: Options, clock: Clock) -> Result:
    """Search where that is asked for, then plan, cut, prove, repair and measure."""
    share, weights = None, None
    if options.max_drop is not None:
        share = clock(
            "search", lambda progress: smallest_within(studied, judged, options, progress)
        )
    if options.search:
        weights = clock(
            "search", lambda progress: best_weights(studied, judged, options, share, progress)
        )
    found = None
    if options.latency is not None:
        found = clock("pace", lambda progress: paced(studied.prepared, judged, options, progress))
    made = _made(studied, judged, options, clock, share, weights, found)
    return _judge(studied, made, options, clock, found)


@dataclass(frozen=True)
class _Made:
    """A plan carried out: the model cut, proved, and repaired."""

    plan: Plan
    decision: Decision
    model: Model
    changes: tuple[Change, ...]
    repairs: tuple[Repaired, ...]
    proof: Proof | None


def _made(
    studied: Study,
    judged: Judged,
    options: Options,
    clock: Clock,
    share: float | None,
    weights: Mapping[int, float] | None,
    found: Paced | None = None,
) -> _Made:
    """Decide, cut, prove and repair; once more where the file or the parameters of the result are
    not what the cost model counted and the budget is on them."""
    prepared = studied.prepared

    def attempt(margins: Mapping[str, float]) -> _Made:
        decision = clock(
            "plan", lambda _: decide(prepared, judged, options, margins, share, weights)
        )
        plan = clock("plan", lambda _: written(studied, judged, decision, options, share))
        return _carried_out(studied, plan, decision, options, clock)

    known = found.margins if found is not None else {}
    made = attempt(known)
    missed = _missed(studied, made, options) if share is None else {}
    return attempt({**known, **missed}) if missed else made


def _missed(studied: Study, made: _Made, options: Options) -> dict[str, float]:
    """What the result has beyond the cost model's count, where it misses a budget by that."""
    asked = options.budgets()
    predicted = studied.prepared.analysis.cost.of(made.decision.removed)
    before = studied.prepared.analysis.cost.of(studied.prepared.analysis.nothing_removed)
    own = {"bytes": made.model.stored_bytes, "params": count_params(made.model)}
    whole = {"bytes": studied.prepared.original_bytes, "params": before.params}
    for kind in own.keys() & asked.keys():
        share = own[kind] / max(whole[kind], 1)
        if asked[kind] < 1 and not asked[kind] - SLACK <= share <= asked[kind]:
            return {kind: own[kind] - predicted.of(kind) + MARGIN for kind in own}
    return {}


def _carried_out(
    studied: Study, plan: Plan, decision: Decision, options: Options, clock: Clock
) -> _Made:
    prepared = studied.prepared
    passes = prepared.registry.passes
    remove, share = passes["remove_channels"](plan), passes["share_vectors"]()
    steps = [remove, *prepared.apart(plan.options.get("slow_fusions", ()))]
    done = clock("cut", lambda _: _run(prepared, steps, prepared.analysis.model))
    proof = None
    if options.verify:  # law 3 holds for the cut itself, so before any weight is repaired
        proof = clock(
            "verify", lambda _: _verified(prepared, done.model, decision.removed, options)
        )
    model = done.model
    repairs: tuple[Repaired, ...] = ()
    name = plan.options.get("repair", "none")
    if name != "none":
        repair = prepared.registry.repair(name)
        model, repairs = clock(
            "repair",
            lambda progress: repaired(studied, repair, done.model, decision.removed, progress),
        )
    shared = _run(prepared, [share], model.opened)
    changes = (*done.changes, *shared.changes)
    return _Made(plan, decision, shared.model.closed, changes, repairs, proof)


def apply(
    model: str | Path | onnx.ModelProto,
    made: Plan,
    *,
    output: str | Path | None = None,
    stage: Stage | None = None,
    options: Options | None = None,
) -> Result:
    """Cut ``model`` as a plan says and repair it as the plan does; a plan for another model, or one
    repaired on other calibration inputs, is refused."""
    check_outputs(model, output, None)
    clock = Clock(stage)
    given = made.options
    _check_planned(given)
    shapes = {k: tuple(v) for k, v in given.get("input_shapes", {}).items()}
    inputs = _planned_inputs(given)
    chosen = replace(
        options or Options(),
        criterion=FALLBACK,  # nothing is scored again: only the repair may need inputs
        repair=str(given.get("repair", "none")),
        samples=inputs.get("samples"),
        preprocess=inputs.get("preprocess"),
        scoring=Scoring(seed=int(given.get("seed", 0))),
        protect=tuple(given.get("protect", ())),
        only=tuple(given.get("only", ())),
        units=tuple(given.get("units", USUAL_UNITS)),
        allow_interface_change=bool(given.get("allow_interface_change")),
        allow_inexact=bool(given.get("allow_inexact")),
        input_shapes=shapes,
    )
    if chosen.repair == "none":
        inputs, chosen = {}, replace(chosen, calib=None)
    if not inputs.get("synthesised", True) and chosen.calib is None:
        raise UsageError(
            f"the plan was repaired on {inputs['source']}",
            hint="Give the same inputs with --calib.",
        )
    studied, chosen = _studied(model, output, chosen, clock, wanted=False)
    removed = removed_units(made, studied.prepared.analysis)
    if inputs and studied.inputs is not None and studied.inputs.key != inputs.get("key"):
        raise UsageError(
            "the calibration inputs are not those of the plan",
            f"{studied.inputs.source}; the plan's were {inputs['source']}",
            "Give the same --calib, or make a new plan.",
        )
    target = choose(studied.prepared.registry.targets, "generic")
    done = _carried_out(studied, made, Decision(removed, target), chosen, clock)
    result = _judge(studied, done, chosen, clock)
    clock("save", lambda _: write_result(result, done.model, output, None))
    return replace(result, seconds=dict(clock.seconds))


def _check_planned(given: Mapping[str, Any]) -> None:
    """Options that a plan repeats are of the types that the program writes."""
    lists = [given.get(key, []) for key in ("protect", "only", "units")]
    shapes = given.get("input_shapes", {})
    numbers = [given.get("seed", 0)]
    sound = isinstance(shapes, dict) and all(isinstance(sizes, list) for sizes in shapes.values())
    if sound:
        numbers += [size for sizes in shapes.values() for size in sizes]
    sound = sound and all(isinstance(names, list | tuple) for names in lists)
    sound = sound and all(isinstance(name, str) for names in lists for name in names)
    if not sound or not all(type(n) is int and n >= 0 for n in numbers):
        raise UsageError("the plan's options are malformed", hint="Make a new plan.")


def _planned_inputs(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The calibration inputs that a plan names, checked; empty where it names none."""
    inputs = given.get("calibration")
    if not inputs:
        return {}
    wanted = {"source": str, "key": str, "samples": int, "synthesised": bool}
    if not isinstance(inputs, dict) or not all(
        isinstance(inputs.get(key), kind) for key, kind in wanted.items()
    ):
        raise UsageError("the plan's calibration inputs are malformed", hint="Make a new plan.")
    return inputs


def _verified(prepared: Prepared, result: Model, removed: Mask, options: Options) -> Proof:
    seed = options.scoring.seed
    if prepared.moved:
        verify_normal(prepared.original, prepared.analysis, seed)
    return verify(prepared.analysis, result, removed, seed)


def _run(prepared: Prepared, steps: Sequence[Pass], model: Model) -> PassResult:
    return Pipeline(tuple(steps)).run(model, prepared.context)


def _judge(
    studied: Study, made: _Made, options: Options, clock: Clock, found: Paced | None = None
) -> Result:
    """Measure, hold against the gates, and sum up."""
    prepared = studied.prepared
    analysis = prepared.analysis
    verdict = Verdict()
    if options.measure or options.eval_data is not None:
        verdict = clock("measure", lambda _: _measure(prepared, made.model, options))
    pace: tuple[str, ...] = ()
    if found is not None:
        verdict, pace = clock("measure", lambda _: held(prepared, made.model, verdict, options))
        pace = (found.note, *pace)
    if made.proof is not None:
        proof = made.proof
        verdict = replace(
            verdict,
            relative_error=proof.error,
            passed=True,
            rounding=proof.rounding,
            shift=proof.shift,
        )
    _gates(verdict, options)
    before, after = _summaries(prepared, made, verdict)
    unseen = prepared.quantised_notes if options.repair_name != "none" else []
    inside = [] if studied.inputs is None else prepared.body_notes
    return Result(
        made.model,
        made.plan,
        made.changes,
        verdict,
        before,
        after,
        tuple(pinned_reasons(analysis)),
        analysis.cost.in_reach("macs"),
        (
            *analysis.shapes.notes,
            *prepared.notes,
            *unseen,
            *inside,
            *made.decision.notes,
            *pace,
            *studied.notes,
        ),
        clock.seconds,
        None if studied.inputs is None else studied.inputs.source,
        made.repairs,
        reshaped(prepared.original, made.model),
        tuple(inexact(analysis, made.decision.removed)),
    )


def _measure(prepared: Prepared, result: Model, options: Options) -> Verdict:
    scorer = None
    if options.eval_data is not None:
        scorer = scorer_of(options.eval_data, prepared.original)
    return measure(
        prepared.original,
        result,
        prepared.analysis.shapes,
        seed=options.scoring.seed,
        threads=options.threads,
        provider=options.provider,
        rounds=(PACED_ROUNDS if options.timed else options.rounds) if options.measure else 0,
        scorer=scorer,
    )


def _gates(verdict: Verdict, options: Options) -> None:
    if options.max_accuracy_drop is not None:
        if verdict.accuracy is None:
            raise UsageError(
                "--max-accuracy-drop needs labelled data", hint="Give --eval FILE.npz."
            )
        drop = (verdict.accuracy[0] - verdict.accuracy[1]) * 100
        if drop > options.max_accuracy_drop:
            raise AccuracyGateError(
                f"accuracy fell by {drop:.2f} points, more than {options.max_accuracy_drop:g}",
                hint="Nothing was written. Ask for a larger share, or try another --criterion.",
            )
    if options.min_speedup is not None:
        if verdict.latency_ratio is None:
            raise UsageError("--min-speedup needs the latency measurement")
        speedup = 1 / verdict.latency_ratio[0]
        if speedup < options.min_speedup:
            raise LatencyGateError(
                f"the result is {speedup:.2f}x as fast, less than {options.min_speedup:g}x",
                hint="Nothing was written. Ask for a smaller share, or check --target-hardware.",
            )


def _summaries(prepared: Prepared, made: _Made, verdict: Verdict) -> tuple[Summary, Summary]:
    cost = prepared.analysis.cost
    before, after = cost.of(prepared.analysis.nothing_removed), cost.of(made.decision.removed)
    latency = verdict.latency or (None, None)
    accuracy = verdict.accuracy or (None, None)
    return (
        Summary(
            before.macs,
            before.params,
            prepared.original_bytes,
            latency[0],
            accuracy[0],
            before.memory,
        ),
        Summary(
            after.macs,
            count_params(made.model) if made.repairs else after.params,
            made.model.stored_bytes,
            latency[1],
            accuracy[1],
            after.memory,
        ),
    )
