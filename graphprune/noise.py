"""Models that draw random numbers when they run: for a proof both draw the same ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from graphprune.control import said
from graphprune.model import DRAWN, Array, Model, set_initializer

RANGE = 11  # opset from which Range is there


def stilled(model: Model, kinds: Mapping[str, int]) -> Model:
    """``model`` with numbers that depend on their place alone where it draws random ones: of the
    same mean and spread, mean + spread * sin(place). ``kinds`` are element types by tensor."""
    if model.opsets.get("", 1) < RANGE or not any(_draws(node) for node in model.nodes):
        return model
    nodes: list[onnx.NodeProto] = []
    tensors = dict(model.initializers)
    for node in model.nodes:
        if not _draws(node):
            nodes.append(node)
            continue
        kind = int(said(node, "dtype", kinds.get(node.input[0], 1) if node.input else 1))
        new, constants = _still(node, kind)
        nodes += new
        tensors |= {name: set_initializer(name, value) for name, value in constants.items()}
    return model.with_graph(nodes, tensors.values())


def _draws(node: onnx.NodeProto) -> bool:
    return node.op_type in DRAWN and not node.domain


def _still(node: onnx.NodeProto, kind: int) -> tuple[list[onnx.NodeProto], dict[str, Array]]:
    """Nodes in the place of one that draws, and the constants that they read."""
    output = node.output[0]
    names = "sizes count start step places real waves wide far shaped spread mean".split()
    at = {name: f"{output}/graphprune_{name}" for name in names}
    if "Normal" in node.op_type:
        mean, spread = said(node, "mean", 0.0), said(node, "scale", 1.0)
    else:
        low, high = said(node, "low", 0.0), said(node, "high", 1.0)
        mean, spread = (low + high) / 2, (high - low) / 2
    constants: dict[str, Array] = {
        at["start"]: np.array(0, np.int64),
        at["step"]: np.array(1, np.int64),
        at["spread"]: np.array(spread, np.float32),
        at["mean"]: np.array(mean, np.float32),
    }
    made: list[onnx.NodeProto] = []

    def add(op: str, inputs: list[str], result: str, **attributes: Any) -> None:
        made.append(helper.make_node(op, inputs, [result], name=result, **attributes))

    if node.input:
        add("Shape", [node.input[0]], at["sizes"])
    else:
        constants[at["sizes"]] = np.array(said(node, "shape"), np.int64)
    add("ReduceProd", [at["sizes"]], at["count"], keepdims=0)
    add("Range", [at["start"], at["count"], at["step"]], at["places"])
    add("Cast", [at["places"]], at["real"], to=TensorProto.FLOAT)
    add("Sin", [at["real"]], at["waves"])
    add("Mul", [at["waves"], at["spread"]], at["wide"])
    add("Add", [at["wide"], at["mean"]], at["far"])
    add("Reshape", [at["far"], at["sizes"]], at["shaped"])
    add("Cast", [at["shaped"]], output, to=kind)
    return made, constants
