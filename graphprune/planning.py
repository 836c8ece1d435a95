"""Score the units, decide which leave, and write that down as a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from graphprune.analysis import Analysis, allowances, pinned_reasons
from graphprune.budget import Decision, allocate, distortion_of
from graphprune.coupling import Mask
from graphprune.criteria import Criterion, Scores, Scoring, score
from graphprune.criteria.evidence import Evidence
from graphprune.errors import GraphPruneError, NothingPrunableError, TargetError, UsageError
from graphprune.factoring import factored, ranks, with_lower_ranks
from graphprune.ladders import BLOCKS, Start
from graphprune.options import Options
from graphprune.outside.masks import RESOLVE, masks_from
from graphprune.outside.scores import scores_from
from graphprune.plan import Plan, make_plan, removed_units
from graphprune.prepared import Prepared
from graphprune.ranked import Ranks
from graphprune.repair.damage import silent
from graphprune.repair.refine import FEWEST, rows_within
from graphprune.routing import expert_evidence
from graphprune.runtime import random_inputs, run_session, session
from graphprune.study import Progress, Study, block_evidence, evidence, macs_per_row
from graphprune.targets import Target, choose
from graphprune.unread import unread_units
from graphprune.version import __version__

FALLBACK = "l1"
WORTH_NAMING, MOST_REASONS = 0.005, 8  # share of the MACs, and lines, where a budget is missed
Margins = Mapping[str, float]  # kind of cost → what the result has beyond the cost model's count


@dataclass(frozen=True)
class Judged:
    """What decides: scores by unit, the evidence by group where inputs were looked at, and what
    has been decided already."""

    scores: Scores
    evidence: Mapping[int, Evidence]
    outside: Outside | None = None
    begin: Start | None = None
    ranks: Ranks | None = None  # of layers that may become two


@dataclass(frozen=True)
class Outside:
    """What a file of scores or masks decided: units that must stay or, if it decided all, those
    that leave; what to say of it; and what a plan says of the file."""

    stays: Mask
    removed: Mask | None
    notes: tuple[str, ...]
    document: Mapping[str, Any]


def judge(
    studied: Study,
    options: Options,
    progress: Progress = silent,
    known: Mapping[int, Evidence] | None = None,
) -> Judged:
    """Score every unit; with calibration inputs also find each group's distortion curve. What is
    ``known`` of residual blocks is not looked for again: nothing, where none are to leave."""
    prepared = studied.prepared
    analysis = prepared.analysis
    criterion = options.criterion_of(prepared.registry)
    outside = None
    if options.from_outside:
        scores, outside = _from_outside(prepared, options, criterion)
    else:
        scores = score(analysis.model, analysis.coupling, criterion, options.scoring)
    if outside is not None and outside.removed is not None:
        return Judged(scores, {}, outside)
    if studied.inputs is None and options.spread == "solved":
        raise UsageError(
            "--spread solved needs calibration inputs, and nothing here looks at any",
            hint="Choose another --criterion or --repair.",
        )
    blocks = analysis.coupling.blocks[analysis.coupling.blocks >= 0]
    curves = studied.inputs is not None and options.plans_by_inputs(prepared.registry)
    curves = curves and _wants_curves(options, criterion)
    weighed = options.unbudgeted or (curves and options.spread in ("auto", "solved"))
    if len(blocks) and not weighed:  # without a budget none leaves
        raise UsageError(
            "--units blocks needs calibration inputs: weights do not say what a block is worth",
            hint="Leave out blocks, or --fast, --criterion, --repair none and --spread.",
        )
    if options.search and not curves:
        raise UsageError(
            "--search compares plans on calibration inputs, and nothing here looks at any",
            hint=f"Leave out --search, or {options.by_weights}.",
        )
    if not curves:
        return Judged(scores, {}, outside)
    found = evidence(studied, criterion, scores, progress)
    found |= expert_evidence(studied, criterion, scores, progress)
    found |= _unread(analysis)
    if criterion.needs_inputs:
        scores = _as_scores(prepared, found)
    if len(blocks) and known is None:
        found[BLOCKS] = block_evidence(studied, progress).greedy
    elif known is not None and BLOCKS in known:
        found[BLOCKS] = known[BLOCKS]
    if BLOCKS in found:
        scores[blocks] = _rising(found[BLOCKS])
    lower = ranks(studied, options, progress) if "ranks" in options.units else None
    return Judged(scores, found, outside, ranks=lower)


def _unread(analysis: Analysis) -> dict[int, Evidence]:
    """Of the groups that no output depends on, which no operator's inputs can tell: nothing is lost
    with them."""
    unread = unread_units(analysis.model, analysis.coupling)
    return {
        group.index: Evidence(np.arange(len(group)), np.zeros(len(group) + 1))
        for group in analysis.coupling.groups
        if unread[group.units].all()
    }


def _from_outside(
    prepared: Prepared, options: Options, criterion: Criterion
) -> tuple[Scores, Outside]:
    if options.masks is not None:
        how, path = options.resolve or RESOLVE[0], Path(options.masks)
        masked = masks_from(prepared, path, how)
        document = {"masks": path.name, "sha256": masked.sha256, "resolve": how}
        kept = np.where(masked.removed, 0.0, 1.0)
        return kept, Outside(~masked.removed, masked.removed, masked.notes, document)
    assert options.scores is not None
    path = Path(options.scores)
    scores, unscored, notes, digest = scores_from(prepared, path, criterion, options.scoring)
    return scores, Outside(unscored, None, notes, {"scores": path.name, "sha256": digest})


def decide(
    prepared: Prepared,
    judged: Judged,
    options: Options,
    margins: Margins | None = None,
    share: float | None = None,
    weights: Mapping[int, float] | None = None,
) -> Decision:
    """Which units leave. ``share`` asks for that share of the MACs instead of the options' budgets;
    ``weights`` scale the groups' curves, and blocks stay where theirs is infinite; ``margins`` are
    kept free below the budgets.

    Where layers may also become two, that is done where it promises less damage than removing
    channels alone.
    """
    analysis = prepared.analysis
    outside = judged.outside
    if outside is not None and outside.removed is not None:
        target = choose(prepared.registry.targets, options.hardware)
        return Decision(analysis.coupling.closed(outside.removed), target, outside.notes)
    budgets = options.budgets() if share is None else {"macs": share}
    limits = dict(budgets)
    before = analysis.cost.of(analysis.nothing_removed)
    own = prepared.whole  # shares are of the user's model
    for kind in budgets:
        if not before.of(kind) and own.get(kind):  # all of it has left without loss
            del limits[kind]
            continue
        if not before.of(kind):
            raise _absent(kind, prepared)
        allowed = limits[kind] * own.get(kind, before.of(kind)) - (margins or {}).get(kind, 0.0)
        limits[kind] = min(1.0, allowed / before.of(kind)) if budgets[kind] < 1 else 1.0
    target = choose(
        prepared.registry.targets, options.hardware, options.round_to, options.min_channels
    )
    if not limits:  # what leaves without loss has left
        return Decision(analysis.nothing_removed, target)

    def of_given(kind: str, part: float) -> float:
        spare = (margins or {}).get(kind, 0.0)
        return (part * before.of(kind) + spare) / own.get(kind, before.of(kind))

    factors = {g: (weights or {}).get(g, 1.0) for g in judged.evidence}
    curves = {
        g: e.curve * factors[g] for g, e in judged.evidence.items() if np.isfinite(factors[g])
    }
    ranked = options.spread not in ("auto", "solved")
    spread = options.spread if ranked else "balanced"
    curves = {} if ranked else curves
    stays = None if outside is None else outside.stays
    alone: Decision | None = None
    failure: NothingPrunableError | TargetError | None = None
    try:
        alone = allocate(
            analysis,
            judged.scores,
            target,
            limits,
            spread,
            options.allow_miss,
            curves,
            stays,
            judged.begin,
            said=of_given,
        )
    except (NothingPrunableError, TargetError) as error:
        failure = error
    lower = judged.ranks
    if lower is not None and limits.keys() - {"memory"}:
        both = with_lower_ranks(
            lower, judged.scores, alone, target, limits, curves, options.allow_miss, stays, of_given
        )
        alone, failure = (alone, failure) if both is None else (both, None)
    if isinstance(failure, NothingPrunableError):
        raise _explained(failure, prepared) from failure
    if failure is not None:
        raise TargetError(failure.what, failure.where, _held(analysis) + failure.hint) from failure
    assert alone is not None
    said = () if outside is None else outside.notes
    ranked_notes = () if lower is None else lower.notes(alone.ranks)
    return alone.noting((*said, *ranked_notes))


def damage(prepared: Prepared, judged: Judged, removed: Mask) -> float:
    """Summed distortion of what leaves, as the allocation counts it."""
    coupling = prepared.analysis.coupling
    curves = {g: found.curve for g, found in judged.evidence.items()}
    branches = curves.pop(BLOCKS, np.zeros(1))
    gone = int(removed[coupling.blocks[coupling.blocks >= 0]].sum())
    of_groups = distortion_of(curves, coupling.groups, removed) if curves else 0.0
    return of_groups + float(branches[min(gone, len(branches) - 1)])


def rehearse(prepared: Prepared, options: Options) -> None:
    """Raise what an impossible budget raises, or a wrong file, from weights alone."""
    if options.from_outside:
        _from_outside(prepared, options, options.criterion_of(prepared.registry))
    if not options.budgets():
        return
    by_weights = prepared.registry.criterion(FALLBACK)
    scores = score(prepared.analysis.model, prepared.analysis.coupling, by_weights, Scoring())
    try:
        decide(prepared, Judged(scores, {}), options)
    except (NothingPrunableError, TargetError):
        if "ranks" not in options.units:
            raise  # else layers of lower rank may reach further, which only inputs can tell


def refine_steps(studied: Study, decision: Decision, options: Options) -> int:
    """Steps in which the model is tuned as a whole; by default none where they would take long."""
    steps = options.refine_steps
    if options.refine is None and steps:
        few = rows_within(macs_per_row(studied, decision.removed), steps) < FEWEST
        return 0 if few else steps
    return steps


def written(
    studied: Study, judged: Judged, decision: Decision, options: Options, share: float | None = None
) -> Plan:
    """The decision as a plan, with all that is needed to make the same model again."""
    prepared = studied.prepared
    budgets = options.budgets() if share is None else {"macs": share}
    criterion = options.criterion_of(prepared.registry)
    document: dict[str, Any] = {
        "budgets": budgets,
        "criterion": options.criterion_name,
        "reduce": options.scoring.reduce,
        "aggregate": options.scoring.aggregate,
        "normalise": options.scoring.normalise or criterion.normalise,
        "seed": options.scoring.seed,
        "spread": options.spread,
        "target": decision.grid.name,
        "multiple": dict(decision.grid.multiple),
        "min_channels": decision.grid.minimum,
        "slow_fusions": list(slow_fusions(decision.grid, options)),
        "protect": list(options.protect),
        "only": list(options.only),
        "units": list(options.units),
        "allow_interface_change": options.allow_interface_change,
        "allow_inexact": options.allow_inexact,
        "unconstrained": prepared.unconstrained,
        "lossless": options.scope.lossless,
        "input_shapes": {k: list(v) for k, v in (options.input_shapes or {}).items()},
        "repair": options.repair_name,
        "refine": refine_steps(studied, decision, options),
        "ranks": dict(sorted(decision.ranks.items())),
        "calibration": None,
        "graphprune": __version__,
    }
    if studied.inputs is not None:
        document["calibration"] = {
            "source": studied.inputs.source,
            "key": studied.inputs.key,
            "samples": studied.inputs.asked,
            "synthesised": options.calib is None,
            "preprocess": options.preprocess,
        }
    if judged.outside is not None:
        document["outside"] = dict(judged.outside.document)
        document["aligned"] = options.scope.aligned
    asked = ", ".join(f"{kind} <= {share:g}" for kind, share in budgets.items())
    reason = f"lowest {options.criterion_name} scores until {asked}"
    if options.masks is not None:
        reason = f"removed by {options.criterion_name}"
    made = make_plan(prepared.analysis, decision.removed, judged.scores, document, reason)
    return replace(made, model_sha256=prepared.given.model.sha256) if prepared.given else made


def settled(studied: Study, judged: Judged, decision: Decision) -> tuple[Study, Judged, Decision]:
    """All three for the model in which the layers that the decision makes two are two."""
    if not decision.ranks:
        return studied, judged, decision
    after, removed, units = factored(studied, decision.ranks, decision.removed)
    scores = np.zeros(len(removed))
    scores[units] = judged.scores
    return after, replace(judged, scores=scores, evidence={}), replace(decision, removed=removed)


def planned(studied: Study, plan: Plan) -> tuple[Study, Mask]:
    """What a plan removes, and the study of the model that it removes it from: with the layers that
    it makes two. A plan for another model is refused."""
    chosen = plan.options.get("ranks") or {}
    if not chosen or plan.model_sha256 != studied.prepared.analysis.model.sha256:
        return studied, removed_units(plan, studied.prepared.analysis)
    after, _, _ = factored(studied, chosen, studied.prepared.analysis.nothing_removed)
    analysis = after.prepared.analysis
    return after, removed_units(replace(plan, model_sha256=analysis.model.sha256), analysis)


def slow_fusions(target: Target, options: Options) -> tuple[str, ...]:
    """What to keep apart: what a target says of them is said of ONNX Runtime on CPUs."""
    return target.slow_fusions if options.provider.lower() == "cpu" else ()


def _wants_curves(options: Options, criterion: Criterion) -> bool:
    """Curves decide unless a ranking was asked for that weights alone can give."""
    return criterion.needs_inputs or options.spread in ("auto", "solved")


def _as_scores(prepared: Prepared, found: Mapping[int, Evidence]) -> Scores:
    """A unit's score is the distortion of the outputs once it has left, after all before it;
    weights alone order the groups that no linear operator reads."""
    coupling = prepared.analysis.coupling
    by_weights = prepared.registry.criterion(FALLBACK)
    scores = score(prepared.analysis.model, coupling, by_weights, Scoring())
    for group in coupling.groups:
        if group.index not in found:
            continue
        scores[group.units] = _rising(found[group.index])
    return scores


def _rising(evidence: Evidence) -> Scores:
    """By ordinal of the unit: the curve once it has left, in order even where that is flat."""
    curve = evidence.curve[1:]
    least = 1e-12 * max(float(curve[-1]), 1e-12)
    scores = np.empty(len(curve))
    scores[evidence.order] = curve + least * np.arange(len(curve))
    return scores


def _held(analysis: Analysis) -> str:
    """What keeps the rest in place, and how much each reason is worth, a line each."""
    found = [pin for pin in pinned_reasons(analysis) if pin.macs >= WORTH_NAMING][:MOST_REASONS]
    places = [f", at {pin.where}" if pin.where else "" for pin in found]
    lines = [
        f"{pin.macs:6.1%} of the MACs: {pin.reason}{place}\n  "
        for pin, place in zip(found, places, strict=True)
    ]
    listed = "".join(["What stays, and why:\n  ", *lines]) if lines else ""
    return listed + allowances(analysis)


def _absent(kind: str, prepared: Prepared) -> GraphPruneError:
    """A budget on a kind of cost that the model has none of."""
    if prepared.analysis.coupling.groups:
        return TargetError(
            f"the model has no {kind}: there is nothing to make less of",
            hint="Give a budget of another kind: --target-flops, --target-params, --target-size, "
            "--target-memory.",
        )
    nothing = f"nothing can be pruned: no operator that is known here has any {kind}"
    return _explained(NothingPrunableError(nothing), prepared)


def _explained(error: NothingPrunableError, prepared: Prepared) -> NothingPrunableError:
    """Where everything is pinned: a model that cannot run at all is the better answer."""
    analysis = prepared.analysis
    runner = session(prepared.original, optimise=False)
    run_session(runner, random_inputs(prepared.original, analysis.shapes))
    reasons = [f"{pin.reason} ({pin.macs:.0%})" for pin in pinned_reasons(analysis)[:3]]
    unknown = prepared.unknown_notes[:3]
    hint = allowances(analysis) + error.hint
    return NothingPrunableError(error.what, "; ".join([*unknown, *reasons]), hint)
