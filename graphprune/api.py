"""The Python door: ``prune`` and its steps, each usable alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx

from graphprune.analysis import Analysis, Scope, pinned_reasons
from graphprune.budget import SLACK, Decision, allocate
from graphprune.coupling import Mask
from graphprune.criteria import score
from graphprune.errors import (
    AccuracyGateError,
    LatencyGateError,
    NothingPrunableError,
    UsageError,
)
from graphprune.model import Model
from graphprune.options import Options
from graphprune.output import check_data, check_outputs, write_result
from graphprune.pipeline import Context, Pass, PassResult, Pipeline
from graphprune.plan import Plan, make_plan, removed_units
from graphprune.plugins import Registry, collect, installed
from graphprune.result import Result, Summary
from graphprune.runtime import random_inputs, run_session, session
from graphprune.storage import load, source_bytes
from graphprune.targets import choose
from graphprune.validate import Verdict, measure, read_labelled, verify
from graphprune.version import __version__

MARGIN = 64  # bytes kept free when a file's size is the budget
Stage = Callable[[str], AbstractContextManager[object]]


@dataclass(frozen=True)
class Prepared:
    """A loaded model, the normal form that is analysed, and what was installed around it."""

    original: Model
    analysis: Analysis
    context: Context
    registry: Registry
    original_bytes: int


class _Clock:
    """Seconds per named stage; each stage also shows on the caller's progress display."""

    def __init__(self, stage: Stage | None) -> None:
        self.stage = stage or (lambda name: nullcontext())
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        with self.stage(name):
            done = work()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        return done


def registry() -> Registry:
    """What all installed plug-ins offer."""
    return collect(installed())


def prepare(
    model: str | Path | onnx.ModelProto, scope: Scope | None = None, offered: Registry | None = None
) -> Prepared:
    """Load a model, bring constants into one form, and analyse it."""
    original = load(model)
    return analyse(original, source_bytes(model, original), scope, offered)


def analyse(
    original: Model,
    original_bytes: int,
    scope: Scope | None = None,
    offered: Registry | None = None,
) -> Prepared:
    """As ``prepare``, from a loaded model."""
    offered = offered or registry()
    for name, shape in ((scope.input_shapes if scope else None) or {}).items():
        if min(shape, default=1) < 1:
            raise UsageError(f"--input-shape {list(shape)} has a size below 1", name)
    context = Context(rules=offered.rules, scope=scope or Scope())
    normal = Pipeline(offered.prepare).run(original, context).model
    return Prepared(original, context.analysis(normal), context, offered, original_bytes)


def plan(prepared: Prepared, options: Options, margin_bytes: float = 0.0) -> tuple[Plan, Decision]:
    """Score the units and choose which leave.

    The file may weigh ``margin_bytes`` less than asked for: what the cut itself adds to it.
    """
    budgets = options.budgets()
    analysis = prepared.analysis
    criterion = prepared.registry.criterion(options.criterion)
    target = choose(
        prepared.registry.targets, options.hardware, options.round_to, options.min_channels
    )
    scores = score(analysis.model, analysis.coupling, criterion, options.scoring)
    limits = dict(budgets)
    if limits.get("bytes", 1.0) < 1:  # the share is of the user's file, not of the normal form
        modelled = analysis.cost.of(analysis.nothing_removed).bytes
        allowed = limits["bytes"] * prepared.original_bytes - margin_bytes
        limits["bytes"] = min(1.0, allowed / modelled)
    try:
        decision = allocate(analysis, scores, target, limits, options.spread, options.allow_miss)
    except NothingPrunableError as error:
        raise _explained(error, prepared) from error
    written = {
        "budgets": budgets,
        "criterion": options.criterion,
        "reduce": options.scoring.reduce,
        "aggregate": options.scoring.aggregate,
        "normalise": options.scoring.normalise or criterion.normalise,
        "seed": options.scoring.seed,
        "spread": options.spread,
        "target": target.name,
        "multiple": dict(decision.grid.multiple),
        "min_channels": decision.grid.minimum,
        "protect": list(options.protect),
        "only": list(options.only),
        "input_shapes": {k: list(v) for k, v in (options.input_shapes or {}).items()},
        "graphprune": __version__,
    }
    asked = ", ".join(f"{kind} <= {share:g}" for kind, share in budgets.items())
    reason = f"lowest {options.criterion} scores until {asked}"
    return make_plan(analysis, decision.removed, scores, written, reason), decision


