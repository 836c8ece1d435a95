"""A result measured, held against the gates, and summed up."""

from __future__ import annotations

import math
from dataclasses import replace

from graphprune.analysis import inexact, pinned_reasons
from graphprune.batch_norm import batch_norms
from graphprune.carry_out import Made
from graphprune.clock import Clock
from graphprune.compared import compared
from graphprune.cost import whole
from graphprune.errors import AccuracyGateError, LatencyGateError, ModelError
from graphprune.interface import reshaped
from graphprune.model import Model, label
from graphprune.options import Options
from graphprune.pace import PACED_ROUNDS, Paced, held
from graphprune.plan import Plan
from graphprune.prepared import Prepared
from graphprune.result import Result, Summary
from graphprune.scoring import scorer_of
from graphprune.study import Study
from graphprune.validate import Verdict, measure, openable
from graphprune.wording import counted, listed

NOTHING_IDLE = "lossless: nothing here is dead, constant or a duplicate; the model is as given"
LOST = 2.0  # squared error over the outputs' variance: that between two inputs of the original
STRANGE = 1.0  # largest output difference, likewise, where nothing varies
NO_BUDGET = (
    "no budget was given: nothing else was removed; --target-flops 0.5 asks for half of the MACs"
)


def sum_up(
    studied: Study, made: Made, options: Options, clock: Clock, found: Paced | None = None
) -> Result:
    """Measure, hold against the gates, and sum up."""
    prepared = studied.prepared
    analysis = prepared.analysis
    given = prepared.given or analysis  # layers may be two by now
    verdict = Verdict()
    if options.measure or options.eval_data is not None:
        try:
            verdict = clock("measure", lambda _: _measure(studied, made.model, options))
        except ModelError:
            if made.proof is not None:
                openable(made.model)  # says more of why
            raise
    elif made.proof is not None:
        clock("verify", lambda _: openable(made.model))
    pace: tuple[str, ...] = ()
    if found is not None:
        met = bool(prepared.cleaned) and not made.decision.removed.any()
        verdict, pace = clock(
            "measure", lambda _: held(prepared, made.model, verdict, options, met)
        )
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
    unseen: list[str] = []
    if options.repair_name != "none":
        unseen = [*prepared.quantised_notes, *_shared_note(prepared, made)]
    alone = options.unbudgeted and not prepared.cleaned and not made.decision.removed.any()
    unlost = [NOTHING_IDLE] if alone else []
    said = made.plan.options
    decided = bool(said.get("budgets") or said.get("outside"))  # in the run that made the plan
    unlost += [NO_BUDGET] if options.unbudgeted and not decided else []
    folded = [change for change in made.changes if change.pass_name == "fold_batch_norm"]
    unlost += [f"lossless: {counted(len(folded), 'BatchNormalization')} folded"] if folded else []
    inside = [] if studied.inputs is None else prepared.body_notes
    return Result(
        made.model,
        made.plan,
        made.changes,
        verdict,
        before,
        after,
        tuple(pinned_reasons(given)),
        given.cost.in_reach("macs"),
        (
            *analysis.shapes.notes,
            *prepared.notes,
            *unseen,
            *inside,
            *made.decision.notes,
            *_blocks_note(made.plan),
            *pace,
            *studied.notes,
            *unlost,
            *_strange_note(made, verdict, options),
            *_unrefined_note(made, options),
        ),
        clock.seconds,
        None if studied.inputs is None else studied.inputs.source,
        made.repairs,
        made.tuned,
        reshaped(prepared.original, made.model),
        tuple(inexact(analysis, made.decision.removed)),
        prepared.cleaned if options.scope.lossless else None,
    )


def _shared_note(prepared: Prepared, made: Made) -> list[str]:
    """Which operators lost inputs that no repair makes up for: one for one use of the weights would
    break the others, and the repair asked for knows none for all uses."""
    analysis = prepared.analysis
    model = analysis.model
    repaired = {entry.weight for entry in made.repairs}
    alive = analysis.coupling.alive(made.decision.removed)
    nodes = sorted(
        {
            stated.node
            for stated in analysis.relations.contractions
            if not alive[stated.slots].all()
            and (weight := model.nodes[stated.node].input[stated.input]) in model.initializers
            and len(model.consumers[weight]) > 1
            and weight not in repaired
        }
    )
    if not nodes:
        return []
    first = label(model.nodes[nodes[0]])
    number = counted(len(nodes), "operator")
    verb = "is" if len(nodes) == 1 else "are"
    return [f"{number} whose weights others read too {verb} not repaired, first {first!r}"]


def _unrefined_note(made: Made, options: Options) -> list[str]:
    steps = options.refine_steps
    if options.refine is not None or not steps or made.plan.options.get("refine"):
        return []
    return [f"not refined, which takes long for a model of this size: --refine {steps} does it"]


