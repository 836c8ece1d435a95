"""The bodies of If, Loop and Scan are laid open, so that what stands in them is analysed and cut
like everything else."""

from __future__ import annotations

from dataclasses import dataclass

from graphprune.control import ENTER, bodies, is_open
from graphprune.model import Model, label
from graphprune.pipeline import Change, Context, PassResult, Skipped


@dataclass(frozen=True)
class OpenBodies:
    """1. A body's nodes come before the node that it belongs to, its initialisers to the model's;
       names that another body or the graph has too get the body's own name before them.
    2. Bodies of other operators, or with sparse initialisers, are left alone.
    """

    name: str = "open_bodies"

    def run(self, model: Model, context: Context) -> PassResult:
        result = model.opened
        changes = tuple(
            Change(self.name, label(node), "body", "inside", "laid open", "")
            for node in result.nodes
            if is_open(node) and node.op_type == ENTER
        )
        skipped = tuple(
            Skipped(label(node), f"a body of {node.op_type} stays as it is")
            for node in result.nodes
            if bodies(node)
        )
        return PassResult(result, changes if result is not model else (), skipped)
