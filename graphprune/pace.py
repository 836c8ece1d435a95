"""Latency budgets: tables attached to the cost model, and plans corrected by what is measured."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from graphprune.budget import OPTION, Decision
from graphprune.coupling import Mask
from graphprune.cut import cut
from graphprune.errors import LatencyGateError, TargetError, UsageError
from graphprune.factoring import shaped
from graphprune.ladders import thinned
from graphprune.latency.device import Command, Device, OnnxRuntime
from graphprune.latency.predict import Latency
from graphprune.model import Model
from graphprune.options import Options
from graphprune.pipeline import Pipeline
from graphprune.planning import Judged, damage, decide, slow_fusions
from graphprune.prepared import Prepared
from graphprune.repair.damage import silent
from graphprune.runtime import random_inputs
from graphprune.study import Progress
from graphprune.tables import Table, keep, read
from graphprune.targets import Target, choose
from graphprune.validate import Verdict

WITHIN = 0.03  # relative: how near its budget a measured latency must be
NEAR_ENOUGH = 0.007  # relative: nearer than that the noise of measuring decides
PACED_ROUNDS = 61  # of the result against the original
TRIES = 6  # plans measured
MACS_TRIES = 4  # and of those made for MACs
FITTED_AT = 0.25  # share of every group in the second model that the prediction is laid through


@dataclass(frozen=True)
class Paced:
    """What measuring plans found: margins to plan with, and the latency of that plan."""

    margins: Mapping[str, float]
    decision: Decision | None  # the plan's; None where nothing could be measured
    ratio: float | None  # of the original's latency
    note: str


def timed(prepared: Prepared, options: Options) -> Prepared:
    """``prepared`` with a cost model that predicts milliseconds, laid through two measurements."""
    target = _target(prepared, options)
    device = measuring(target, options)
    path = _kept(prepared, device)
    table = (
        Table({form: dict(rows) for form, rows in target.latency.items()})
        if path is None
        else read(path)
    )
    analysis = prepared.analysis
    latency = Latency(analysis, target, table, device)
    if device is not None:
        small = thinned(analysis, np.zeros(analysis.coupling.n_units), target, FITTED_AT)
        feeds = random_inputs(prepared.original, analysis.shapes, options.scoring.seed)
        whole, ratio = device.pair(
            prepared.original, _without(prepared, small, slow_fusions(target, options)), feeds
        )
        latency.fit(whole, small, ratio)
    if path is not None and table.grown:
        keep(table, path)
    cost = replace(analysis.cost, timed=latency)
    return replace(prepared, analysis=replace(analysis, cost=cost), latency=latency)


def _without_loss(
    prepared: Prepared, judged: Judged, options: Options, device: Device
) -> Paced | None:
    """Nothing is chosen where what left without loss meets the budgets."""
    if not prepared.cleaned or options.latency is None:
        return None
    kept = decide(prepared, judged, replace(options, latency=None))
    if kept.removed.any() or kept.ranks:
        return None
    assert prepared.latency is not None
    form = shaped(prepared, judged.ranks, kept.ranks, kept.removed)
    made = _without(*form, slow_fusions(prepared.latency.target, options))
    feeds = random_inputs(prepared.original, prepared.analysis.shapes, options.scoring.seed)
    ratio = device.pair(prepared.original, made, feeds)[1]
    if ratio > options.latency:
        return None
    note = f"what was removed without loss makes it {ratio:.3f} of the original's latency: enough"
    return Paced({}, kept, ratio, note)


def paced(
    prepared: Prepared, judged: Judged, options: Options, progress: Progress = silent
) -> Paced:
    """Decide, cut and measure, and ask for more or less by what that finds, until the measured
    latency is the budget's or the grid has nothing nearer."""
    latency = prepared.latency
    assert latency is not None
    assert options.latency is not None
    if latency.device is None:
        return Paced({}, None, None, _by_table(latency))
    if (enough := _without_loss(prepared, judged, options, latency.device)) is not None:
        return enough
    seek = _Seek(prepared, judged, options, latency, progress)
    best = seek.by_latency()
    alone = not options.search and best.decision is not None and not best.decision.ranks
    if judged.evidence and alone:
        best = seek.by_macs(best)
    _keep(prepared, latency)
    return best