def _strange_note(made: Made, verdict: Verdict, options: Options) -> list[str]:
    """The cut was proved, but what it removed may be missed: what may help, of what was not done.
    Where accuracy was scored, that says it better, but for outputs that never change."""
    if not made.decision.removed.any():
        return []
    unsaid = verdict.output_difference is not None and math.isinf(verdict.output_difference)
    if unsaid and verdict.accuracy is None and not verdict.constant:
        return [
            f"the cut is verified, but on {verdict.compared_on} an output has another size than "
            "the original's (detections, whose number the data decides), or is infinite where that "
            "is not: the difference says nothing, --eval says what the result is worth on your data"
        ]
    seen = made.studied.inputs is not None
    strange = _strange(verdict)
    if strange is None:
        return []
    helps = ["a larger share"] if not options.unbudgeted else []
    if not seen:
        helps += ["inputs to look at (the default --criterion and --repair, not --fast)"]
    else:
        own, refined = options.calib is not None, made.plan.options.get("refine")
        helps += [] if own else ["samples of your own (--calib)"]
        helps += ["--refine 80"] if own and not refined else []
    original = made.studied.prepared.original
    convolutions = any(node.op_type == "Conv" for node in original.nodes)
    if convolutions and options.calib is None and not batch_norms(original):
        helps += ["an export that keeps BatchNormalization"]
    scored = "" if verdict.accuracy is not None else ". --eval says what that is worth on your data"
    may = f". What may help: {listed(helps)}" if helps else ""
    return [
        f"the cut is verified, but on {verdict.compared_on} {strange}: the result hardly resembles "
        f"the original there{scored}{may}"
    ]


def _strange(verdict: Verdict) -> str | None:
    """What makes the result another function on the inputs that outputs were compared on."""
    if verdict.constant:
        named = listed(map(repr, verdict.constant))
        return f"{named} is the same for all, as the original's is not"
    if verdict.accuracy is not None:
        return None
    if verdict.unexplained is not None and verdict.unexplained >= LOST:
        return (
            "the outputs are as far from the original's as those are from each other (squared "
            f"error over variance: {verdict.unexplained:.3g})"
        )
    difference = verdict.output_difference
    if verdict.unexplained is not None or difference is None or difference < STRANGE:
        return None
    return f"the outputs are as far from the original's as these are large ({difference:.3g})"


def _blocks_note(plan: Plan) -> list[str]:
    gone = [block for block in plan.blocks if block.removed]
    if not gone:
        return (
            [f"0 of {counted(len(plan.blocks), 'residual block')} removed"] if plan.blocks else []
        )
    named = ", ".join(f"{block.kind} {block.name}" for block in gone)
    return [f"{len(gone)} of {counted(len(plan.blocks), 'residual block')} removed: {named}"]


def _measure(studied: Study, result: Model, options: Options) -> Verdict:
    prepared = studied.prepared
    scorer = None
    if options.eval_data is not None:
        scorer = scorer_of(options.eval_data, prepared.original)
    return measure(
        prepared.original,
        result,
        prepared.analysis.shapes,
        compared(studied),
        seed=options.scoring.seed,
        threads=options.threads,
        provider=options.provider,
        rounds=(PACED_ROUNDS if options.timed else options.rounds) if options.measure else 0,
        scorer=scorer,
    )


def _gates(verdict: Verdict, options: Options) -> None:
    if options.max_accuracy_drop is not None:
        assert verdict.accuracy is not None  # see Options.check_gates
        drop = (verdict.accuracy[0] - verdict.accuracy[1]) * 100
        if drop > options.max_accuracy_drop:
            raise AccuracyGateError(
                f"accuracy fell by {drop:.2f} points, more than {options.max_accuracy_drop:g}",
                hint="Nothing was written. Ask for a larger share, or try another --criterion.",
            )
    if options.min_speedup is not None:
        assert verdict.latency_ratio is not None
        speedup = 1 / verdict.latency_ratio[0]
        if speedup < options.min_speedup:
            raise LatencyGateError(
                f"the result is {speedup:.2f}x as fast, less than {options.min_speedup:g}x",
                hint="Nothing was written. Ask for a smaller share, or check --target-hardware.",
            )


def _summaries(prepared: Prepared, made: Made, verdict: Verdict) -> tuple[Summary, Summary]:
    cost = prepared.analysis.cost
    before, after = prepared.before, cost.of(made.decision.removed)
    latency = verdict.latency or (None, None)
    accuracy = verdict.accuracy or (None, None)
    return (
        Summary(
            whole(before.macs),
            whole(before.params),
            prepared.original_bytes,
            latency[0],
            accuracy[0],
            whole(before.memory),
        ),
        Summary(
            whole(after.macs),
            whole(made.counts["params"]),
            made.model.stored_bytes,
            latency[1],
            accuracy[1],
            whole(made.counts.get("memory", after.memory)),
        ),
    )
