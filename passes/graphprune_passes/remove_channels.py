"""Remove the units that a plan names, physically."""

from __future__ import annotations

from dataclasses import dataclass

from graphprune.cut import cut
from graphprune.model import Model
from graphprune.pipeline import Context, PassResult
from graphprune.plan import Plan, removed_units


@dataclass(frozen=True)
class RemoveChannels:
    """Slice every constant, rewrite every count; refuses a plan that belongs to another model."""

    plan: Plan
    name: str = "remove_channels"

    def run(self, model: Model, context: Context) -> PassResult:
        analysis = context.analysis(model)
        alive = analysis.coupling.alive(removed_units(self.plan, analysis))
        return PassResult(*cut(model, analysis.shapes, analysis.coupling, alive))
