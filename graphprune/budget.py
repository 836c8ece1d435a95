"""Which units leave under a budget: a global ranking on the target's grid, cut off exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from graphprune.analysis import Analysis
from graphprune.cost import Costs
from graphprune.coupling import Group, Mask
from graphprune.errors import NothingPrunableError, TargetError
from graphprune.knapsack import solve
from graphprune.ladders import (
    BLOCKS,
    Ladder,
    Start,
    ladder_of_blocks,
    ladders_of,
    levels_of,
    mask_of,
)
from graphprune.targets import Target

SLACK = 0.02  # a result further below its budget than this is said to be limited by the grid
MOST_GIVEN_BACK = 256  # tries; each costs one evaluation of the whole cost model
MOST_EXCHANGES = 256  # tries to come nearer a budget with another mix of counts
FOR_NEARNESS = 0.1  # of what a plan gives up, how much more may go to come nearer a budget
OPTION = {
    "macs": "--target-flops",
    "params": "--target-params",
    "bytes": "--target-size",
    "memory": "--target-memory",
    "latency": "--target-latency",
}
MOST_STEPS = 128  # of those above a memory budget, the highest: each is a constraint of its own
Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Decision:
    """Units that leave, and what is worth saying about how the budget was met."""

    removed: Mask
    grid: Target  # the target's grid, or the finer one that the budget needed
    notes: tuple[str, ...] = ()
    ranks: Mapping[str, int] = field(default_factory=dict)  # of layers that become two, by weight
    costs: Costs | None = None  # as counted with these
    missed: bool = False  # a budget, which was allowed

    def noting(self, notes: Sequence[str]) -> Decision:
        """The same with more to say."""
        return replace(self, notes=(*self.notes, *notes))


def allocate(
    analysis: Analysis,
    scores: Scores,
    target: Target,
    budgets: Mapping[str, float],
    spread: str = "balanced",
    allow_miss: bool = False,
    curves: Mapping[int, Scores] | None = None,
    stays: Mask | None = None,
    begin: Start | None = None,
    known: Mask | None = None,
    said: Callable[[str, float], float] | None = None,
) -> Decision:
    """Remove the least important steps until every budget holds, then give back what fits.

    ``budgets`` maps a kind of cost to the share that may remain. A step takes a group from one
    count on the grid to the next. Steps are ranked by the mean score of their units (``global``),
    by the share of the group gone after them (``uniform``), or by both multiplied (``balanced``:
    damage grows with what has left already). A grid too coarse for the budget is halved, which is
    then said, unless the user asked for just this grid. Costs are evaluated exactly. With
    ``allow_miss`` a budget out of reach is approached as far as possible, which is then said.
    Narrow groups take finer steps (``Target.fewest_steps``) only where curves say what those are
    worth: they save no time. Units in ``stays`` never leave; ``begin`` says what has left before;
    ``known`` is a choice on this grid that fits. ``said`` is the share that a user means by a share
    of a kind of cost, who gave a model of which some has left already.

    Raises ``NothingPrunableError`` without units, ``TargetError`` where all steps are not enough.
    """
    coupling = analysis.coupling
    if not coupling.n_units and any(share < 1 for share in budgets.values()):
        raise NothingPrunableError(
            "nothing in this model can be pruned: every channel is pinned",
            hint="`graphprune inspect MODEL` lists what pins what.",
        )
    before = analysis.cost.of(analysis.nothing_removed)
    limits = {kind: share * before.of(kind) for kind, share in budgets.items()}
    notes: tuple[str, ...] = ()
    grid = target if curves else replace(target, fewest_steps=1)
    while True:
        ladders = ladders_of(analysis, scores, grid, stays, begin)
        ladders += ladder_of_blocks(coupling, scores, curves, begin)
        last = np.array([len(ladder.counts) - 1 for ladder in ladders], dtype=np.int64)
        least = mask_of(ladders, last, coupling)
        reach = analysis.cost.of(least)
        if known is not None or all(reach.of(kind) <= limit for kind, limit in limits.items()):
            break
        if grid.strict or grid.finest:
            shares = {kind: reach.of(kind) / (before.of(kind) or 1.0) for kind in budgets}
            return _missed(budgets, shares, least, target, allow_miss, said)
        grid = grid.halved()
        notes = (_finer_note(target, grid),)
    if budgets.keys() == {"memory"}:  # elsewhere nothing is gained by removing anything
        useful = analysis.cost.in_use_above(limits["memory"])
        ladders = [ladder if useful[ladder.order].any() else ladder.whole for ladder in ladders]
    weight = _macs_per_time(analysis, ladders, target)
    steps = _ranked_steps(ladders, scores, spread, weight)

    def fits(levels: NDArray[np.int64]) -> bool:
        removed = mask_of(ladders, levels, coupling)
        return all(
            analysis.cost.one(removed, kind) <= limit * (1 + 1e-12)
            for kind, limit in limits.items()
        )

    def levels_after(count: int) -> NDArray[np.int64]:
        return np.bincount([g for g, _ in steps[:count]], minlength=len(ladders))

    low, high = 0, len(steps) if known is None else 0
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(levels_after(middle)) else (middle + 1, high)
    first = levels_after(low) if known is None else levels_of(ladders, known)
    distortions = (
        _distortions(ladders, curves, coupling.groups) if curves else _damages(ladders, scores)
    )
    if curves or "latency" in budgets:
        # Blocks cost unequally: nothing in between.
        every = range(len(coupling.groups), len(ladders))

        def costs(levels: NDArray[np.int64]) -> Mapping[str, float]:
            return _evaluated(analysis, mask_of(ladders, levels, coupling), budgets, tight)

        tight = _tight_steps(analysis, limits)
        found = solve(distortions, costs, _step_by_step(limits, tight), first, every)
        first = _made_whole(found if fits(found) else first, coupling.groups, fits)
        steps = _steps_by_damage(distortions, first)
        low = len(steps)

    def gap(levels: NDArray[np.int64]) -> float:
        """How far below its budget the nearest kind of cost is, as a share of the original."""
        after = analysis.cost.of(mask_of(ladders, levels, coupling))
        return min(budgets[kind] - after.of(kind) / (before.of(kind) or 1.0) for kind in budgets)

    levels = _give_back(first, steps[:low], fits)
    if gap(levels) > SLACK:
        levels = _closer(
            levels, ladders, steps, fits, gap, () if "latency" in budgets else distortions
        )
    removed = mask_of(ladders, levels, coupling)
    needed = coupling.closed(removed & ~analysis.idle(removed))
    return Decision(needed, grid, (*notes, *_grid_notes(budgets, gap(levels), grid)))


def _tight_steps(analysis: Analysis, limits: Mapping[str, float]) -> NDArray[np.int64]:
    """Where a budget on memory binds: each of these steps must hold it. Taken together they are a
    maximum, which no single group may lower, so that nothing would seem worth removing."""
    if "memory" not in limits:
        return np.empty(0, np.int64)
    return analysis.cost.steps_above(limits["memory"], MOST_STEPS)


def _step_by_step(limits: Mapping[str, float], tight: NDArray[np.int64]) -> dict[str, float]:
    """The limits, that on memory once for each of its steps."""
    apart = {f"memory at {step}": limits["memory"] for step in tight}
    return {kind: limit for kind, limit in limits.items() if kind != "memory"} | apart


def _evaluated(
    analysis: Analysis, removed: Mask, kinds: Iterable[str], tight: NDArray[np.int64]
) -> dict[str, float]:
    """Costs by the names of ``_step_by_step``."""
    after = analysis.cost.of(removed)
    found = {kind: after.of(kind) for kind in kinds if kind != "memory"}
    if not len(tight):
        return found
    live = analysis.cost.live(removed)
    return found | {f"memory at {step}": float(live[step]) for step in tight}


def _missed(
    budgets: Mapping[str, float],
    reach: Mapping[str, float],
    least: Mask,
    target: Target,
    allow_miss: bool,
    said: Callable[[str, float], float] | None,
) -> Decision:
    """The smallest there is, where that was allowed; else an error that says how far it goes."""
    said = said or (lambda _, share: share)
    missed = ", ".join(
        f"{OPTION[kind]} {said(kind, share):g} (reachable {_above(said(kind, reach[kind])):g})"
        for kind, share in budgets.items()
        if reach[kind] > share
    )
    if allow_miss:
        return Decision(least, target, (f"budget missed: {missed}",), missed=True)
    raise TargetError(
        f"the budget cannot be reached: {missed}",
        f"target {target.name}",
        "Let more remain (a larger share), take what is reachable with --allow-miss, or loosen "
        "what holds the rest: --protect, --only, --min-channels, --round-to, or the pins that "
        "`graphprune inspect MODEL` lists.",
    )


def _above(share: float) -> float:
    """In three digits, but never one that is out of reach again."""
    if share <= 0:
        return share
    step = 10.0 ** (math.floor(math.log10(share)) - 2)
    return math.ceil(share / step - 1e-6) * step


def _finer_note(target: Target, grid: Target) -> str:
    steps = ", ".join(f"{op} {step}" for op, step in grid.multiple.items())
    return (
        f"the grid of target {target.name} cannot meet this budget: channel counts are multiples "
        f"of less than it asks for ({steps}; at least {grid.minimum})"
    )


def _grid_notes(budgets: Mapping[str, float], gap: float, target: Target) -> tuple[str, ...]:
    if gap <= SLACK:
        return ()
    finer = "" if target.finest else " (finer: --round-to 1)"
    return (
        f"the result is {gap:.3f} below the budget of {' and '.join(budgets)}: on the grid of "
        f"target {target.name} nothing nearer was found that loses no more{finer}",
    )


def _macs_per_time(analysis: Analysis, ladders: list[Ladder], target: Target) -> Scores:
    """For each group, MACs saved per time saved, by the target's roofline, in (0, 1].

    Among units of equal importance those go first whose MACs take longest: the wide maps of early
    layers, where memory and not arithmetic is the limit.
    """
    if not target.macs_per_element:
        return np.ones(len(ladders))
    macs = analysis.cost.marginal("macs")
    time = macs + analysis.cost.marginal("traffic") * target.macs_per_element
    sums = [(macs[ladder.order].sum(), time[ladder.order].sum()) for ladder in ladders]
    return np.array([saved / spent if saved > 0 else 1.0 for saved, spent in sums])


def _ranked_steps(
    ladders: list[Ladder], scores: Scores, spread: str, weight: Scores
) -> list[tuple[int, int]]:
    """(group, level) of every step, the one to take first in front."""
    keyed = []
    for g, ladder in enumerate(ladders):
        size = len(ladder.order)
        highest = -math.inf
        for level in range(1, len(ladder.counts)):
            leaving = ladder.order[size - ladder.counts[level - 1] : size - ladder.counts[level]]
            share = 1 - ladder.counts[level] / size
            rank = share if spread == "uniform" else float(scores[leaving].mean())
            if spread == "balanced":
                rank *= share
            rank = rank * weight[g] if rank > 0 else rank / weight[g]
            highest = max(highest, rank)  # a group's steps are taken in their order
            keyed.append((highest, g, level))
    return [(g, level) for _, g, level in sorted(keyed)]


def _distortions(
    ladders: list[Ladder], curves: Mapping[int, Scores], groups: Sequence[Group]
) -> list[Scores]:
    """Distortion at every level of every ladder. A group without a curve is taken to be as
    sensitive as the most sensitive one."""
    of_groups = [curve for g, curve in curves.items() if g != BLOCKS] or [np.zeros(2)]
    worst = max(of_groups, key=lambda curve: float(curve[-1]))
    shares = np.linspace(0, 1, len(worst))
    found = []
    names = [*(group.index for group in groups), BLOCKS]
    for ladder, name in zip(ladders, names, strict=False):
        size = len(ladder.order)
        curve = curves.get(name)
        if curve is None:
            curve = np.interp(np.linspace(0, 1, size + 1), shares, worst)
        found.append(np.array([curve[size - count] for count in ladder.counts]))
    return found


def _damages(ladders: list[Ladder], scores: Scores) -> list[Scores]:
    """In place of distortions where only scores are known: what has left, each step counted more
    the more has left before it, as in the ``balanced`` ranking. Standardised scores are below zero
    for half of the units; losing these is not worth anything either."""
    scores = scores - min(0.0, float(scores[np.isfinite(scores)].min(initial=0.0)))
    found = []
    for ladder in ladders:
        size = len(ladder.order)
        damage = [0.0]
        for before, after in pairwise(ladder.counts):
            leaving = ladder.order[size - before : size - after]
            damage.append(damage[-1] + float(scores[leaving].sum()) * (1 - after / size))
        found.append(np.array(damage))
    return found


def _steps_by_damage(distortions: list[Scores], levels: NDArray[np.int64]) -> list[tuple[int, int]]:
    """(group, level) of the steps taken, those last that did most damage."""
    keyed = [
        (float(curve[level] - curve[level - 1]), g, level)
        for g, curve in enumerate(distortions)
        for level in range(1, int(levels[g]) + 1)
    ]
    return [(g, level) for _, g, level in sorted(keyed)]


def _made_whole(
    levels: NDArray[np.int64],
    groups: Sequence[Group],
    fits: Callable[[NDArray[np.int64]], bool],
) -> NDArray[np.int64]:
    """Of groups that jump to their first step (layers of lower rank): whole again where the budget
    still holds, since what else has left may have made that the cheaper form."""
    levels = levels.copy()
    for g in [g for g, group in enumerate(groups) if group.counts is not None and levels[g]]:
        taken, levels[g] = levels[g], 0
        levels[g] = 0 if fits(levels) else taken
    return levels


def distortion_of(curves: Mapping[int, Scores], groups: Sequence[Group], removed: Mask) -> float:
    """The distortion of a decision by the curves of its groups, as ``allocate`` adds it up."""
    ladders = []
    for group in groups:
        gone = removed[group.units]
        order = np.concatenate([group.units[gone], group.units[~gone]])
        ladders.append(Ladder(order, [int((~gone).sum())]))
    return float(sum(found[0] for found in _distortions(ladders, curves, groups)))


def _give_back(
    levels: NDArray[np.int64],
    taken: list[tuple[int, int]],
    fits: Callable[[NDArray[np.int64]], bool],
) -> NDArray[np.int64]:
    """Undo steps, the most important first, wherever the budget still holds without them: several
    at once while they fit, since costs only grow by it."""
    steps = taken[::-1]
    place, several = 0, 1
    for _ in range(MOST_GIVEN_BACK):
        if place >= len(steps):
            break
        other = levels.copy()
        for group, level in steps[place : place + several]:
            if other[group] == level:  # else a later step of this group stayed
                other[group] -= 1
        if fits(other):
            levels = other
            place += several
            several *= 2
        elif several == 1:
            place += 1
        else:
            several //= 2
    return levels


def _summed(distortions: Sequence[Scores], levels: NDArray[np.int64]) -> float:
    return sum(float(d[level]) for d, level in zip(distortions, levels, strict=False))


def _closer(
    levels: NDArray[np.int64],
    ladders: list[Ladder],
    steps: list[tuple[int, int]],
    fits: Callable[[NDArray[np.int64]], bool],
    gap: Callable[[NDArray[np.int64]], float],
    distortions: Sequence[Scores],
) -> NDArray[np.int64]:
    """Few, coarse groups: take one further down and give others back, where that loses hardly more
    by ``distortions``: to have less left and to lose less is better."""
    best, least, tries = levels, gap(levels), 0
    most = _summed(distortions, levels) * (1 + FOR_NEARNESS)
    for group in range(len(ladders)):
        for further in range(1, len(ladders[group].counts) - int(levels[group])):
            tries += 1
            if tries > MOST_EXCHANGES:
                return best
            other = levels.copy()
            other[group] += further
            kept = [step for step in steps if step[0] != group and step[1] <= other[step[0]]]
            other = _give_back(other, kept, fits)
            if (found := gap(other)) < least and _summed(distortions, other) <= most:
                best, least = other, found
            if least <= SLACK:
                return best
    return best
