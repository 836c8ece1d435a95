"""Layers of lower rank must earn their place: the plan of channels and ranks is held against that
of channels alone, as it comes out once both are cut and repaired (``graphprune.contest``).

What the distortion curves promise decides which layers the first plan makes two; whether that is
any good shows only in the two models. Under ``--max-drop`` both have the same distortion, and the
one with fewer MACs is the better one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from graphprune.budget import Decision
from graphprune.calibrate.samples import split
from graphprune.contest import clearly_nearer, compared, track
from graphprune.errors import NothingPrunableError, TargetError
from graphprune.options import Options
from graphprune.pace import WITHIN, Paced, paced
from graphprune.planning import Judged, decide
from graphprune.repair.damage import silent
from graphprune.search import carried, held_out, smallest_within
from graphprune.study import Progress, Study

NO_LAYER = "no layer of this model can become two of a lower rank that costs less"


@dataclass(frozen=True)
class Way:
    """What a plan is made from: with layers of lower rank where ``judged`` knows any."""

    judged: Judged
    share: float | None
    found: Paced | None
    note: str = ""

    def decided(
        self, studied: Study, options: Options, weights: Mapping[int, float] | None
    ) -> Decision:
        if self.found is not None and self.found.decision is not None:
            return self.found.decision
        margins = self.found.margins if self.found is not None else None
        return decide(studied.prepared, self.judged, options, margins, self.share, weights)


def settled_ranks(
    studied: Study,
    way: Way,
    options: Options,
    weights: Mapping[int, float] | None = None,
    progress: Progress = silent,
) -> Way:
    """The better of ``way`` and the same without layers of lower rank; its note says which and why.

    Raises what planning raises where the budget is out of reach for both.
    """
    if way.share is None and not options.budgets():  # nothing is chosen
        return way
    if way.judged.ranks is None:
        return replace(way, note=NO_LAYER)
    both = way.decided(studied, options, weights)
    if not both.ranks:
        return way
    usual = _alone(studied, way, options, weights, progress)
    if isinstance(usual, str):
        return replace(way, note=f"ranks: {usual}")
    alone = usual.decided(studied, options, weights)
    if alone.missed and not both.missed:
        return replace(way, note=f"ranks: {_others(options)} alone miss the budget")
    return _better(studied, (usual, alone), (way, both), options)


def _better(
    studied: Study, usual: tuple[Way, Decision], other: tuple[Way, Decision], options: Options
) -> Way:
    """The other way where its model is clearly better and no slower."""
    assert studied.inputs is not None
    if options.repair_name != "none" and not len(split(studied.inputs.feeds)[1]):
        return _refused(usual[0], "too few calibration inputs to hold some out and compare on")
    fit, near = held_out(studied, options)
    models = [carried(fit, way.judged, decision, options) for way, decision in (usual, other)]
    before, after = map(near, models)
    shares, others = (usual[0].share, other[0].share), _others(options)
    if shares[0] is not None and shares[1] is not None:
        said = f"{shares[1]:.3f} of the MACs against {shares[0]:.3f} by {others} alone"
        better = shares[1] < shares[0]
    else:
        said = f"{compared(after, before)} by {others} alone"
        better = clearly_nearer(after, before)
    if not better:
        return _refused(usual[0], f"not clearly better: {said}")
    race = track(studied.prepared, options)(models[0], models[1])
    if race.lost:
        return _refused(usual[0], f"slower: {race}, with {said}")
    return replace(other[0], note=f"ranks: {said}; {race}")


def _alone(
    studied: Study,
    way: Way,
    options: Options,
    weights: Mapping[int, float] | None,
    progress: Progress,
) -> Way | str:
    """The way of all other units alone, or why there is none."""
    coupling = studied.prepared.analysis.coupling
    if not coupling.groups and not (coupling.blocks >= 0).any():
        return "nothing else may leave"
    judged = replace(way.judged, ranks=None)
    share, found = way.share, None
    try:
        if options.max_drop is not None:
            share = smallest_within(studied, judged, options, progress)
        if way.found is not None:
            found = paced(studied.prepared, judged, options, progress)
        else:
            decide(studied.prepared, judged, options, None, share, weights)
    except (NothingPrunableError, TargetError):
        return f"{_others(options)} alone do not reach the budget"
    if found is not None and _too_slow(found, options) and not _too_slow(way.found, options):
        return f"{_others(options)} alone do not reach the latency"
    return Way(judged, share, found)


def _others(options: Options) -> str:
    """What else may leave, as the user named it."""
    return " and ".join(kind for kind in options.units if kind != "ranks")


def _too_slow(found: Paced | None, options: Options) -> bool:
    if found is None or found.ratio is None or options.latency is None:
        return False
    return found.ratio > options.latency * (1 + WITHIN)


def _refused(usual: Way, why: str) -> Way:
    return replace(usual, note=f"--units ranks refused: {why}")
