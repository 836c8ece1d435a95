"""Residual blocks leave: y = x + F(x) becomes y = x."""

from __future__ import annotations

from dataclasses import dataclass

from graphprune.blocks import find_blocks
from graphprune.bypass import joined, without_terms
from graphprune.errors import UsageError
from graphprune.model import Model
from graphprune.pipeline import Change, Context, PassResult


@dataclass(frozen=True)
class RemoveBlocks:
    """1. Each block named, by the tensor that its branch ends with, is taken out of its sum.
    2. What reads such a sum, or one that `remove_channels` did so to, reads what is left of it.
    3. Nodes and weights that served the branch alone are gone with it.
    """

    blocks: tuple[str, ...] = ()
    name: str = "remove_blocks"

    def run(self, model: Model, context: Context) -> PassResult:
        changes: list[Change] = []
        if self.blocks:
            analysis = context.analysis(model)
            found = find_blocks(model, analysis.shapes, analysis.relations)
            known = {block.name for block in found}
            for name in self.blocks:
                if name not in known:
                    hint = f"Known: {', '.join(sorted(known)) or 'none'}."
                    raise UsageError(f"no residual block ends with {name!r}", hint=hint[:400])
            nodes, sums = without_terms(model.nodes, self.blocks)
            changes = [Change(self.name, node, "block", terms, "", "named") for node, terms in sums]
            model = model.with_graph(nodes, model.initializers.values())
        result, renamed = joined(model)
        changes += [Change(self.name, old, "name", old, new, "block gone") for old, new in renamed]
        return PassResult(result, tuple(changes))
