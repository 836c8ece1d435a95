"""Ladders: which counts of a group are on the target's grid, and in which order its units leave."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from graphprune.analysis import Analysis
from graphprune.choices import standing
from graphprune.coupling import Coupling, Group, Mask
from graphprune.layout import FREE, Blocks, blocks
from graphprune.relations import Role
from graphprune.targets import Target

BLOCKS = -1  # in place of a group's index: residual blocks, which leave one after the other
Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Start:
    """Units that leave whatever else does, and groups (by index) that lose no others."""

    gone: Mask
    whole: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Ladder:
    """A group's units from the least important up, and the counts it may keep, descending."""

    order: NDArray[np.int64]
    counts: list[int]

    @property
    def whole(self) -> Ladder:
        """The same without a step down."""
        return Ladder(self.order, self.counts[:1])

    def begun(self, begin: Start, group: int) -> Ladder:
        """The same from where ``begin`` has left it."""
        gone = begin.gone[self.order]
        left = int((~gone).sum())
        order = np.concatenate([self.order[gone], self.order[~gone]])
        further = [] if group in begin.whole else [k for k in self.counts if k < left]
        return Ladder(order, [left, *further])

    def removed_at(self, level: int) -> NDArray[np.int64]:
        return self.order[: len(self.order) - self.counts[level]]


def ladders_of(
    analysis: Analysis,
    scores: Scores,
    target: Target,
    stays: Mask | None = None,
    begin: Start | None = None,
) -> list[Ladder]:
    """Every group's, in their order."""
    held = _units_that_hold_an_axis_open(analysis, scores, target, stays)
    whole = blocks(analysis, target)
    groups = analysis.coupling.groups
    ladders = [_ladder(analysis, group, scores, target, held, whole) for group in groups]
    if begin is None:
        return ladders
    return [ladder.begun(begin, g) for g, ladder in enumerate(ladders)]


def _ladder(
    analysis: Analysis,
    group: Group,
    scores: Scores,
    target: Target,
    held: Mask,
    whole: Mapping[int, Blocks],
) -> Ladder:
    importance = np.where(held[group.units], np.inf, scores[group.units])
    order = group.units[np.argsort(importance, kind="stable")]
    size = len(group)
    if group.counts is not None:
        return Ladder(order, [size, *group.counts])
    step, width = _step_of(analysis, group, target)
    block = whole.get(group.index, FREE)
    step = math.lcm(step, block.step)
    while not target.strict and size < target.fewest_steps * step and step % (2 * block.step) == 0:
        step //= 2
    kept = int(held[group.units].sum())
    taken = analysis.coupling.fewest.get(group.index)
    if taken is not None:  # experts, which are no lanes of any hardware
        return Ladder(order, [*range(size, max(taken, kept, 1) - 1, -1)])
    least = max(1, math.ceil(target.minimum / width), block.least, kept)
    counts = [k for k in range(size // step * step, 0, -step) if k >= least]
    return Ladder(order, sorted({size, *counts}, reverse=True))


def ladder_of_blocks(
    coupling: Coupling,
    scores: Scores,
    curves: Mapping[int, Scores] | None,
    begin: Start | None,
) -> list[Ladder]:
    """One for all residual blocks that may leave, if any: one by one, those with the lowest scores
    first, and all of them may. None where there are curves, but not for blocks."""
    units = coupling.blocks[coupling.blocks >= 0]
    if not len(units) or (curves and BLOCKS not in curves):
        return []
    order = units[np.argsort(scores[units], kind="stable")]
    ladder = Ladder(order, list(range(len(units), -1, -1)))
    return [ladder if begin is None else ladder.begun(begin, BLOCKS)]


def _step_of(analysis: Analysis, group: Group, target: Target) -> tuple[int, int]:
    """How many units make a step on the grid, and how many channels a unit is."""
    coupling, model = analysis.coupling, analysis.model
    step, width = 1, 1
    for tensor, index in group.signature:
        axis = coupling.relations.slots.tensors[tensor][index]
        role = Role(int(np.bincount(coupling.role[axis.slots], minlength=5).argmax()))
        if role not in (Role.PRODUCER, Role.CONSUMER):
            continue
        units = coupling.unit_of(axis.slots)
        found, counts = np.unique(units, return_counts=True)
        counts = counts[np.searchsorted(found, group.units)]
        if counts.min() != counts.max():
            continue  # units of unequal width have no common grid
        operators = {model.nodes[i].op_type for i, _ in model.consumers[tensor]}
        multiple = math.lcm(*(target.multiple_of(op) for op in operators))
        step = math.lcm(step, multiple // math.gcd(multiple, int(counts[0])))
        width = max(width, int(counts[0])) if role is Role.PRODUCER else width
    return step, width


def _units_that_hold_an_axis_open(
    analysis: Analysis, scores: Scores, target: Target, stays: Mask | None = None
) -> Mask:
    """Units that must stay so that no axis of any tensor is emptied when all others leave, and
    those that stay anyway.

    Groups keep units of their own; only axes that share units of several groups need this.
    """
    coupling = analysis.coupling
    held = np.zeros(coupling.n_units, dtype=bool) if stays is None else stays.copy()
    axes = [axis.slots for axis in standing(coupling.relations)]
    if not axes or not coupling.groups:
        return held
    width = coupling.widths(axes)
    lengths = np.array([len(a) for a in axes])
    whole = blocks(analysis, target)
    while True:
        ladders = [
            _ladder(analysis, group, scores, target, held, whole) for group in coupling.groups
        ]
        last = np.array([len(ladder.counts) - 1 for ladder in ladders])
        removed = mask_of(ladders, last, coupling)
        empty = np.flatnonzero(lengths - width @ removed <= 0)
        if not len(empty):
            return held
        units = width[[int(empty[0])], :].indices
        best = units[np.argmax(scores[units])]
        if held[best]:
            return held
        held[best] = True


def thinned(analysis: Analysis, scores: Scores, target: Target, share: float) -> Mask:
    """Units that leave so that every group keeps about ``share`` of its own, on the grid."""
    ladders = ladders_of(analysis, scores, target)
    levels = [
        int(np.argmin(np.abs(np.array(ladder.counts) / len(ladder.order) - share)))
        for ladder in ladders
    ]
    return mask_of(ladders, np.array(levels, dtype=np.int64), analysis.coupling)


def mask_of(ladders: list[Ladder], levels: NDArray[np.int64], coupling: Coupling) -> Mask:
    """What leaves at these levels, and what leaves because of that."""
    removed = np.zeros(coupling.n_units, dtype=bool)
    pairs = zip(ladders, levels.tolist(), strict=True)
    parts = [ladder.removed_at(level) for ladder, level in pairs]
    removed[np.concatenate([*parts, np.empty(0, np.int64)])] = True
    return coupling.closed(removed)


def levels_of(ladders: Sequence[Ladder], removed: Mask) -> NDArray[np.int64]:
    """The levels at which just ``removed`` has left."""
    left = [int((~removed[ladder.order]).sum()) for ladder in ladders]
    pairs = zip(ladders, left, strict=True)
    return np.array([ladder.counts.index(count) for ladder, count in pairs], dtype=np.int64)
