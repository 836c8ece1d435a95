"""Networks as exporters other than PyTorch's write them: half of the work leaves, and is proved."""

from __future__ import annotations

import framework_forms  # noqa: F401  (forms enter their table)
import onnx
import pytest
import tensorflow_forms  # noqa: F401
from exporter_nets import FORMS, Net
from onnx import TensorProto, helper

from graphprune.api import prune


def perceptron(zipped: bool) -> onnx.ModelProto:
    """scikit-learn's MLPClassifier behind a scaler: classes by ArgMax, a map of probabilities."""
    b = Net(opset=13)
    ml = "ai.onnx.ml"
    x = b.add("Scaler", "x", domain=ml, offset=[0.5] * 8, scale=[2.0] * 8)
    x = b.add(
        "Relu",
        b.add("Add", b.add("MatMul", b.add("Cast", x, to=1), b.weight(8, 24)), b.weight(1, 24)),
    )
    x = b.add("Relu", b.add("Add", b.add("MatMul", x, b.weight(24, 16)), b.weight(1, 16)))
    scores = b.add("Softmax", b.add("Add", b.add("MatMul", x, b.weight(16, 3)), b.weight(1, 3)))
    best = b.add("ArgMax", scores, axis=1)
    label = b.add("ArrayFeatureExtractor", b.ints(0, 1, 2), best, domain=ml)
    label = b.add("Cast", b.add("Reshape", label, b.ints(-1)), to=TensorProto.INT64)
    norm = b.add("Normalizer", scores, domain=ml, norm="L1")
    tensor = helper.make_tensor_value_info
    ends = [tensor(label, TensorProto.INT64, ["n"]), tensor(norm, TensorProto.FLOAT, ["n", 3])]
    if zipped:
        made = b.add("ZipMap", norm, domain=ml, classlabels_int64s=[0, 1, 2])
        kind = helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(1, []))
        ends[1] = helper.make_value_info(made, helper.make_sequence_type_proto(kind))
    start = tensor("x", TensorProto.FLOAT, ["n", 8])
    graph = helper.make_graph(b.nodes, "g", [start], ends, b.initializers)
    opsets = [helper.make_opsetid("", 13), helper.make_opsetid(ml, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


FORMS["perceptron"] = lambda: perceptron(zipped=False)
FORMS["perceptron with a map"] = lambda: perceptron(zipped=True)


@pytest.mark.parametrize("name", FORMS)
def test_half_of_the_work_leaves(name: str) -> None:
    result = prune(FORMS[name](), flops=0.5, round_to=1, min_channels=1, fast=True, measure=False)
    assert result.verdict.passed
    assert result.after.macs <= 0.5 * result.before.macs


def test_a_map_by_default_options() -> None:
    """What measures outputs takes maps for what they hold."""
    result = prune(perceptron(zipped=True), flops=0.5, samples=16, rounds=3, cache=False)
    assert result.verdict.passed
    assert result.verdict.output_difference is not None
    assert 0 < result.verdict.output_difference < 1


def test_a_sequence_by_default_options() -> None:
    """All levels of a detector as one sequence."""
    b = Net(opset=13)
    x = b.add("Relu", b.conv("x", 3, 16))
    low = b.add("Relu", b.add("Conv", x, b.weight(16, 16, 3, 3), strides=[2, 2]))
    y = b.add("SequenceConstruct", b.conv(x, 16, 4), b.conv(low, 16, 4))
    kind = helper.make_tensor_type_proto(TensorProto.FLOAT, None)
    end = helper.make_value_info(y, helper.make_sequence_type_proto(kind))
    start = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])
    graph = helper.make_graph(b.nodes, "g", [start], [end], b.initializers)
    opsets = [helper.make_opsetid("", 13)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    result = prune(model, flops=0.5, samples=16, rounds=3, cache=False)
    assert result.verdict.passed
    assert result.after.macs <= 0.5 * result.before.macs
