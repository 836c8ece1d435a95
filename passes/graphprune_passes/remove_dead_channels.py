"""Remove channels, heads and hidden units that do nothing: lossless, whatever the budget."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from graphprune import cleaned
from graphprune.analysis import Analysis
from graphprune.cut import cut
from graphprune.idle import CONSTANT, DEAD, DUPLICATE, Idle, idle_units
from graphprune.model import Model
from graphprune.pipeline import Change, Context, PassResult, Skipped
from graphprune.rewriting import rewritten
from graphprune.whole import without_copies
from graphprune.wording import counted

NAMES = {DEAD: cleaned.DEAD, CONSTANT: cleaned.CONSTANT, DUPLICATE: cleaned.DUPLICATE}


@dataclass(frozen=True)
class RemoveDeadChannels:
    """1. Units that nobody reads, or that are zero, leave.
    2. Of constants the readers' biases take over what they add; where zero padding forbids that,
       one constant channel stands for all.
    3. Of equal channels one stays, and the readers' columns are added up.
    4. What reads a unit with weights that are shared, grouped or quantised is not rewritten: such a
       unit leaves only where it adds nothing.
    5. A Slice, Gather or Split of what is then all there is goes too.
    """

    name: str = "remove_dead_channels"

    def run(self, model: Model, context: Context) -> PassResult:
        analysis = context.analysis(model)
        if not analysis.coupling.n_units:
            return PassResult(model)
        idle = idle_units(analysis, context.facts(model))
        skipped = tuple(_staying(analysis, idle))
        if not idle.removed.any():
            return PassResult(model, (), skipped)
        counted = tuple(self._counted(analysis, idle))
        leaving = _places(analysis, idle)
        if idle.edits:  # units may be numbered in another order: a bias that was not there is now
            model = rewritten(model, idle.edits)
            analysis = context.analysis(model)
        removed = np.zeros(analysis.coupling.n_units, bool)
        slots = analysis.relations.slots.tensors
        for tensor, axis, place in leaving:
            removed[analysis.coupling.unit_of(slots[tensor][axis].slots[[place]])] = True
        alive = analysis.coupling.alive(removed)
        result, changes = cut(model, analysis.shapes, analysis.coupling, alive)
        result = without_copies(model, result, analysis.coupling, alive)
        return PassResult(result, (*counted, *changes), skipped)

    def _counted(self, analysis: Analysis, idle: Idle) -> list[Change]:
        """A line for each group that loses units, and each reason."""
        found = []
        for group in analysis.coupling.groups:
            gone = group.units[idle.removed[group.units]]
            left = len(group)
            for code, count in sorted(Counter(idle.why[gone].tolist()).items()):
                sizes = str(left), str(left - count)
                found.append(Change(self.name, group.name, NAMES[code], *sizes, "lossless"))
                left -= count
        return found


def _staying(analysis: Analysis, idle: Idle) -> list[Skipped]:
    found = []
    for group in analysis.coupling.groups:
        kept = int(((idle.why > 0) & ~idle.removed)[group.units].sum())
        if kept:
            reason = counted(kept, "unit that does nothing stays", "units that do nothing stay")
            reason += ": no axis gets empty, no block broken"
            found.append(Skipped(group.name, reason))
    return found


def _places(analysis: Analysis, idle: Idle) -> list[tuple[str, int, int]]:
    """For every unit that leaves a tensor, an axis and an index where it stands."""
    found: dict[int, tuple[str, int, int]] = {}
    for axis in analysis.coupling.parameters:
        units = analysis.coupling.unit_of(axis.slots)
        for place in np.flatnonzero(np.append(idle.removed, False)[units]).tolist():
            found.setdefault(int(units[place]), (axis.tensor, axis.index, place))
    return list(found.values())
