"""A decision carried out: planned, cut, proved, repaired."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from graphprune.budget import OPTION, SLACK, Decision
from graphprune.clock import Clock
from graphprune.coupling import Mask
from graphprune.errors import TargetError
from graphprune.model import Model
from graphprune.options import Options
from graphprune.pace import Paced
from graphprune.pipeline import Change, Pass, PassResult, Pipeline
from graphprune.plan import Plan
from graphprune.planning import Judged, Margins, decide, settled, written
from graphprune.prepared import Prepared
from graphprune.recount import recounted
from graphprune.repair.damage import Repaired
from graphprune.repair.refine import Refined
from graphprune.study import Study, refined, repaired
from graphprune.validate import Proof, verify, verify_normal, verify_same

MARGIN = 64  # bytes kept free when a file's size is the budget
RETRIES = 3  # of a plan whose result is not what was counted; each knows what the last one missed


@dataclass(frozen=True)
class Made:
    """A plan carried out: the model cut, proved, and repaired."""

    plan: Plan
    decision: Decision
    model: Model
    changes: tuple[Change, ...]
    repairs: tuple[Repaired, ...]
    proof: Proof | None
    studied: Study  # of the model that was cut
    tuned: Refined | None = None  # as a whole, after the repair

    @cached_property
    def counts(self) -> dict[str, float]:
        """What the result has of each kind of cost that is known from it alone."""
        return recounted(self.model, self.studied.prepared)


def make(
    studied: Study,
    judged: Judged,
    options: Options,
    clock: Clock,
    share: float | None,
    weights: Mapping[int, float] | None,
    found: Paced | None = None,
) -> Made:
    """Decide, cut, prove and repair; again where the file or the parameters of the result are not
    what the cost model counted and the budget is on them."""
    prepared = studied.prepared

    def decided(margins: Mapping[str, float]) -> Decision:
        return clock("plan", lambda _: decide(prepared, judged, options, margins, share, weights))

    def attempt(decision: Decision) -> Made:
        mine, scored, settle = clock("plan", lambda _: settled(studied, judged, decision))
        plan = clock("record", lambda _: written(mine, scored, settle, options, share))
        return carry_out(mine, plan, settle, options, clock)

    known: Margins = found.margins if found is not None else {}
    as_paced = found.decision if found and share is None and weights is None else None
    made = attempt(as_paced or decided(known))
    for again in range(RETRIES if share is None else 0):
        missed = _missed(studied, made, options, nearer=not again)
        if not missed:
            break
        known = {**known, **missed}
        made = attempt(decided(known))
    return made if share is not None else _held(studied, made, options)


def _held(studied: Study, made: Made, options: Options) -> Made:
    """The result, unless no plan that was carried out held its budget."""
    if not _missed(studied, made, options, nearer=False) or made.decision.missed:
        return made
    own, whole = made.counts, studied.prepared.whole
    said = ", ".join(
        f"{OPTION[kind]} {share:g} (the result has {own[kind] / max(whole[kind], 1):.4g})"
        for kind, share in options.budgets().items()
        if kind in own and share < 1 and own[kind] > share * whole[kind]
    )
    if not options.allow_miss:
        raise TargetError(
            f"the budget is missed by what the result holds beyond the weights that stay: {said}",
            hint="Ask for a slightly smaller or larger share, or take it with --allow-miss.",
        )
    noted = made.decision.noting([f"budget missed: {said}"])
    return replace(made, decision=noted)


def _missed(studied: Study, made: Made, options: Options, nearer: bool) -> dict[str, float]:
    """What the result has beyond the cost model's count, where it misses a budget by that: has too
    much, or much less than it may, if it is to come ``nearer``."""
    asked = options.budgets()
    cost = made.studied.prepared.analysis.cost
    predicted = made.decision.costs or cost.of(made.decision.removed)
    own, whole = made.counts, studied.prepared.whole
    for kind in own.keys() & asked.keys():
        share = own[kind] / max(whole[kind], 1)
        least = asked[kind] - SLACK if nearer else 0.0
        if asked[kind] < 1 and not least <= share <= asked[kind]:
            spare = {"bytes": MARGIN}
            return {kind: own[kind] - predicted.of(kind) + spare.get(kind, 0) for kind in own}
    return {}


def carry_out(
    studied: Study, plan: Plan, decision: Decision, options: Options, clock: Clock
) -> Made:
    """Cut, prove and repair as the plan says; where there is nothing to do, the model as given."""
    prepared = studied.prepared
    name = plan.options.get("repair", "none")
    as_given = prepared.given is None and not prepared.cleaned
    if name == "none" and as_given and not decision.removed.any():
        return Made(plan, decision, prepared.original, (), (), None, studied)
    passes = prepared.registry.passes
    own = replace(plan, model_sha256=prepared.analysis.model.sha256)  # layers may be two by now
    remove = passes["remove_channels"](own)
    finish = passes["remove_blocks"](), passes["close_skips"](), passes["share_vectors"]()
    steps = [remove, *prepared.apart(plan.options.get("slow_fusions", ()))]
    done = clock("cut", lambda _: _run(prepared, steps, prepared.analysis.model))
    proof = None
    if options.verify:  # law 3 holds for the cut itself, so before any weight is repaired
        proof = clock(
            "verify", lambda _: _verified(prepared, done.model, decision.removed, options)
        )
    model = done.model
    repairs: tuple[Repaired, ...] = ()
    if name != "none":
        repair = prepared.registry.repair(name)
        model, repairs = clock(
            "repair",
            lambda progress: repaired(studied, repair, done.model, decision.removed, progress),
        )
    tuned: Refined | None = None
    if (steps_asked := plan.options.get("refine", 0)) and decision.removed.any():
        repaired_model = model
        model, tuned = clock(
            "refine",
            lambda progress: refined(
                studied, repaired_model, decision.removed, steps_asked, progress
            ),
        )
    if prepared.unconstrained:  # after the repair, which finds tensors by the names they had
        steps = [passes["reorder_channels"](), passes["settle_reads"]()]
        ordered = clock("order", lambda _: _run(prepared, steps, model.opened))
        if options.verify:
            clock("verify", lambda _: verify_same(model, ordered.model, prepared.analysis))
        model, done = ordered.model, replace(done, changes=(*done.changes, *ordered.changes))
    elif prepared.context.scope.means:
        steps = [passes["settle_reads"](), passes["settle_stand_ins"]()]
        settle = _run(prepared, steps, model.opened)
        if options.verify and settle.modified:
            clock("verify", lambda _: verify_same(model, settle.model, prepared.analysis))
        model, done = settle.model, replace(done, changes=(*done.changes, *settle.changes))
    if prepared.cleaned and name == "none":  # a repair folds it anyhow
        folded = _run(prepared, [passes["fold_batch_norm"]()], model.opened)
        if options.verify and folded.modified:
            clock("verify", lambda _: verify_same(model, folded.model, prepared.analysis))
        model, done = folded.model, replace(done, changes=(*done.changes, *folded.changes))
    finished = _run(prepared, finish, model.opened)
    if options.verify and any(change.what == "sum" for change in finished.changes):
        clock("verify", lambda _: verify_same(model, finished.model, prepared.analysis))
    changes = (*prepared.cleaned.changes, *prepared.changes, *done.changes, *finished.changes)
    return Made(plan, decision, finished.model.closed, changes, repairs, proof, studied, tuned)


def _verified(prepared: Prepared, result: Model, removed: Mask, options: Options) -> Proof:
    seed = options.scoring.seed
    if prepared.moved:
        verify_normal(prepared.original, prepared.analysis, seed)
    return verify(prepared.analysis, result, removed, seed)


def _run(prepared: Prepared, steps: Sequence[Pass], model: Model) -> PassResult:
    return Pipeline(tuple(steps)).run(model, prepared.context)
