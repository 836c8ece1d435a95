"""UPSCALE (arXiv 2307.08771): each reader of a shared tensor keeps its own channels, where that
gives up less than one set for all readers.

A plan takes some channels from all readers together, their source included, and others from single
readers. How much goes which way is tried: ``SHARES`` of the way from the constrained plan's joint
removals to none. Every plan keeps to the same budget; under a budget on latency that is held by
measuring. They are cut, repaired on most of the calibration inputs, and compared by their outputs
on the rest. What is not clearly nearer to the original than the constrained plan is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from graphprune.analysis import Analysis
from graphprune.budget import Decision
from graphprune.contest import Race, clearly_nearer, compared, share_left, track
from graphprune.coupling import Mask
from graphprune.cut import cut
from graphprune.errors import TargetError, UsageError
from graphprune.ladders import BLOCKS, Start
from graphprune.latency.selectors import readers, unpaid
from graphprune.model import Model
from graphprune.options import Options
from graphprune.pace import NEAR_ENOUGH, WITHIN, Paced
from graphprune.pipeline import PassResult, Pipeline
from graphprune.planning import Judged, decide, judge, slow_fusions
from graphprune.prepared import Prepared
from graphprune.repair.damage import silent
from graphprune.runtime import random_inputs
from graphprune.search import Nearness, candidate, held_out
from graphprune.study import Progress, Study

SHARES = (0.0, 0.4, 1.0)  # of what the constrained plan leaves in shared channels: given back
FASTER = 3  # races of one plan, the last of them with fewer MACs than the budget leaves
BISECTIONS = 7  # plans measured for one share under a budget on latency
BUDGETS = {"macs": "flops", "params": "params", "bytes": "size", "memory": "peak_memory"}


@dataclass(frozen=True)
class Chosen:
    """What to go on with: the study and judgement of the model with selectors, or those given."""

    studied: Study
    judged: Judged
    share: float | None
    found: Paced | None
    widened: bool


def opened(prepared: Prepared) -> tuple[Prepared, PassResult]:
    """The same model with selectors in it, and what that changed."""
    done = prepared.registry.passes["open_reads"]().run(prepared.analysis.model, prepared.context)
    if not done.changes:
        return prepared, done
    analysis = prepared.context.analysis(done.model)
    before = prepared.before  # selectors are no part of what was given
    return replace(prepared, analysis=analysis, unconstrained=True, uncleaned=before), done


def widened(studied: Study) -> tuple[Study, PassResult]:
    """The study of the same model with selectors in it, and what that changed."""
    prepared, done = opened(studied.prepared)
    return carried_over(studied, prepared), done


def carried_over(studied: Study, prepared: Prepared) -> Study:
    """The study, on the same inputs, of the model with selectors in it."""
    return replace(studied, prepared=prepared, original=prepared.folded(prepared.analysis.model))


def removed_by_readers(analysis: Analysis, kept: Mapping[tuple[str, int], Mask]) -> Mask:
    """Units that leave where each reader keeps channels of its own: ``kept`` maps a parameter's
    axis (its name and index) to a bool for each position. A source goes with all its readers.

    Raises ``UsageError`` where a position that may not leave is not kept, or nothing stays.
    """
    coupling = analysis.coupling
    tensors = coupling.relations.slots.tensors
    removed = analysis.nothing_removed
    for (name, index), mask in kept.items():
        slots = tensors[name][index].slots
        if len(mask) != len(slots):
            raise UsageError(f"{len(mask)} numbers for {len(slots)} channels", f"{name}:{index}")
        units = coupling.unit_of(slots[~np.asarray(mask, dtype=bool)])
        if (units < 0).any():
            pin = coupling.pin_of(int(slots[~mask][units < 0][0]))
            raise UsageError(
                f"{int((units < 0).sum())} channels that are not kept must stay",
                f"{name}:{index}",
                pin.reason if pin else "",
            )
        removed[units] = True
    removed = coupling.closed(removed)
    alive = coupling.alive(removed)
    for axis in coupling.relations.slots.axes:
        if len(axis) and not alive[axis.slots].any():
            raise UsageError("nothing is kept", str(axis))
    return removed


def chosen(
    studied: Study,
    judged: Judged,
    options: Options,
    share: float | None,
    found: Paced | None,
    progress: Progress = silent,
) -> Chosen:
    """The better of the constrained plan and the unconstrained ones; a note says which and why."""
    constrained = Chosen(studied, judged, share, found, False)
    if studied.prepared.unconstrained:  # masks have decided for each reader
        return constrained
    field = field_of(constrained, options)
    if isinstance(field, str):
        return _refused(constrained, field)
    fit, near = held_out(studied, options)
    usual_model = candidate(fit, field.base.removed, options)
    usual = near(usual_model)
    nearer: list[_Rival] = []
    for one, removed in field.plans(options, progress):
        model = candidate(field.fit(fit), removed, options)
        seen = near(model)
        if seen.distortion < usual.distortion and seen.agreement >= usual.agreement:
            nearer.append(_Rival(one, model, seen))
    nearer.sort(key=lambda rival: share_left(rival.near, usual))
    if not nearer:
        return _refused(constrained, "no plan with selectors is nearer to the original")
    clearly = [rival for rival in nearer if clearly_nearer(rival.near, usual)]
    if not clearly:
        return _refused(constrained, f"not clearly nearer to the original: {nearer[0].said(usual)}")
    race_on = track(studied.prepared, options)
    lost = ""
    for first in clearly:
        rival: _Rival | None = first
        for _ in range(FASTER):
            if rival is None or not clearly_nearer(rival.near, usual):
                break
            race = race_on(usual_model, settled(field.wide.prepared, rival.model.opened))
            if not race.lost:
                less = "" if rival is first else f", with {rival.chosen.share:.3f} of the MACs"
                note = f"unconstrained: {rival.said(usual)}; {race}{less}"
                return replace(rival.chosen, studied=_noted(field.wide, note))
            lost = lost or f"slower: {race}, with {rival.said(usual)}"
            rival = _smaller(rival, race, field.fit(fit), near, options)
    return _refused(constrained, lost)


def _smaller(
    rival: _Rival, race: Race, fit: Study, near: Callable[[Model], Nearness], options: Options
) -> _Rival | None:
    """The plan with so many MACs fewer as it took longer: under a budget on MACs alone, which holds
    all the more."""
    if options.budgets().keys() != {"macs"} or options.flops is None:
        return None
    share = (rival.chosen.share or options.flops) * race.usual / race.other
    try:
        one, removed = _within(replace(rival.chosen, share=share), options)
    except TargetError:
        return None
    model = candidate(fit, removed, options)
    return _Rival(one, model, near(model))


@dataclass(frozen=True)
class _Rival:
    """A plan with selectors, the model it makes, and how near that is to the original."""

    chosen: Chosen
    model: Model
    near: Nearness

    def said(self, usual: Nearness) -> str:
        return f"{compared(self.near, usual)} with one set for all readers of a tensor"


@dataclass(frozen=True)
class Field:
    """What plans with selectors start from: the one without, the study of the model that has them,
    and the groups of readers that may not differ from their source."""

    constrained: Chosen
    base: Decision
    wide: Study
    judged: Judged
    whole: frozenset[int]

    def fit(self, part: Study) -> Study:
        """The model with selectors, on the inputs of ``part``."""
        return replace(self.wide, inputs=part.inputs)

    def plans(self, options: Options, progress: Progress = silent) -> Iterator[tuple[Chosen, Mask]]:
        """Plans in which readers differ, and the units that leave: one for each of ``SHARES``."""
        usual, share = self.constrained, self.constrained.share
        before, after = usual.studied.prepared, self.wide.prepared
        blocks = replace(usual.judged, begin=_blocks_gone(before.analysis, self.base.removed))
        for number, given in enumerate(SHARES):
            progress(number / len(SHARES))
            joint = _joint(before, blocks, options, share, usual.found, given)
            begin = _start(before.analysis, after.analysis, joint, self.whole)
            judged = replace(self.judged, begin=begin)
            try:
                one, removed = _within(Chosen(self.wide, judged, share, usual.found, True), options)
            except TargetError:  # the readers alone cannot give so much
                continue
            if _selects(after.analysis, removed):
                yield one, removed


def field_of(constrained: Chosen, options: Options) -> Field | str:
    """Where plans with selectors are looked for, or why there are none to be found."""
    studied, judged, found = constrained.studied, constrained.judged, constrained.found
    wide, done = widened(studied)
    whole = _unpaid(wide.prepared, found)
    impossible = _impossible(wide, done, found, whole)
    if impossible:
        return impossible
    margins = found.margins if found is not None else {}
    base = found.decision if found is not None else None
    base = base or decide(studied.prepared, judged, options, margins, constrained.share)
    return Field(constrained, base, wide, judge(wide, options, known=judged.evidence), whole)


def _impossible(
    wide: Study, done: PassResult, found: Paced | None, unpaid_groups: frozenset[int]
) -> str:
    """Why there is nothing to compare; empty where there is."""
    if not done.changes:
        reasons = sorted({entry.reason for entry in done.skipped})
        because = f" ({'; '.join(reasons)})" if reasons else ""
        return f"no channels have several readers that can differ{because}"
    if found is not None and found.decision is None:
        return "nothing here measures latencies"
    if unpaid_groups >= {reader.group.index for reader in readers(wide.prepared.analysis)}:
        return "no reader is faster behind a copy of half of its channels"
    return ""


def _unpaid(prepared: Prepared, found: Paced | None) -> frozenset[int]:
    """Groups of readers whose selector would cost more than it saves, under a budget on latency."""
    latency = prepared.latency
    if found is None or latency is None or latency.device is None:
        return frozenset()
    return unpaid(prepared.analysis, latency.target, latency.device)


def _refused(constrained: Chosen, why: str) -> Chosen:
    return replace(
        constrained, studied=_noted(constrained.studied, f"--unconstrained refused: {why}")
    )


def _noted(studied: Study, note: str) -> Study:
    return replace(studied, notes=(*studied.notes, note))


def _joint(
    prepared: Prepared,
    judged: Judged,
    options: Options,
    share: float | None,
    found: Paced | None,
    given: float,
) -> Mask:
    """Units that the constrained plan removes once it gives back that share."""
    analysis = prepared.analysis
    if given == 1:
        return analysis.nothing_removed if judged.begin is None else judged.begin.gone
    if found is not None:
        assert found.decision is not None
        macs = analysis.cost.of(found.decision.removed).macs
        share = macs / analysis.cost.of(analysis.nothing_removed).macs
    if share is not None:
        return decide(prepared, judged, options, None, share + (1 - share) * given).removed
    looser: dict[str, Any] = {
        BUDGETS[kind]: budget + (1 - budget) * given
        for kind, budget in options.budgets().items()
        if kind in BUDGETS
    }
    return decide(prepared, judged, replace(options, **looser)).removed


def _start(before: Analysis, after: Analysis, removed: Mask, unpaid: frozenset[int]) -> Start:
    """What a plan without selectors takes from shared channels, as the beginning of one with them:
    the sources lose nothing else but what nobody reads, and readers in ``unpaid`` groups nothing
    that their source keeps. Of residual blocks just those leave that leave without selectors."""
    coupling = after.coupling
    alive = before.coupling.alive(removed)
    sources = np.zeros(coupling.n_units + 1, dtype=bool)
    found = coupling.unit_of_component[coupling.follow.source]
    sources[found] = True
    sources[-1] = False
    old = before.relations.slots.tensors
    gone = after.nothing_removed
    whole = set(unpaid)
    for group in coupling.groups:
        if not sources[group.units].any():
            continue
        whole.add(group.index)
        name, index = group.signature[0]
        slots = after.relations.slots.tensors[name][index].slots
        units = coupling.unit_of(slots)
        mine = (units >= 0) & ~alive[old[name][index].slots] & np.isin(units, group.units)
        gone[units[mine]] = True
    gone[coupling.blocks[_left(before, removed)]] = True
    return Start(coupling.closed(gone), frozenset(whole | {BLOCKS}))


def _blocks_gone(analysis: Analysis, removed: Mask) -> Start | None:
    """The blocks that leave with ``removed``, as the beginning of plans in which no others do."""
    units = analysis.coupling.blocks
    if not (units >= 0).any():
        return None
    gone = analysis.nothing_removed
    gone[units[_left(analysis, removed)]] = True
    return Start(analysis.coupling.closed(gone), frozenset({BLOCKS}))


def _left(analysis: Analysis, removed: Mask) -> Mask:
    """Which of the model's blocks leave: a bool for each, with selectors in it or without."""
    units = analysis.coupling.blocks
    return (units >= 0) & removed[units]


