"""Tensors that are filled with one number at run time are filled anew for each reader.

One set of zeros as the first state of all recurrent layers says nothing about the layers, no more
than a shared vector does.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from graphprune.control import is_open
from graphprune.coupling import FLOAT_TYPES
from graphprune.model import Model, label
from graphprune.pipeline import Change, Context, PassResult
from graphprune.rewriting import copy_names
from graphprune_passes.lift_constants import rename_inputs

COPY_MARK = "/graphprune_fill_"


@dataclass(frozen=True)
class SeparateFills:
    """1. A ConstantOfShape, or an Expand of one float, of sizes computed from the inputs is copied
       for every node that reads it.
    2. One of constant sizes is a weight, and stays as it is.
    """

    name: str = "separate_fills"

    def run(self, model: Model, context: Context) -> PassResult:
        nodes = list(model.nodes)
        copies: dict[int, list[onnx.NodeProto]] = {}
        changes = []
        for index, node in enumerate(model.nodes):
            if not _fills(model, node):
                continue
            name = node.output[0]
            uses = model.consumers.get(name, [])
            readers = sorted({reader for reader, _ in uses})
            captured = any(position < 0 for _, position in uses)
            shared = any(is_open(model.nodes[reader]) for reader in readers)  # a state, and its end
            if len(readers) < 2 or captured or shared or name in model.output_names:
                continue
            names = copy_names(model, name, COPY_MARK)
            for reader in readers[1:]:
                copy = onnx.NodeProto()
                copy.CopyFrom(node)
                copy.output[0] = next(names)
                copy.name = label(node) + copy.output[0].removeprefix(name)
                copies.setdefault(index, []).append(copy)
                nodes[reader] = rename_inputs(nodes[reader], {name: copy.output[0]})
            changes.append(Change(self.name, name, "uses", "shared", f"{len(readers)} fills", ""))
        if not changes:
            return PassResult(model)
        order = [n for i, node in enumerate(nodes) for n in (node, *copies.get(i, ()))]
        return PassResult(model.with_graph(order, model.initializers.values()), tuple(changes))


def _fills(model: Model, node: onnx.NodeProto) -> bool:
    """Whether the node writes one float everywhere, into sizes that the inputs decide."""
    if node.domain or model.constant_names.issuperset(node.input):
        return False
    if node.op_type == "ConstantOfShape":
        return all(a.t.data_type in FLOAT_TYPES for a in node.attribute)  # without value: 0.0
    if node.op_type != "Expand" or node.input[0] not in model.initializers:
        return False
    tensor = model.initializers[node.input[0]]
    one = all(size == 1 for size in tensor.dims)
    return one and tensor.data_type in FLOAT_TYPES
