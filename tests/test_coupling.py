"""Units, folds, pins and their explanations on small graphs."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from graphs import Builder, attention
from onnx import TensorProto, helper

from graphprune.api import prepare, prune
from graphprune.explain import explain, parse_place
from graphprune.oracle import before_last_activation, relative_error, shares
from graphprune.runtime import opened
from graphprune.storage import load


@pytest.mark.parametrize("packed", [False, True])
def test_heads_fall_out_of_the_ties(packed: bool) -> None:
    coupling = prepare(attention(heads=4, width=8, packed=packed)).analysis.coupling
    assert [len(group) for group in coupling.groups] == [4]
    assert coupling.groups[0].signature[-1][1] == 0  # the output projection's rows


def test_golden_coupling() -> None:
    assert str(prepare(attention(heads=4)).analysis.coupling) == (
        "4 units in 1 groups\ngroup 0: 4 units over c0:1, c1:0, c2:1, c3:0, c4:1, c5:0, c11:0"
    )


def test_shuffle_takes_positions_not_groups() -> None:
    b = Builder()
    x = b.conv("x", 3, 8, 1)
    x = b.add("Reshape", x, b.ints(0, 2, 4, 4, 4))
    x = b.add("Transpose", x, perm=[0, 2, 1, 3, 4])
    x = b.add("Reshape", x, b.ints(0, 8, 4, 4))
    y = b.conv(x, 8, 5, 1)
    coupling = prepare(b.model({"x": [1, 3, 4, 4]}, {y: [1, 5, 4, 4]})).analysis.coupling
    assert [len(group) for group in coupling.groups] == [4]


def test_tied_matrix_carries_all_its_uses() -> None:
    """One weight as embedding rows and as output columns: its width is one axis."""
    b = Builder()
    w = b.weight(6, 6)
    h = b.add("MatMul", "x", w)
    y = b.add("MatMul", b.add("Relu", h), w)
    analysis = prepare(b.model({"x": [1, 6]}, {y: [1, 6]})).analysis
    assert analysis.coupling.n_units == 0  # rows meet the input, columns the output


def test_shared_vector_couples_nobody() -> None:
    b = Builder()
    bias = b.constant(np.zeros(8, np.float32))
    x = b.add("Relu", b.add("Conv", "x", b.weight(8, 3, 1, 1), bias))
    x = b.add("Relu", b.add("Conv", x, b.weight(8, 8, 1, 1), bias))
    y = b.conv(x, 8, 5, 1)
    model = b.model({"x": [1, 3, 4, 4]}, {y: [1, 5, 4, 4]})
    assert len(prepare(model).analysis.coupling.groups) == 2
    untouched = prune(model, size=1.0, measure=False)
    assert len(untouched.model.graph.initializer) == len(model.graph.initializer)


def test_explanations_name_the_way() -> None:
    analysis = prepare(attention(heads=4)).analysis
    head = explain(analysis, parse_place(analysis, "c0:1:9"))
    assert "group 0" in head
    assert "tied to c11:0" in head
    pinned = explain(analysis, parse_place(analysis, "c11:1"))
    assert "pinned: graph output" in pinned


@pytest.mark.parametrize("batch", [1, 3])
def test_computed_shapes_keep_their_meaning(batch: int) -> None:
    """`C // 4` at run time splits heads, a mean divides by a size read from the tensor."""
    b = Builder(opset=15)
    h = b.add("MatMul", "x", b.weight(6, 8))
    shape = b.add("Shape", h)
    parts = [b.add("Slice", shape, b.ints(i), b.ints(i + 1)) for i in range(3)]
    width = b.add("Div", parts[2], b.ints(4))
    split = b.add("Reshape", h, b.add("Concat", parts[0], parts[1], b.ints(4), width, axis=0))
    total = b.add("ReduceSum", split, b.ints(3), keepdims=1)
    mean = b.add("Div", total, b.add("Cast", width, to=TensorProto.FLOAT))
    joined = b.add("Reshape", b.add("Mul", split, mean), shape)
    y = b.add("MatMul", joined, b.weight(8, 5))
    model = b.model({"x": ["n", 4, 6]}, {y: ["n", 4, 5]})
    result = prune(model, flops=0.6, round_to=1, min_channels=1, measure=False)
    assert result.verdict.passed
    feeds = {"x": np.ones((batch, 4, 6), np.float32)}
    assert opened(load(result.model))(feeds)[0].shape == (batch, 4, 5)


def test_branches_carry_channels_through() -> None:
    b = Builder()
    h = b.add("MatMul", "x", b.weight(6, 8))
    then = helper.make_graph(
        [helper.make_node("Identity", [h], ["a"])],
        "then",
        [],
        [helper.make_tensor_value_info("a", TensorProto.FLOAT, [1, 8])],
    )
    other = helper.make_graph(
        [helper.make_node("Neg", [h], ["b"])],
        "else",
        [],
        [helper.make_tensor_value_info("b", TensorProto.FLOAT, [1, 8])],
    )
    chosen = b.add("If", b.constant(np.array(True)), then_branch=then, else_branch=other)
    y = b.add("MatMul", chosen, b.weight(8, 5))
    model = b.model({"x": [1, 6]}, {y: [1, 5]})
    analysis = prepare(model).analysis
    assert analysis.coupling.n_units == 8
    assert "c2:0" in explain(analysis, parse_place(analysis, f"{h}:1"))


def test_result_runs_as_the_python_door_says() -> None:
    model = attention()
    result = prune(model, flops=0.6, round_to=1)
    assert isinstance(result.model, onnx.ModelProto)
    assert "verified in ONNX Runtime" in str(result)
    feeds = {"x": np.ones((1, 5, 6), np.float32)}
    outputs = [opened(load(m))(feeds) for m in (model, result.model)]
    assert relative_error(*outputs) < 2


def test_a_vanishing_output_is_judged_by_what_it_is_made_of() -> None:
    """Sigmoid of about -40 is rounding noise; its input still proves the cut."""
    b = Builder()
    x = b.conv(b.add("Relu", b.conv("x", 3, 8)), 8, 2)
    low = b.add("Add", x, b.constant(np.float32([[[-40.0]], [[-20.0]]])))
    y = b.add("Sigmoid", low)
    model = b.model({"x": ["n", 3, 8, 8]}, {y: ["n", 2, 8, 8]})
    analysis = prepare(model).analysis
    assert before_last_activation(analysis.model, analysis.shapes) == {y: low}
    noise = [np.float32([1e-18]), np.float32([2e-18])]
    assert relative_error([noise[0]], [noise[1]]) == 1
    assert relative_error([noise[0]], [noise[1]], floors=[1.0]) < 1e-6
    assert prune(model, flops=0.5, round_to=1, min_channels=1, measure=False).verdict.passed


def test_an_activation_is_found_behind_what_hands_numbers_on() -> None:
    b = Builder()
    low = b.add("Add", b.conv("x", 3, 2), b.constant(np.float32(-9)))
    y = b.add("ReduceMean", b.add("Sigmoid", low), axes=[2, 3], keepdims=0)
    y = b.add("Identity", b.add("Squeeze", y, b.ints(0)))
    analysis = prepare(b.model({"x": [1, 3, 8, 8]}, {y: [2]})).analysis
    assert before_last_activation(analysis.model, analysis.shapes) == {y: low}
    assert shares(analysis.model) == {y}


def test_shares_in_branches() -> None:
    """ONNX Runtime's Sigmoid is good to 1e-7 of one: beside 1e-5 that would be no proof."""
    b = Builder()
    h = b.add("Relu", b.add("MatMul", "x", b.weight(6, 8)))
    tensor = helper.make_tensor_value_info
    weights = b.weight(8, 2), b.constant(np.float32(-11))
    nodes = [
        helper.make_node("MatMul", [h, weights[0]], ["z"]),
        helper.make_node("Add", ["z", weights[1]], ["low"]),
    ]

    def branch(last: str) -> onnx.GraphProto:
        result = tensor(last, TensorProto.FLOAT, [1, 2])
        return helper.make_graph(
            [*nodes, helper.make_node(last, ["low"], [last])], last, [], [result]
        )

    def model(other: str) -> onnx.ModelProto:
        y = b.add("If", "which", then_branch=branch("Sigmoid"), else_branch=branch(other))
        graph = helper.make_graph(
            b.nodes,
            "g",
            [tensor("x", TensorProto.FLOAT, [1, 6]), tensor("which", TensorProto.BOOL, [])],
            [tensor(y, TensorProto.FLOAT, [1, 2])],
            b.initializers,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)

    analysis = prepare(model("Softmax")).analysis
    assert shares(analysis.model) == {v.name for v in analysis.model.outputs}
    assert prune(model("Softmax"), flops=0.5, round_to=1, measure=False).verdict.passed
    b.nodes.pop()
    assert not shares(prepare(model("Tanh")).analysis.model)