def _explained(error: NothingPrunableError, prepared: Prepared) -> NothingPrunableError:
    """Where everything is pinned: a model that cannot run at all is the better answer."""
    analysis = prepared.analysis
    runner = session(prepared.original, optimise=False)
    run_session(runner, random_inputs(prepared.original, analysis.shapes))
    reasons = [f"{pin.reason} ({pin.macs:.0%})" for pin in pinned_reasons(analysis)[:3]]
    unknown = _unknown_notes(analysis)[:3]
    return NothingPrunableError(error.what, "; ".join([*unknown, *reasons]), error.hint)


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

    ``flops``, ``params`` and ``size`` are shares in (0, 1] that may remain; the other keywords are
    the fields of ``Options``. With ``output`` the result is also written there.

    >>> result = prune("models/fashion_resnet.onnx", flops=0.5)      # doctest: +SKIP
    >>> print(result)                                                # doctest: +SKIP
    """
    chosen = Options.of(flops=flops, **options)
    chosen.budgets()
    check_outputs(model, output, plan_out)
    clock = _Clock(stage)
    original = clock("load", lambda: load(model))
    check_data(original, output)
    size = source_bytes(model, original)
    prepared = clock("analyse", lambda: analyse(original, size, chosen.scope))
    made, decision = clock("plan", lambda: plan(prepared, chosen))
    done: PassResult = clock("cut", lambda: _cut(prepared, made))
    if chosen.size is not None:
        made, decision, done = _to_the_byte(prepared, chosen, made, decision, done, clock)
    result = _judge(prepared, made, done, decision.removed, chosen, clock, decision.notes)
    return write_result(result, done.model, output, plan_out, clock)


def _to_the_byte(
    prepared: Prepared,
    options: Options,
    made: Plan,
    decision: Decision,
    done: PassResult,
    clock: _Clock,
) -> tuple[Plan, Decision, PassResult]:
    """Plan again with what the cut adds to the file, or takes from it, known from a first cut."""
    assert options.size is not None
    share = done.model.stored_bytes / prepared.original_bytes
    if options.size == 1 or options.size - SLACK <= share <= options.size:
        return made, decision, done
    predicted = prepared.analysis.cost.of(decision.removed).bytes
    margin = done.model.stored_bytes - predicted + MARGIN
    made, decision = clock("plan", lambda: plan(prepared, options, margin))
    return made, decision, clock("cut", lambda: _cut(prepared, made))


def apply(
    model: str | Path | onnx.ModelProto,
    made: Plan,
    *,
    output: str | Path | None = None,
    stage: Stage | None = None,
    options: Options | None = None,
) -> Result:
    """Cut ``model`` as a plan says; a plan for another model is refused."""
    check_outputs(model, output, None)
    clock = _Clock(stage)
    shapes = {k: tuple(v) for k, v in made.options.get("input_shapes", {}).items()}
    chosen = replace(
        options or Options(),
        protect=tuple(made.options.get("protect", ())),
        only=tuple(made.options.get("only", ())),
        input_shapes=shapes,
    )
    original = clock("load", lambda: load(model))
    check_data(original, output)
    size = source_bytes(model, original)
    prepared = clock("analyse", lambda: analyse(original, size, chosen.scope))
    removed = removed_units(made, prepared.analysis)
    done: PassResult = clock("cut", lambda: _cut(prepared, made))
    result = _judge(prepared, made, done, removed, chosen, clock, ())
    return write_result(result, done.model, output, None, clock)


def _cut(prepared: Prepared, made: Plan) -> PassResult:
    passes = prepared.registry.passes
    steps: tuple[Pass, ...] = (passes["remove_channels"](made), passes["share_vectors"]())
    return Pipeline(steps).run(prepared.analysis.model, prepared.context)


def _judge(
    prepared: Prepared,
    made: Plan,
    done: PassResult,
    removed: Mask,
    options: Options,
    clock: _Clock,
    notes: Sequence[str],
) -> Result:
    """Verify, measure, hold against the gates, and sum up."""
    analysis = prepared.analysis
    error = None
    if options.verify:
        seed = options.scoring.seed
        error = clock("verify", lambda: verify(analysis, done.model, removed, seed))
    verdict = Verdict()
    if options.measure or options.eval_data is not None:
        verdict = clock("measure", lambda: _measure(prepared, done.model, options))
    verdict = replace(verdict, relative_error=error, passed=None if error is None else True)
    _gates(verdict, options)
    before, after = _summaries(prepared, done.model, removed, verdict)
    return Result(
        done.model.assemble(),
        made,
        done.changes,
        verdict,
        before,
        after,
        tuple(pinned_reasons(analysis)),
        analysis.cost.in_reach("macs"),
        (*analysis.shapes.notes, *_unknown_notes(analysis), *notes),
        clock.seconds,
    )


def _measure(prepared: Prepared, result: Model, options: Options) -> Verdict:
    labelled = None
    if options.eval_data is not None:
        labelled = read_labelled(options.eval_data, prepared.original)
    return measure(
        prepared.original,
        result,
        prepared.analysis.shapes,
        seed=options.scoring.seed,
        threads=options.threads,
        provider=options.provider,
        rounds=options.rounds if options.measure else 0,
        labelled=labelled,
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


def _summaries(
    prepared: Prepared, result: Model, removed: Mask, verdict: Verdict
) -> tuple[Summary, Summary]:
    cost = prepared.analysis.cost
    costs = (cost.of(prepared.analysis.nothing_removed), cost.of(removed))
    sizes = (prepared.original_bytes, result.stored_bytes)
    latency = verdict.latency or (None, None)
    accuracy = verdict.accuracy or (None, None)
    first, second = (
        Summary(c.macs, c.params, s, ms, acc)
        for c, s, ms, acc in zip(costs, sizes, latency, accuracy, strict=True)
    )
    return first, second


def _unknown_notes(analysis: Analysis) -> list[str]:
    return [
        f"no rule for {name}: {len(nodes)} node(s) pinned, first {nodes[0]!r}"
        for name, nodes in sorted(analysis.relations.unknown.items())
    ]
