"""A recurrent operator's states get a name, so that they can be looked at."""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from graphprune.linear import RECURRENT
from graphprune.model import Model, label
from graphprune.pipeline import Change, Context, PassResult


@dataclass(frozen=True)
class NameStates:
    """An LSTM, GRU or RNN of which only the last states are read also names its sequence of states:
    its own recurrent weights read them."""

    name: str = "name_states"

    def run(self, model: Model, context: Context) -> PassResult:
        nodes, changes = list(model.nodes), []
        for i, node in enumerate(nodes):
            if (
                node.op_type not in RECURRENT
                or node.domain
                or not any(node.output)
                or node.output[0]
            ):
                continue
            nodes[i] = onnx.NodeProto()
            nodes[i].CopyFrom(node)
            last = next(name for name in node.output if name)
            nodes[i].output[0] = f"{last}/graphprune_states"
            changes.append(Change(self.name, label(node), "states", "absent", "named", ""))
        if not changes:
            return PassResult(model)
        return PassResult(model.with_graph(nodes, model.initializers.values()), tuple(changes))
