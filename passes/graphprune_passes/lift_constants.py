"""Constant nodes become initialisers, so that every later stage finds weights in one place."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from graphprune.model import Model
from graphprune.pipeline import Change, Context, PassResult, Skipped

VALUES = {"value_float": np.float32, "value_floats": np.float32} | {
    "value_int": np.int64,
    "value_ints": np.int64,
}


@dataclass(frozen=True)
class LiftConstants:
    """1. A Constant node with a tensor or numbers becomes an initialiser of the same name.
    2. A Constant of strings, or a sparse one, is left alone.
    3. An Identity of an initialiser is bypassed, unless it writes a graph output.
    """

    name: str = "lift_constants"

    def run(self, model: Model, context: Context) -> PassResult:
        lifted: dict[str, onnx.TensorProto] = {}
        alias: dict[str, str] = {}
        nodes, changes, skipped = [], [], []
        outputs = {value.name for value in model.outputs}
        for node in model.nodes:
            if node.op_type == "Constant" and not node.domain:
                tensor = _tensor(node)
                if tensor is None or node.output[0] in outputs:
                    skipped.append(Skipped(node.name, "not a dense numeric constant of the inside"))
                    nodes.append(node)
                    continue
                lifted[node.output[0]] = tensor
                changes.append(
                    Change(self.name, node.output[0], "Constant", "node", "initialiser", "")
                )
            elif self._bypassed(node, model, lifted, alias, outputs):
                alias[node.output[0]] = alias.get(node.input[0], node.input[0])
                changes.append(
                    Change(self.name, node.output[0], "Identity", "node", "bypassed", "")
                )
            else:
                nodes.append(node)
        if not changes:
            return PassResult(model, (), tuple(skipped))
        renamed = [rename_inputs(node, alias) for node in nodes]
        result = model.with_graph(renamed, [*model.initializers.values(), *lifted.values()])
        return PassResult(result, tuple(changes), tuple(skipped))

    @staticmethod
    def _bypassed(
        node: onnx.NodeProto,
        model: Model,
        lifted: dict[str, onnx.TensorProto],
        alias: dict[str, str],
        outputs: set[str],
    ) -> bool:
        if node.op_type != "Identity" or node.domain or node.output[0] in outputs:
            return False
        captured_reads = any(i == -1 for _, i in model.consumers.get(node.output[0], ()))
        source = node.input[0]
        return not captured_reads and (
            source in model.initializers or source in lifted or source in alias
        )


def rename_inputs(node: onnx.NodeProto, alias: dict[str, str]) -> onnx.NodeProto:
    """The node reading other tensors; itself where nothing changes."""
    if not alias.keys() & set(node.input):
        return node
    new = onnx.NodeProto()
    new.CopyFrom(node)
    for i, name in enumerate(new.input):
        new.input[i] = alias.get(name, name)
    return new


def rename_outputs(node: onnx.NodeProto, alias: dict[str, str]) -> onnx.NodeProto:
    """The node writing other tensors; itself where nothing changes."""
    if not alias.keys() & set(node.output):
        return node
    new = onnx.NodeProto()
    new.CopyFrom(node)
    for i, name in enumerate(new.output):
        new.output[i] = alias.get(name, name)
    return new


def _tensor(node: onnx.NodeProto) -> onnx.TensorProto | None:
    attribute = next(iter(node.attribute), None)
    if attribute is None:
        return None
    if attribute.name == "value":
        tensor = onnx.TensorProto()
        tensor.CopyFrom(attribute.t)
        tensor.name = node.output[0]
        return None if tensor.data_type == onnx.TensorProto.STRING else tensor
    if attribute.name not in VALUES:
        return None
    value = np.array(helper.get_attribute_value(attribute), VALUES[attribute.name])
    return numpy_helper.from_array(value, node.output[0])
