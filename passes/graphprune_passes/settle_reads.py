"""Selectors become what they must be: nothing, a Slice, or a Gather."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from graphprune.model import Array, Model, set_initializer
from graphprune.pipeline import Change, Context, PassResult
from graphprune.selectors import is_selector
from graphprune.shapes import infer

SLICE_BY_INPUTS = 10  # opset


@dataclass(frozen=True)
class SettleReads:
    """1. A selector that gives all channels of its source in their order goes.
    2. One that gives a range of them becomes a Slice, any other a plain Gather.
    3. Equal selectors of one tensor are one.
    """

    name: str = "settle_reads"

    def run(self, model: Model, context: Context) -> PassResult:
        if not any(is_selector(node) for node in model.nodes):
            return PassResult(model)
        shape = infer(model, context.scope.input_shapes).shape
        nodes: list[onnx.NodeProto] = []
        constants: dict[str, onnx.TensorProto] = {}
        renamed: dict[str, str] = {}
        shared: dict[tuple[str, int, bytes], str] = {}
        changes = []
        for old in model.nodes:
            node = onnx.NodeProto()
            node.CopyFrom(old)
            node.input[:] = [renamed.get(name, name) for name in node.input]
            if not is_selector(node):
                nodes.append(node)
                continue
            source, output = node.input[0], node.output[0]
            axis = next(int(a.i) for a in node.attribute if a.name == "axis")
            positions = model.array(old.input[1])
            known = shape.get(old.input[0])
            length = known[axis] if known else -1
            same = shared.setdefault((source, axis, positions.tobytes()), output)
            if np.array_equal(positions, np.arange(length)):
                renamed[output], what = source, "nothing"
            elif same != output:
                renamed[output], what = same, same
            else:
                node = _copy(model, node, positions, axis, constants)
                nodes.append(node)
                what = node.op_type
            text = f"{len(positions)} of {length} channels"
            changes.append(Change(self.name, output, "selector", text, what, "as it is read"))
        kept = [*model.initializers.values(), *constants.values()]
        return PassResult(model.with_graph(nodes, kept), tuple(changes))


def _copy(
    model: Model,
    node: onnx.NodeProto,
    positions: Array,
    axis: int,
    constants: dict[str, onnx.TensorProto],
) -> onnx.NodeProto:
    """The node that gives ``positions`` of its input along ``axis``."""
    source, output = node.input[0], node.output[0]
    first, last = int(positions[0]), int(positions[-1])
    if not np.array_equal(positions, np.arange(first, last + 1)):
        return helper.make_node("Gather", [source, node.input[1]], [output], output, axis=axis)
    if model.opsets.get("", 1) < SLICE_BY_INPUTS:
        ends = {"axes": [axis], "starts": [first], "ends": [last + 1]}
        plain = helper.make_node("Slice", [source], [output], output)
        plain.attribute.extend(helper.make_attribute(k, v) for k, v in ends.items())
        return plain
    names = []
    for number in (first, last + 1, axis):  # few different ones: selectors share them
        names.append(f"graphprune/at_{number}")
        constants[names[-1]] = set_initializer(names[-1], np.array([number], np.int64))
    return helper.make_node("Slice", [source, *names], [output], output)
