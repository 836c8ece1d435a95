"""Linear operators as matrix problems: what ONNX Runtime computes, as rows times a matrix."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import Builder
from linear_forms import CASES, agree, draw, only, outputs, same_when_rewritten

from graphprune.linear import linears
from graphprune.rewriting import rewritten
from graphprune.storage import load
from graphprune.unfold import inputs_at, positions

# --- convolutions


@pytest.mark.parametrize("name", CASES)
def test_convolutions(name: str) -> None:
    case = CASES[name]
    model = case.model()
    linear = only(model)
    x = draw(*case.x, seed=1)
    (y,) = outputs(model, {"x": x})
    assert linear.kind == case.op
    assert linear.taps == np.prod(case.w[2:])
    agree(model, linear, x, y)
    agree(model, linear, x, y, most=5)
    same_when_rewritten(model, linear, {"x": x})


def test_sampled_positions_are_distinct_ascending_and_seeded() -> None:
    linear = only(CASES["Conv 2-D"].model())
    shape = (2, 4, 30, 30)
    first, again, other = (positions(linear, shape, 20, seed) for seed in ((1, 2), (1, 2), (1, 3)))
    assert first.tolist() == again.tolist() != other.tolist()
    assert len(set(first.tolist())) == 20
    assert (np.diff(first) > 0).all()
    assert positions(linear, shape, 900, (0,)).tolist() == list(range(900))
    assert len(positions(linear, shape, 0, (0,))) == 1


def test_what_is_decided_by_its_output_size_is_left_out() -> None:
    for attributes in ({"output_shape": [9, 9]}, {"auto_pad": "SAME_UPPER"}):
        b = Builder()
        y = b.add("ConvTranspose", "x", b.weight(3, 4, 3, 3), strides=[2, 2], **attributes)
        assert linears(load(b.model({"x": [1, 3, 4, 4]}, {y: [1, 4, None, None]}))) == []


# --- matrix products

GEMMS = {
    "plain": ({}, (5,)),
    "no bias": ({}, None),
    "transB": ({"transB": 1}, (5,)),
    "alpha": ({"alpha": 0.3, "transB": 1}, (5,)),
    "beta": ({"beta": -2.5}, (5,)),
    "alpha and beta, no bias": ({"alpha": 1.7, "beta": 0.5}, None),
    "no bias, by beta too": ({"beta": 0.0}, None),
    "a bias that beta leaves out": ({"beta": 0.0}, ()),
    "one bias for all": ({"beta": 3.0}, (1,)),
    "scalar bias": ({}, ()),
    "bias of rank 2": ({"transB": 1}, (1, 5)),
}


@pytest.mark.parametrize("name", GEMMS)
def test_gemm(name: str) -> None:
    attributes, bias = GEMMS[name]
    b = Builder()
    shape = (5, 6) if attributes.get("transB") else (6, 5)
    more = [] if bias is None else [b.constant(draw(*bias), "b")]
    y = b.add("Gemm", "x", b.constant(draw(*shape), "w"), *more, **attributes)
    model = load(b.model({"x": [4, 6]}, {y: [4, 5]}))
    x = draw(4, 6, seed=1)
    (wanted,) = outputs(model, {"x": x})
    linear = only(model)
    agree(model, linear, x, wanted)
    agree(model, linear, x, wanted, most=2)
    same_when_rewritten(model, linear, {"x": x})


@pytest.mark.parametrize("rows", [4, 5, 1])
def test_a_bias_by_row_is_no_bias_by_output(rows: int) -> None:
    """[rows, 1] is added to each row of the product, which no vector of outputs can say."""
    b = Builder()
    column = b.constant(draw(rows, 1), "b")
    y = b.add("Gemm", "x", b.constant(draw(6, 5), "w"), column)
    model = load(b.model({"x": [rows, 6]}, {y: [rows, 5]}))
    x = draw(rows, 6, seed=1)
    (wanted,) = outputs(model, {"x": x})
    for linear in linears(model):  # left out, or right
        agree(model, linear, x, wanted)


def test_gemm_that_is_no_matrix_problem_of_its_input() -> None:
    for attributes in ({"transA": 1}, {"alpha": 0.0}):
        b = Builder()
        y = b.add("Gemm", "x", b.weight(4, 4), b.weight(4), **attributes)
        assert linears(load(b.model({"x": [4, 4]}, {y: [4, 4]}))) == []


@pytest.mark.parametrize("shape", [(3, 6), (2, 3, 6), (2, 2, 3, 6)], ids=len)
@pytest.mark.parametrize("bias", [None, (5,), (1, 5), (1, 1, 5)], ids=str)
@pytest.mark.parametrize("first", [True, False], ids=["left", "right"])
def test_matmul(shape: tuple[int, ...], bias: tuple[int, ...] | None, first: bool) -> None:
    b = Builder()
    y = b.add("MatMul", "x", b.constant(draw(6, 5), "w"))
    if bias is not None:
        constant = b.constant(draw(*bias), "b")
        y = b.add("Add", *((constant, y) if first else (y, constant)))
    rank = max(len(shape), len(bias or ()))
    sizes = [1] * (rank - len(shape)) + [*shape[:-1], 5]
    model = load(b.model({"x": list(shape)}, {y: sizes}))
    x = draw(*shape, seed=1)
    (wanted,) = outputs(model, {"x": x})
    linear = only(model)
    assert linear.bias == (None if bias is None else "b")
    assert linear.y == y
    agree(model, linear, x, wanted)
    agree(model, linear, x, wanted, most=3)
    same_when_rewritten(model, linear, {"x": x})


def test_an_added_vector_that_others_see_too_is_no_bias() -> None:
    """The sum is another tensor where the product itself is read, or is an output."""
    for twice in (True, False):
        b = Builder()
        y = b.add("MatMul", "x", b.constant(draw(6, 5), "w"))
        z = b.add("Add", y, b.constant(draw(5), "b"))
        ends = {z: [3, 5], (b.add("Relu", y) if twice else y): [3, 5]}
        linear = only(load(b.model({"x": [3, 6]}, ends)))
        assert (linear.bias, linear.y) == (None, y)


def test_a_sum_that_is_no_bias() -> None:
    """A matrix, or a vector along another axis: neither is one number for each output."""
    for shape in ((3, 5), (3, 1), (1,)):
        b = Builder()
        y = b.add("MatMul", "x", b.constant(draw(6, 5), "w"))
        z = b.add("Add", y, b.constant(draw(*shape), "b"))
        assert only(load(b.model({"x": [3, 6]}, {z: [3, 5]}))).bias is None


def test_a_constant_times_the_input_is_left_out() -> None:
    b = Builder()
    y = b.add("MatMul", b.weight(5, 3), "x")
    assert linears(load(b.model({"x": [3, 4]}, {y: [5, 4]}))) == []


# --- recurrent


@pytest.mark.parametrize("op", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_recurrent_inputs(op: str, directions: int, bias: bool) -> None:
    """With no recurrent weights and one step, the gates are all there is: doubling the input
    weights (and the input half of the bias) must do what doubling the input does."""
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[op]
    b = Builder()
    w = b.constant(draw(directions, gates * 4, 5), "w")
    r = b.constant(draw(directions, gates * 4, 4), "r")
    more = [b.constant(draw(directions, 2 * gates * 4), "b")] if bias else []
    way = "forward" if directions == 1 else "bidirectional"
    y = b.add(op, "x", w, r, *more, hidden_size=4, direction=way)
    model = load(b.model({"x": [3, 2, 5]}, {y: [3, directions, 2, 4]}))
    x = draw(3, 2, 5, seed=1)
    linear, _ = linears(model)
    matrix = linear.matrix(model)
    offset = linear.offset(model, matrix.shape[1])
    assert linear.y is None
    assert linear.contracted_axis == 2
    assert matrix.shape == (1, directions * gates * 4, 5)
    assert offset.shape == (1, directions * gates * 4)
    where = positions(linear, x.shape, 100, (0,))
    assert inputs_at(linear, x, x.shape, where).tolist() == x.reshape(1, 6, 5).tolist()
    again = same_when_rewritten(model, linear, {"x": x})
    assert {one.bias for one in linears(again)} == {again.nodes[0].input[3]} - {""}
    # moving a constant from the bias to the input is the same to the gates
    moved = rewritten(model, [(linear, matrix, offset + matrix @ np.ones(5))])
    (a,), (c,) = outputs(model, {"x": x + 1}), outputs(moved, {"x": x})
    assert np.allclose(a, c, atol=1e-5)


def test_the_recurrent_half_of_a_bias_stays() -> None:
    b = Builder()
    w, r = b.constant(draw(1, 12, 5), "w"), b.constant(draw(1, 12, 4), "r")
    y = b.add("GRU", "x", w, r, b.constant(draw(1, 24), "b"), hidden_size=4, linear_before_reset=1)
    model = load(b.model({"x": [3, 2, 5]}, {y: [3, 1, 2, 4]}))
    linear, _ = linears(model)
    again = rewritten(model, [(linear, linear.matrix(model), np.zeros((1, 12)))])
    assert (again.array("b")[:, :12] == 0).all()
    assert (again.array("b")[:, 12:] == model.array("b")[:, 12:]).all()


def test_recurrent_batch_first_is_left_out() -> None:
    b = Builder()
    y = b.add("GRU", "x", b.weight(1, 12, 5), b.weight(1, 12, 4), hidden_size=4, layout=1)
    assert linears(load(b.model({"x": [2, 3, 5]}, {y: [2, 3, 1, 4]}))) == []
