"""The lossless passes in turn, until none finds anything more."""

from __future__ import annotations

from dataclasses import dataclass, replace

from graphprune.coupling import USUAL_UNITS
from graphprune.memory import too_large
from graphprune.model import Model
from graphprune.pipeline import Context, PassResult, Pipeline, Skipped
from graphprune_passes.fold_masks import FoldMasks
from graphprune_passes.remove_dead_channels import RemoveDeadChannels
from graphprune_passes.remove_zero_branches import RemoveZeroBranches

OF_SLOTS = ("channels", "heads", "head-dims")  # units that can do nothing; blocks are branches
LARGEST_QUANTISED = 1 << 28  # bytes of weights that are read as real numbers
ROUNDS = 8  # what one round removes may leave more with nothing to do


@dataclass(frozen=True)
class CleanUp:
    """1. Masks in the graph are multiplied into their weights.
    2. Branches of constants are bypassed; dead, constant and duplicate units leave. What leaves may
       be all that another one was needed for: so again, a bounded number of times.
    3. Models too large for memory stay as they are. Of quantised ones leaves what nobody reads and
       what is zero; weights of integers are not rewritten.
    """

    name: str = "clean_up"

    def run(self, model: Model, context: Context) -> PassResult:
        if too_large(model):
            return PassResult(model, (), (Skipped("the model", "too large to look into"),))
        relations = context.analysis(model).relations
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
        return PassResult(model, tuple(changes), skipped)