@dataclass(frozen=True)
class _Seek:
    """Plans cut and measured until one has the latency that is asked for."""

    prepared: Prepared
    judged: Judged
    options: Options
    latency: Latency
    progress: Progress

    def by_latency(self) -> Paced:
        """Ask the prediction for more or less by what measuring finds."""
        asked = self._asked
        whole = self.latency(self.prepared.analysis.nothing_removed)
        margin, best, seen = 0.0, Paced({}, None, None, ""), set()
        for trial in range(TRIES):
            self.progress(trial / (TRIES + MACS_TRIES))
            try:
                decision = decide(self.prepared, self.judged, self.options, {"latency": margin})
            except TargetError as refused:
                if best.decision is not None:
                    break  # the prediction asks for more than there is: what was measured stands
                decision = self._all_that_may(refused)
            key = (decision.removed.tobytes(), *sorted(decision.ranks.items()))
            if key in seen:
                break
            seen.add(key)
            found = self._measured(decision, {"latency": margin})
            assert found.ratio is not None
            if best.ratio is None or _miss(found.ratio, asked) < _miss(best.ratio, asked):
                best = found
            if _miss(found.ratio, asked) <= NEAR_ENOUGH:
                break
            margin = whole * (asked - _to_ask(asked, self._predicted(decision), found.ratio))
        return best

    def _all_that_may(self, refused: TargetError) -> Decision:
        """The plan that removes most, where the prediction alone holds the budget for out of reach:
        of small models it knows little, since the time of a node hardly falls with its size.

        Raises ``TargetError`` where that plan too is measured to miss.
        """
        if self.options.budgets().keys() != {"latency"}:
            raise refused
        least = decide(self.prepared, self.judged, replace(self.options, allow_miss=True))
        least = replace(least, notes=least.notes[1:], missed=False)  # the first says so
        ratio = self._measured(least, {}).ratio
        assert ratio is not None
        if _miss(ratio, self._asked) <= WITHIN or ratio <= self._asked:
            return least
        raise TargetError(
            f"the budget cannot be reached: {OPTION['latency']} {self._asked:g} (measured with all "
            f"that may leave removed: {ratio:.3g})",
            refused.where,
            refused.hint,
        ) from refused

    def by_macs(self, best: Paced) -> Paced:
        """A plan for MACs that measures as fast, where it gives up less: predictions are good to a
        few percent, and what a plan by them gains can be less than that."""
        analysis = self.prepared.analysis
        assert best.decision is not None
        assert best.ratio is not None
        macs = analysis.cost.of(best.decision.removed).macs
        share = macs / analysis.cost.of(analysis.nothing_removed).macs
        least = damage(self.prepared, self.judged, best.decision.removed)
        enough = max(NEAR_ENOUGH, _miss(best.ratio, self._asked))
        for trial in range(MACS_TRIES):
            self.progress((TRIES + trial) / (TRIES + MACS_TRIES))
            also = min(share, self.options.flops or 1.0)
            try:
                by_macs = replace(self.options, latency=None, flops=also)
                decision = decide(self.prepared, self.judged, by_macs)
            except TargetError:  # no plan for so few MACs
                return best
            found = self._measured(decision, {})
            assert found.ratio is not None
            lost = damage(self.prepared, self.judged, decision.removed)
            if _miss(found.ratio, self._asked) <= enough:
                return found if lost < least else best
            share = min(share * self._asked / found.ratio, 1.0)
        return best

    @property
    def _asked(self) -> float:
        assert self.options.latency is not None
        return self.options.latency

    def _predicted(self, decision: Decision) -> float:
        counted = decision.costs
        said = counted.latency if counted is not None else self.latency(decision.removed)
        return said / self.latency(self.prepared.analysis.nothing_removed)

    def _measured(self, decision: Decision, margins: Mapping[str, float]) -> Paced:
        device, prepared = self.latency.device, self.prepared
        assert device is not None
        feeds = random_inputs(
            prepared.original, prepared.analysis.shapes, self.options.scoring.seed
        )
        form = shaped(prepared, self.judged.ranks, decision.ranks, decision.removed)
        made = _without(*form, slow_fusions(self.latency.target, self.options))
        ratio = device.pair(prepared.original, made, feeds)[1]
        predicted = self._predicted(decision)
        note = f"latency predicted {predicted:.3f}, measured {ratio:.3f} of the original's"
        return Paced(margins, decision, ratio, note + _untimed(self.latency))


def _to_ask(asked: float, predicted: float, measured: float) -> float:
    """The prediction that will measure as ``asked``, all as shares of the original: as far along
    as savings measured are from savings predicted."""
    if predicted >= 1 or measured >= 1:
        return asked * predicted / measured
    return 1 - (1 - asked) * (1 - predicted) / (1 - measured)


def _by_table(latency: Latency) -> str:
    unknown = latency.unknown
    rest = f"; {unknown:.0%} of the MACs are not in it and went by their number" if unknown else ""
    return f"latency as the table of target {latency.target.name} has it, not measured here{rest}"


