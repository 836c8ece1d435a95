"""Means of experts that are zeros, because no expert has left, go."""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from graphprune.model import Model, label
from graphprune.pipeline import Change, Context, PassResult
from graphprune.stand_ins import stands_in


@dataclass(frozen=True)
class SettleStandIns:
    """1. A sum with a product of zeros is what it is added to: under the name of the sum."""

    name: str = "settle_stand_ins"

    def run(self, model: Model, context: Context) -> PassResult:
        renamed: dict[str, str] = {}  # what is added to → the sum
        gone: set[int] = set()
        changes = []
        for i, node in enumerate(model.nodes):
            if node.op_type != "Add" or not stands_in(node):
                continue
            at = model.producer.get(node.input[1])
            beside = None if at is None else model.nodes[at]
            if beside is None or beside.op_type != "MatMul" or model.array(beside.input[1]).any():
                continue
            renamed[node.input[0]] = node.output[0]
            gone.add(i)
            changes.append(Change(self.name, label(node), "experts", "sum and means", "sum", ""))
        if not gone:
            return PassResult(model)
        nodes = []
        for i, old in enumerate(model.nodes):
            if i not in gone:
                node = onnx.NodeProto()
                node.CopyFrom(old)
                for names in (node.input, node.output):
                    names[:] = [renamed.get(name, name) for name in names]
                nodes.append(node)
        return PassResult(model.with_graph(nodes, model.initializers.values()), tuple(changes))
