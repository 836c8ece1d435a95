"""The Python door: ``prune`` and its steps, each usable alone."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx

from graphprune.analysis import Analysis, PinnedReason, Scope, pinned_reasons
from graphprune.budget import SLACK, Decision, allocate
from graphprune.cost import Costs
from graphprune.coupling import Mask
from graphprune.criteria import Scoring, score
from graphprune.errors import (
    AccuracyGateError,
    LatencyGateError,
    NothingPrunableError,
    UsageError,
)
from graphprune.model import Model, load, save, source_bytes
from graphprune.pipeline import Change, Context, Pass, PassResult, Pipeline
from graphprune.plan import Plan, make_plan, removed_units
from graphprune.plugins import Registry, collect, installed
from graphprune.runtime import (
    Timing,
    random_inputs,
    run_session,
    session,
    time_interleaved,
)
from graphprune.shapes import Shape, infer
from graphprune.targets import choose
from graphprune.validate import (
    Verdict,
    compare_outputs,
    measure,
    read_inputs,
    read_labelled,
    verify,
)
from graphprune.version import __version__

MARGIN = 64  # bytes kept free when a file's size is the budget
Stage = Callable[[str], AbstractContextManager[object]]


@dataclass(frozen=True)
class Options:
    """Everything that decides a plan, then everything that decides how it is checked.

    Budgets are the shares of the original's MACs, parameters and file size that may remain.
    """

    flops: float | None = None
    params: float | None = None
    size: float | None = None
    criterion: str = "l1"
    scoring: Scoring = field(default_factory=Scoring)
    spread: str = "balanced"
    hardware: str = "auto"
    round_to: int | None = None
    min_channels: int | None = None
    protect: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    input_shapes: Mapping[str, Shape] | None = None
    allow_miss: bool = False
    verify: bool = True
    measure: bool = True
    rounds: int = 21
    threads: int = 1
    provider: str = "cpu"
    eval_data: Path | None = None
    max_accuracy_drop: float | None = None
    min_speedup: float | None = None

    def budgets(self) -> dict[str, float]:
        """Kind of cost → share that may remain."""
        asked = {"macs": self.flops, "params": self.params, "bytes": self.size}
        budgets = {kind: share for kind, share in asked.items() if share is not None}
        for kind, share in budgets.items():
            if not 0 < share <= 1:
                raise UsageError(
                    f"the {kind} budget is {share:g}", hint="A budget is a share in (0, 1]."
                )
        if not budgets:
            raise UsageError(
                "no budget is given",
                hint="Say how much may remain, for example --target-flops 0.5.",
            )
        if self.spread not in ("global", "uniform", "balanced"):
            raise UsageError(f"--spread {self.spread!r} is unknown", hint="global or uniform")
        return budgets

    @property
    def scope(self) -> Scope:
        return Scope(self.protect, self.only, self.input_shapes)


@dataclass(frozen=True)
class Summary:
    """One side of the comparison."""

    macs: float
    params: float
    bytes: int
    latency_ms: float | None = None
    accuracy: float | None = None


@dataclass(frozen=True)
class Result:
    """The pruned model, the plan that made it, what changed, and what was measured."""

    model: onnx.ModelProto
    plan: Plan
    changes: tuple[Change, ...]
    verdict: Verdict
    before: Summary
    after: Summary
    pinned: tuple[PinnedReason, ...]
    prunable: float  # share of the MACs in groups
    notes: tuple[str, ...]
    seconds: Mapping[str, float]

    def __str__(self) -> str:
        from graphprune.report.terminal import as_text

        return as_text(self)


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
        "multiple": dict(target.multiple),
        "min_channels": target.minimum,
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
    chosen = Options(flops=flops, **options)
    chosen.budgets()
    _check_outputs(model, output, plan_out)
    clock = _Clock(stage)
    original = clock("load", lambda: load(model))
    _check_data(original, output)
    size = source_bytes(model, original)
    prepared = clock("analyse", lambda: analyse(original, size, chosen.scope))
    made, decision = clock("plan", lambda: plan(prepared, chosen))
    done: PassResult = clock("cut", lambda: _cut(prepared, made))
    if chosen.size is not None:
        made, decision, done = _to_the_byte(prepared, chosen, made, decision, done, clock)
    result = _judge(prepared, made, done, decision.removed, chosen, clock, decision.notes)
    return _write(result, done.model, output, plan_out, clock)


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
    _check_outputs(model, output, None)
    clock = _Clock(stage)
    shapes = {k: tuple(v) for k, v in made.options.get("input_shapes", {}).items()}
    chosen = replace(
        options or Options(),
        protect=tuple(made.options.get("protect", ())),
        only=tuple(made.options.get("only", ())),
        input_shapes=shapes,
    )
    original = clock("load", lambda: load(model))
    _check_data(original, output)
    size = source_bytes(model, original)
    prepared = clock("analyse", lambda: analyse(original, size, chosen.scope))
    removed = removed_units(made, prepared.analysis)
    done: PassResult = clock("cut", lambda: _cut(prepared, made))
    result = _judge(prepared, made, done, removed, chosen, clock, ())
    return _write(result, done.model, output, None, clock)


def compare(
    a: str | Path,
    b: str | Path,
    *,
    inputs: Path | None = None,
    input_shapes: Mapping[str, Shape] | None = None,
    seed: int = 0,
) -> tuple[list[tuple[str, Any, Any]], dict[str, Any]]:
    """Structure, costs and outputs of two models on the same inputs: rows and a document."""
    offered = registry()
    scope = Scope(input_shapes=input_shapes)
    sides = [prepare(path, scope, offered) for path in (a, b)]
    first, second = sides
    signatures = [
        [(v.name, v.type.SerializeToString()) for v in (*s.original.inputs, *s.original.outputs)]
        for s in sides
    ]
    if [name for name, _ in signatures[0]] != [name for name, _ in signatures[1]]:
        raise UsageError("the models have other inputs or outputs, so outputs do not compare")
    feeds = random_inputs(first.analysis.model, first.analysis.shapes, seed)
    if inputs is not None:
        feeds = read_inputs(inputs, first.original)
    error = compare_outputs(session(first.original), session(second.original), feeds)
    costs = [s.analysis.cost.of(s.analysis.nothing_removed) for s in sides]
    kinds = [Counter(node.op_type for node in side.original.nodes) for side in sides]
    rows: list[tuple[str, Any, Any]] = [
        ("MACs", f"{costs[0].macs:,.0f}", f"{costs[1].macs:,.0f}"),
        ("parameters", f"{costs[0].params:,.0f}", f"{costs[1].params:,.0f}"),
        ("bytes", f"{first.original_bytes:,}", f"{second.original_bytes:,}"),
        ("nodes", len(first.original.nodes), len(second.original.nodes)),
        ("same interface", "", signatures[0] == signatures[1]),
        ("largest output difference (relative)", "", f"{error:.3g}"),
    ]
    rows += [
        (f"{kind} nodes", kinds[0][kind], kinds[1][kind])
        for kind in sorted(kinds[0] | kinds[1])
        if kinds[0][kind] != kinds[1][kind]
    ]
    shapes = [
        (name, list(tensor.dims), list(second.original.initializers[name].dims))
        for name, tensor in first.original.initializers.items()
        if name in second.original.initializers
    ]
    changed = [row for row in shapes if row[1] != row[2]]
    rows.append(("weights of other shape", "", len(changed)))
    document = {
        "schema": "graphprune.compare/1",
        "graphprune": __version__,
        "a": {**asdict(costs[0]), "bytes": first.original_bytes, "operators": dict(kinds[0])},
        "b": {**asdict(costs[1]), "bytes": second.original_bytes, "operators": dict(kinds[1])},
        "same_interface": signatures[0] == signatures[1],
        "relative_difference": error,
        "weights": [{"name": n, "a": x, "b": y} for n, x, y in changed],
    }
    return rows, document


def bench(
    models: Sequence[str | Path],
    *,
    rounds: int = 51,
    threads: int = 1,
    provider: str = "cpu",
    input_shapes: Mapping[str, Shape] | None = None,
    seed: int = 0,
) -> Timing:
    """Interleaved latencies of several models, each on random inputs of its own signature."""
    loaded = [load(path) for path in models]
    feeds = [random_inputs(m, infer(m, input_shapes), seed) for m in loaded]
    runners = [session(m, threads, provider) for m in loaded]
    return time_interleaved(runners, feeds, rounds, budget_s=60.0)


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
    costs: tuple[Costs, Costs] = (cost.of(prepared.analysis.nothing_removed), cost.of(removed))
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


def _check_outputs(
    model: str | Path | onnx.ModelProto, output: str | Path | None, plan_out: str | Path | None
) -> None:
    """Fail before the work, not after it: folders must exist, the input must survive."""
    named = [Path(path) for path in (output, plan_out) if path is not None]
    if len({path.resolve() for path in named}) < len(named):
        raise UsageError("the model and the plan would be one file", str(named[0]))
    for path in named:
        if not path.parent.is_dir():
            raise UsageError("the output folder does not exist", str(path.parent))
        if path.is_dir():
            raise UsageError("the output is a folder", str(path))
        if not isinstance(model, onnx.ModelProto) and path.resolve() == Path(model).resolve():
            raise UsageError(
                "the output would overwrite the input", str(path), "Choose another -o OUT."
            )


def _check_data(original: Model, output: str | Path | None) -> None:
    """The result's data file must not be the one that holds the input's weights."""
    if output is None:
        return
    written = {Path(output).resolve(), Path(f"{output}.data").resolve()}
    for path in original.data_files:
        if path in written:
            raise UsageError(
                "the output would overwrite the input's weights",
                str(path),
                "Choose another -o OUT.",
            )


def _write(
    result: Result,
    done: Model,
    output: str | Path | None,
    plan_out: str | Path | None,
    clock: _Clock,
) -> Result:
    """Write plan and model, both or neither."""
    if plan_out is not None and output is not None:
        with written_beside(Path(plan_out), result.plan.to_json()):
            clock("save", lambda: save(done, output))
    elif plan_out is not None:
        with written_beside(Path(plan_out), result.plan.to_json()):
            pass
    elif output is not None:
        clock("save", lambda: save(done, output))
    return result


@contextmanager
def written_beside(path: Path, text: str) -> Iterator[None]:
    """Write beside; what happens inside must succeed before the text takes its place."""
    beside = path.with_name(f".{path.name}.part")
    try:
        beside.write_text(text)
        yield
        beside.replace(path)
    except OSError as error:
        raise UsageError(f"cannot write: {error.strerror}", str(path)) from error
    finally:
        beside.unlink(missing_ok=True)
