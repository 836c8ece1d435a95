"""Bodies that are nested too deep, stay closed, or are damaged."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from body_forms import LAW, WEIGHTS, parsed
from graphs import Builder
from onnx import TensorProto, helper

from graphprune.api import prepare, prune
from graphprune.control import bodies
from graphprune.errors import ModelError


def nested(depth: int) -> onnx.ModelProto:
    """An If in the then-branch of an If, and so on; two products in every else-branch."""
    model = parsed("bool c, float[2,8] x", "float[2,8] y", "y = Identity(x)")
    place = model.graph
    for level in range(depth):
        place.node[0].CopyFrom(helper.make_node("If", ["c"], [place.output[0].name], f"if{level}"))
        names = ("then_branch", "else_branch")
        branches = [place.node[0].attribute.add(name=n, type=5) for n in names]
        for branch in branches:
            branch.g.name = branch.name
            out = helper.make_tensor_value_info(f"o{level}", TensorProto.FLOAT, [2, 8])
            branch.g.output.append(out)
        b = Builder(level)
        w, v = b.weight(8, 8), b.weight(8, 8)
        other = branches[1].g
        other.initializer.extend(b.initializers)
        other.node.append(helper.make_node("MatMul", ["x", w], ["h"]))
        other.node.append(helper.make_node("MatMul", ["h", v], [f"o{level}"]))
        place = branches[0].g
        place.node.append(helper.make_node("Identity", ["x"], [f"o{level}"]))
    return model


def test_as_deep_as_protobuf_goes() -> None:
    model = nested(30)
    result = prune(model, flops=0.5, **WEIGHTS)
    assert result.verdict.passed
    assert result.after.macs <= 0.5 * result.before.macs
    onnx.ModelProto.FromString(result.model.SerializeToString())


def test_deeper_than_protobuf_goes() -> None:
    with pytest.raises(ModelError):
        prune(nested(60), flops=0.5, **WEIGHTS)


def test_bodies_that_stay_closed() -> None:
    """A body with a sparse initialiser: what it reads is pinned."""
    b = Builder(opset=17)
    h = b.add("MatMul", "x", b.weight(6, 8))
    dense = helper.make_graph(
        [helper.make_node("Add", [h, "s"], ["o"])], "b", [],
        [helper.make_tensor_value_info("o", TensorProto.FLOAT, [2, 8])],
    )  # fmt: skip
    values = onnx.numpy_helper.from_array(np.ones(1, np.float32), "s")
    places = onnx.numpy_helper.from_array(np.zeros(1, np.int64), "s_i")
    sparse = onnx.GraphProto()
    sparse.CopyFrom(dense)
    sparse.sparse_initializer.append(helper.make_sparse_tensor(values, places, [8]))
    dense.initializer.append(onnx.numpy_helper.from_array(np.ones(8, np.float32), "s"))
    y = b.add("If", "c", then_branch=sparse, else_branch=dense)
    graph = helper.make_graph(
        b.nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 6]),
         helper.make_tensor_value_info("c", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info(y, TensorProto.FLOAT, [2, 8])], b.initializers,
    )  # fmt: skip
    opset = [helper.make_opsetid("", 17)]
    prepared = prepare(helper.make_model(graph, opset_imports=opset, ir_version=8))
    assert prepared.analysis.coupling.n_units == 0
    reasons = [pin.reason for pin in prepared.analysis.coupling.pins]
    assert "captured by the body of If" in reasons


def without_else(node: onnx.NodeProto) -> None:
    del node.attribute[1]


def one_output_too_few(node: onnx.NodeProto) -> None:
    del node.attribute[0].g.output[:]


def two_conditions(node: onnx.NodeProto) -> None:
    node.input.append("c")


@pytest.mark.parametrize("damage", [without_else, one_output_too_few, two_conditions])
def test_malformed_bodies_do_not_crash(damage: Any) -> None:
    model = parsed(*LAW["If"])
    damage(next(node for node in model.graph.node if node.op_type == "If"))
    analysis = prepare(model).analysis
    assert any(bodies(node) for node in analysis.model.nodes)
    with pytest.raises(ModelError):
        prune(model, flops=0.5, **WEIGHTS)


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_scan_inputs", 7), ("num_scan_inputs", 0), ("scan_input_axes", [9]),
     ("scan_output_axes", [-9])],
)  # fmt: skip
def test_malformed_scans_do_not_crash(name: str, value: Any) -> None:
    model = parsed(*LAW["Scan"])
    node = next(node for node in model.graph.node if node.op_type == "Scan")
    for attribute in [a for a in node.attribute if a.name == name]:
        node.attribute.remove(attribute)
    node.attribute.append(helper.make_attribute(name, value))
    with pytest.raises(ModelError):
        prune(model, flops=0.5, **WEIGHTS)
