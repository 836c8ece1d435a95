"""Experts leave, and their mean outputs stay: room for these beside the weighed sum."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from graphprune.model import Model, label, set_initializer
from graphprune.pipeline import Change, Context, PassResult
from graphprune.selectors import selector
from graphprune.stand_ins import marked, product, weighed_experts


@dataclass(frozen=True)
class StandInExperts:
    """1. What weighs experts reads the router's shares through a selector, which has slots of its
          own: an expert may leave, and the router stays.
    2. Shares times a matrix of zeros [experts, width] are added to the sum over experts. What the
       repair puts there is what an expert that has left said on average.
    3. Left alone: experts that are looked up, or computed inside one operator.
    """

    name: str = "stand_in_experts"

    def run(self, model: Model, context: Context) -> PassResult:
        analysis = context.analysis(model)
        found = {each.total: each for each in weighed_experts(analysis)}
        if not found:
            return PassResult(model)
        nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in model.nodes]
        before: dict[int, list[onnx.NodeProto]] = {}
        after: dict[int, list[onnx.NodeProto]] = {}
        constants, changes = [], []
        taken = {name for node in model.nodes for name in node.output} | set(model.initializers)

        def free(name: str) -> str:
            while taken.intersection((name, f"{name}_at")):
                name += "_"
            taken.update((name, f"{name}_at"))
            return name

        for total, each in found.items():
            rows, width = (analysis.shapes.shape[n] or (0,) for n in (each.shares, total))
            kind = helper.tensor_dtype_to_np_dtype(analysis.shapes.dtype[total])
            positions = np.arange(rows[-1], dtype=np.int64)
            read, matrix = free(f"{each.shares}/of_experts"), free(f"{total}/means")
            constants.append(set_initializer(f"{read}_at", positions))
            constants.append(set_initializer(matrix, np.zeros((rows[-1], width[-1]), kind)))
            copy = selector(each.shares, f"{read}_at", read, len(rows) - 1, weighs=True)
            before.setdefault(each.readers[0], []).append(copy)
            for i in each.readers:
                nodes[i].input[:] = [read if n == each.shares else n for n in nodes[i].input]
            last, own = model.producer[total], free(f"{total}/experts")
            nodes[last].output[:] = [own if name == total else name for name in nodes[last].output]
            beside = product(each.shares, matrix, free(f"{total}/stands_in"))
            sum_ = helper.make_node("Add", [own, beside.output[0]], [total], f"{own}_and_means")
            after[last] = [beside, marked(sum_)]
            where = label(model.nodes[last])
            changes.append(Change(self.name, where, "experts", "sum", "sum and means", ""))
        order = [
            n for i, node in enumerate(nodes) for n in (*before.get(i, ()), node, *after.get(i, ()))
        ]
        opened = model.with_graph(order, [*model.initializers.values(), *constants])
        return PassResult(opened, tuple(changes))
