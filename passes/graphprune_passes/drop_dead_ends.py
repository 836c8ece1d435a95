"""Nodes whose results reach no output go: they would hold in place what they read."""

from __future__ import annotations

from dataclasses import dataclass

from graphprune.model import Model, label
from graphprune.pipeline import Change, Context, PassResult


@dataclass(frozen=True)
class DropDeadEnds:
    """A node goes that no output depends on, directly or through other nodes."""

    name: str = "drop_dead_ends"

    def run(self, model: Model, context: Context) -> PassResult:
        result = model.with_graph(model.nodes, model.initializers.values())
        if len(result.nodes) == len(model.nodes):
            return PassResult(model)
        written = {name for node in result.nodes for name in node.output}
        gone = [node for node in model.nodes if written.isdisjoint(node.output)]
        changes = [Change(self.name, label(n), "node", n.op_type, "nothing", "") for n in gone]
        return PassResult(result, tuple(changes))
