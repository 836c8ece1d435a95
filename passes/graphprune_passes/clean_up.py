"""The lossless passes in turn, until none finds anything more."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from graphprune.analysis import Analysis
from graphprune.coupling import USUAL_UNITS
from graphprune.idle import idle_units
from graphprune.memory import too_large
from graphprune.model import Model
from graphprune.pipeline import Context, PassResult, Pipeline, Skipped
from graphprune.relations import Role
from graphprune_passes.fold_masks import FoldMasks
from graphprune_passes.remove_dead_channels import RemoveDeadChannels
from graphprune_passes.remove_zero_branches import RemoveZeroBranches

OF_SLOTS = ("channels", "heads", "head-dims")  # units that can do nothing; blocks are branches
LARGEST_QUANTISED = 1 << 28  # bytes of weights that are read as real numbers
STAND_INS = "weights filled with one number (ConstantOfShape) only stand for real ones"
AGAIN = "more units have nothing to do now that others are gone: run once more on the result"
ROUNDS = 8  # what one round removes may leave more with nothing to do


@dataclass(frozen=True)
class CleanUp:
    """1. Masks in the graph are multiplied into their weights.
    2. Branches of constants are bypassed; dead, constant and duplicate units leave. What leaves may
       be all that another one was needed for: so again, a bounded number of times.
    3. Models too large for memory stay as they are, and those whose weights are only filled in.
       Of quantised ones leaves what nobody reads and what is zero; weights of integers are not
       rewritten.
    """

    name: str = "clean_up"

    def run(self, model: Model, context: Context) -> PassResult:
        if too_large(model):
            return PassResult(model, (), (Skipped("the model", "too large to look into"),))
        analysis = context.analysis(model)
        if _filled(analysis):
            return PassResult(model, (), (Skipped("the model", STAND_INS),))
        relations = analysis.relations
        integers = relations.quantised or relations.dequantised
        if integers and model.weight_bytes > LARGEST_QUANTISED:
            return PassResult(model, (), (Skipped("the model", "quantised, and too large"),))
        units = tuple(name for name in context.scope.units if name in OF_SLOTS)
        steps = Pipeline((RemoveZeroBranches(), *([RemoveDeadChannels()] if units else [])))
        if len(units) < len(context.scope.units):
            context = Context(context.rules, replace(context.scope, units=units or USUAL_UNITS))
        first = FoldMasks().run(model, context)
        model, changes = first.model, list(first.changes)
        skipped: tuple[Skipped, ...] = ()
        for _ in range(ROUNDS):
            done = steps.run(model, context)
            skipped = done.skipped
            if not done.modified:
                break
            changes += done.changes
            model = done.model
        else:
            skipped = (*_remaining(model, context), *skipped)
        return PassResult(model, tuple(changes), skipped)


def _remaining(model: Model, context: Context) -> tuple[Skipped, ...]:
    """What the next round would find."""
    count = int(idle_units(context.analysis(model), context.facts(model)).removed.sum())
    return (Skipped("the model", f"{count} {AGAIN}"),) if count else ()


def _filled(analysis: Analysis) -> bool:
    """Whether some weight is generated: all of its channels are duplicates, and mean nothing."""
    made = {
        name
        for node in analysis.model.nodes
        if node.op_type == "ConstantOfShape"
        for name in node.output
    }
    works = (Role.PRODUCER, Role.CONSUMER)
    return any(
        axis.tensor in made and np.isin(analysis.coupling.role[axis.slots], works).any()
        for axis in analysis.coupling.parameters
    )