def _selects(analysis: Analysis, removed: Mask) -> bool:
    """Whether any reader does without a channel that its source keeps."""
    relations, alive = analysis.relations, analysis.coupling.alive(removed)
    return any((alive[r.source] & ~alive[r.read]).any() for r in relations.reads)


def _within(one: Chosen, options: Options) -> tuple[Chosen, Mask]:
    """The plan within the budget; under a budget on latency the one that measures so."""
    prepared = one.studied.prepared
    if one.found is None:
        removed = decide(prepared, one.judged, options, None, one.share).removed
        return one, removed
    measured = _measured(prepared, options)
    assert options.latency is not None
    low, high = 0.0, 1.0
    best: tuple[float, Mask, float] | None = None
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        try:
            removed = decide(prepared, one.judged, options, None, middle).removed
        except TargetError:
            low = middle
            continue
        ratio = measured(removed)
        if ratio <= options.latency * (1 + NEAR_ENOUGH):
            low, best = middle, (middle, removed, ratio)
        else:
            high = middle
        if abs(ratio / options.latency - 1) <= NEAR_ENOUGH:
            break
    if best is None or best[2] < options.latency * (1 - WITHIN):
        raise TargetError("no plan with selectors takes just that time")
    share, removed, ratio = best
    paced = Paced({}, None, ratio, f"latency measured {ratio:.3f} of the original's")
    return replace(one, share=share, found=paced), removed


def _measured(prepared: Prepared, options: Options) -> Callable[[Mask], float]:
    """Latency of a plan over the original's."""
    latency = prepared.latency
    assert latency is not None
    device = latency.device
    assert device is not None
    feeds = random_inputs(prepared.original, prepared.analysis.shapes, options.scoring.seed)
    apart = prepared.apart(slow_fusions(latency.target, options))

    def ratio(removed: Mask) -> float:
        small = settled(prepared, _cut(prepared, removed))
        small = Pipeline(apart).run(small, prepared.context).model.closed
        return device.pair(prepared.original, small, feeds)[1]

    return ratio


def _cut(prepared: Prepared, removed: Mask) -> Model:
    """The model without ``removed``, its selectors as they are."""
    analysis = prepared.analysis
    alive = analysis.coupling.alive(removed)
    return cut(analysis.model, analysis.shapes, analysis.coupling, alive)[0]


def settled(prepared: Prepared, model: Model) -> Model:
    """``model`` with its channels in an order that makes ranges, and selectors as plain nodes."""
    passes = prepared.registry.passes
    steps = (passes["reorder_channels"](), passes["settle_reads"]())
    return Pipeline(steps).run(model, prepared.context).model