def _untimed(latency: Latency) -> str:
    if not latency.untimed:
        return ""
    said = next(iter(latency.untimed.values()))
    return (
        f"; {len(latency.untimed)} kinds of pieces ({latency.untimed_share:.0%} of the MACs) do "
        f"not run alone and were left out of the prediction: {said[:120]}"
    )


def _miss(ratio: float, asked: float) -> float:
    return abs(ratio / asked - 1)


def in_milliseconds(prepared: Prepared, options: Options) -> Options:
    """``--target-latency-ms`` as a share of what the original takes."""
    if options.latency_ms is None:
        return options
    assert prepared.latency is not None
    whole = prepared.latency(prepared.analysis.nothing_removed)
    if options.latency_ms >= whole:
        raise UsageError(
            f"the model takes {whole:.3g} ms already, less than the {options.latency_ms:g} asked",
            hint="Ask for less than that.",
        )
    return replace(options, latency=options.latency_ms / whole, latency_ms=None)


def held(
    prepared: Prepared, result: Model, verdict: Verdict, options: Options, met: bool = False
) -> tuple[Verdict, tuple[str, ...]]:
    """The verdict, measured once more where it misses the budget, and what the report says of it.
    The budget may be ``met`` by what left without loss.
    Where times come from a command that is asked instead; a table alone has nothing to measure."""
    latency = prepared.latency
    assert latency is not None
    assert options.latency is not None
    if latency.device is None:
        return verdict, ()
    ours = isinstance(latency.device, OnnxRuntime)
    if ours and verdict.latency_ratio is not None:
        ratio = verdict.latency_ratio[0]
        if _miss(ratio, options.latency) <= WITHIN:
            return verdict, ()
    analysis = prepared.analysis
    feeds = random_inputs(prepared.original, analysis.shapes, options.scoring.seed)
    before, ratio = latency.device.pair(prepared.original, result, feeds)
    if ours:
        verdict = replace(
            verdict, latency=(before, before * ratio), latency_ratio=(ratio, ratio, ratio)
        )
    said = f"{latency.device.key}: {ratio:.3f} of the original's latency"
    if met and ratio <= options.latency:  # nothing that was chosen makes it faster than asked
        return verdict, () if ours else (said,)
    missed = _checked(options.latency, ratio, options.allow_miss)
    return verdict, tuple(note for note in (None if ours else said, missed) if note)


def _checked(asked: float, ratio: float, allow_miss: bool) -> str | None:
    """A note where the measured latency is further from the budget than it may be.

    Raises ``LatencyGateError`` where that is too slow, ``TargetError`` where it is too fast, unless
    misses are allowed.
    """
    if _miss(ratio, asked) <= WITHIN:
        return None
    what = f"measured latency is {ratio:.3f} of the original's, {asked:.3f} was asked"
    faster = f"{what}: faster, and nothing nearer was found"
    if allow_miss:
        return f"budget missed: {what}" if ratio > asked else faster
    hint = "Nothing was written. Measure on a quiet machine, or take it with --allow-miss"
    if ratio > asked:
        raise LatencyGateError(f"{what}: too slow", hint=f"{hint}.")
    raise TargetError(faster, hint=f"{hint}, or take a finer --round-to.")


def _target(prepared: Prepared, options: Options) -> Target:
    return choose(
        prepared.registry.targets, options.hardware, options.round_to, options.min_channels
    )


def device_of(target: Target, threads: int, provider: str) -> Device:
    """What the target is measured on: what its command asks, else this machine."""
    if target.latency_command:
        return Command(target.latency_command)
    return OnnxRuntime(threads, provider)


def measuring(target: Target, options: Options) -> Device | None:
    """What times are taken on; ``None`` where the target has a table of them instead."""
    if target.latency and not target.latency_command:
        return None
    return device_of(target, options.threads, options.provider)


def _kept(prepared: Prepared, device: Device | None) -> Path | None:
    """Where the device's table is kept: with the model's other results, by all it depends on."""
    folder = prepared.cache.folder
    if device is None or folder is None:
        return None
    return folder / f"latency-{hashlib.sha256(device.key.encode()).hexdigest()[:16]}.toml"


def _keep(prepared: Prepared, latency: Latency) -> None:
    path = _kept(prepared, latency.device)
    if path is not None and latency.table.grown:
        keep(latency.table, path)


def _without(prepared: Prepared, removed: Mask, fusions: Sequence[str]) -> Model:
    analysis = prepared.analysis
    alive = analysis.coupling.alive(removed)
    small = cut(analysis.model, analysis.shapes, analysis.coupling, alive)[0]
    steps = Pipeline(prepared.apart(fusions))
    return steps.run(small, prepared.context).model.closed
