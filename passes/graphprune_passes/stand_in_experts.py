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

SLICE_BY_INPUTS = 10  # opset


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
        if not found or model.opsets.get("", 1) < SLICE_BY_INPUTS:
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
            shares = each.shares
            if len(rows) != len(width):  # tokens are in one axis there, in several here
                shares = free(f"{total}/shares")
                made = _of_rank(each.shares, own, len(width), rows[-1], shares)
                after[last] = made[0]
                constants += made[1]
            beside = product(shares, matrix, free(f"{total}/stands_in"))
            sum_ = helper.make_node("Add", [own, beside.output[0]], [total], f"{own}_and_means")
            after[last] = [*after.get(last, ()), beside, marked(sum_)]
            where = label(model.nodes[last])
            changes.append(Change(self.name, where, "experts", "sum", "sum and means", ""))
        order = [
            n for i, node in enumerate(nodes) for n in (*before.get(i, ()), node, *after.get(i, ()))
        ]
        opened = model.with_graph(order, [*model.initializers.values(), *constants])
        return PassResult(opened, tuple(changes))


def _of_rank(
    shares: str, like: str, rank: int, experts: int, result: str
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Nodes that give the shares the axes of ``like`` but the last, and their constants."""
    ends = {"first": [0], "last": [rank - 1], "experts": [experts]}
    names = {key: f"{result}_{key}" for key in ends}
    made = [set_initializer(names[k], np.array(ends[k], np.int64)) for k in ends]
    sizes, tokens, whole = (f"{result}_{part}" for part in ("sizes", "tokens", "shape"))
    nodes = [
        helper.make_node("Shape", [like], [sizes], sizes),
        helper.make_node("Slice", [sizes, names["first"], names["last"]], [tokens], tokens),
        helper.make_node("Concat", [tokens, names["experts"]], [whole], whole, axis=0),
        helper.make_node("Reshape", [shares, whole], [result], result),
    ]
    return nodes, made
