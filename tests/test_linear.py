"""Linear operators as matrix problems: what ONNX Runtime computes, as rows times a matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import Builder
from onnx import numpy_helper

from graphprune.linear import Linear, linears, rewritten
from graphprune.model import Array, Model
from graphprune.oracle import with_outputs
from graphprune.runtime import run_session, session
from graphprune.shapes import infer
from graphprune.storage import load
from graphprune.unfold import inputs_at, outputs_at, positions

HEAD = '<ir_version: 8, opset_import: ["" : 17]> g '


def parsed(text: str, **weights: Array) -> Model:
    """A model from ONNX text, ``weights`` beside it."""
    proto = onnx.parser.parse_model(HEAD + text)
    proto.graph.initializer.extend(numpy_helper.from_array(w, n) for n, w in weights.items())
    return load(proto)


def draw(*shape: int, seed: int = 0, dtype: Any = np.float32) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def outputs(model: Model, feeds: Mapping[str, Array], *taps: str) -> list[Array]:
    """The graph's outputs, then ``taps``."""
    return run_session(session(with_outputs(model, taps, infer(model)), threads=1), feeds)


def only(model: Model) -> Linear:
    (linear,) = linears(model)
    return linear


def agree(model: Model, linear: Linear, x: Array, y: Array, most: int = 10**6) -> None:
    """X W + b at ``most`` sampled positions is what the runtime gave there."""
    where = positions(linear, y.shape, most, (1, 2))
    rows, wanted = inputs_at(linear, x, y.shape, where), outputs_at(linear, y, where)
    matrix = linear.matrix(model)
    assert rows.shape == (linear.groups, wanted.shape[1], linear.columns(x))
    assert matrix.shape == (linear.groups, wanted.shape[2], rows.shape[2])
    bias = linear.offset(model, matrix.shape[0] * matrix.shape[1])
    found = rows @ matrix.transpose(0, 2, 1) + bias[:, None]
    assert np.abs(found - wanted).max() < 1e-5 * max(1, np.abs(wanted).max())


def same_when_rewritten(model: Model, linear: Linear, feeds: Mapping[str, Array]) -> Model:
    """Rewriting a node with what it has already leaves the outputs as they are."""
    matrix = linear.matrix(model)
    bias = linear.offset(model, matrix.shape[0] * matrix.shape[1])
    again = rewritten(model, [(linear, matrix, bias)])
    for a, b in zip(outputs(model, feeds), outputs(again, feeds), strict=True):
        assert a.shape == b.shape
        assert np.allclose(a, b, rtol=1e-5, atol=1e-5)
    assert again.array(linear.weight).tobytes() == model.array(linear.weight).tobytes()
    assert (
        again.initializers[linear.weight].data_type == model.initializers[linear.weight].data_type
    )
    onnx.checker.check_model(again.assemble(), full_check=True)
    return again


# --- convolutions


@dataclass(frozen=True)
class Case:
    """One convolution: sizes of the input, of the weight, and attributes."""

    x: tuple[int, ...]
    w: tuple[int, ...]
    attributes: dict[str, Any]
    bias: bool = True
    op: str = "Conv"

    def model(self) -> Model:
        b = Builder(5)
        outs = self.w[0] if self.op == "Conv" else self.w[1] * self.attributes.get("group", 1)
        more = [b.weight(outs)] if self.bias else []
        y = b.add(self.op, "x", b.constant(draw(*self.w), "w"), *more, **self.attributes)
        sizes = [None] * len(self.x)
        return load(b.model({"x": list(self.x)}, {y: [self.x[0], outs, *sizes[2:]]}))


CONVOLUTIONS = {
    "1-D": Case((2, 3, 9), (4, 3, 3), {}),
    "1-D, strided": Case((2, 3, 9), (4, 3, 3), {"strides": [2], "pads": [1, 0]}),
    "2-D": Case((2, 3, 5, 6), (4, 3, 3, 3), {"pads": [1, 1, 1, 1]}),
    "2-D, no bias": Case((2, 3, 5, 6), (4, 3, 3, 3), {"pads": [1, 1, 1, 1]}, bias=False),
    "pointwise": Case((2, 3, 5, 6), (4, 3, 1, 1), {}),
    "3-D": Case((1, 2, 4, 3, 5), (3, 2, 2, 1, 3), {"pads": [0, 0, 1, 1, 0, 1]}),
    "oblong kernel": Case((1, 2, 6, 7), (3, 2, 1, 5), {"pads": [0, 2, 0, 2]}),
    "groups": Case((2, 6, 5, 5), (4, 3, 3, 3), {"group": 2, "pads": [1, 1, 1, 1]}),
    "depthwise": Case((2, 4, 5, 5), (4, 1, 3, 3), {"group": 4, "pads": [1, 1, 1, 1]}),
    "depthwise times two": Case((2, 3, 5, 5), (6, 1, 3, 3), {"group": 3}),
    "strides": Case((2, 3, 9, 8), (4, 3, 3, 2), {"strides": [2, 3], "pads": [1, 1, 1, 1]}),
    "asymmetric pads": Case((1, 3, 5, 6), (4, 3, 3, 3), {"pads": [2, 0, 1, 3]}),
    "dilations": Case((1, 3, 9, 9), (4, 3, 3, 3), {"dilations": [2, 3], "pads": [2, 3, 2, 3]}),
    "SAME_UPPER": Case((1, 3, 8, 7), (4, 3, 4, 2), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    "SAME_LOWER": Case((1, 3, 8, 7), (4, 3, 4, 2), {"auto_pad": "SAME_LOWER", "strides": [2, 2]}),
    "SAME, unpadded": Case(
        (1, 3, 9, 9), (4, 3, 1, 1), {"auto_pad": "SAME_UPPER", "strides": [4, 4]}
    ),
    "VALID": Case((1, 3, 8, 7), (4, 3, 4, 2), {"auto_pad": "VALID", "strides": [3, 2]}),
    "all at once": Case(
        (2, 4, 11, 9),
        (6, 2, 3, 2),
        {"group": 2, "strides": [2, 1], "dilations": [2, 3], "pads": [0, 2, 3, 1]},
    ),
}
TRANSPOSED = {
    "plain": Case((2, 3, 4, 5), (3, 4, 3, 3), {}),
    "1-D": Case((2, 3, 5), (3, 4, 3), {"strides": [2]}),
    "no bias": Case((2, 3, 4, 5), (3, 4, 3, 3), {}, bias=False),
    "groups": Case((2, 4, 4, 5), (4, 3, 3, 3), {"group": 2}),
    "depthwise": Case((2, 4, 4, 4), (4, 1, 2, 2), {"group": 4, "strides": [2, 2]}),
    "strides": Case((1, 3, 4, 5), (3, 4, 3, 3), {"strides": [2, 3]}),
    "wider than the kernel": Case((1, 3, 4, 4), (3, 4, 2, 2), {"strides": [3, 3]}),
    "asymmetric pads": Case((1, 3, 4, 5), (3, 4, 3, 3), {"strides": [2, 2], "pads": [2, 0, 1, 1]}),
    "dilations": Case((1, 3, 4, 5), (3, 4, 3, 2), {"dilations": [2, 3], "strides": [2, 1]}),
    "output padding": Case(
        (1, 3, 4, 5), (3, 4, 3, 3), {"strides": [2, 2], "pads": [1] * 4, "output_padding": [1, 1]}
    ),
    "all at once": Case(
        (2, 4, 4, 3),
        (4, 3, 3, 2),
        {"group": 2, "strides": [3, 2], "dilations": [1, 2], "pads": [1, 0, 2, 1]}
        | {"output_padding": [2, 1]},
    ),
}
CASES = {f"Conv {name}": case for name, case in CONVOLUTIONS.items()}
CASES |= {
    f"ConvTranspose {name}": Case(c.x, c.w, c.attributes, c.bias, "ConvTranspose")
    for name, c in TRANSPOSED.items()
}


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


# --- writing back


@pytest.mark.parametrize("beta", [0.5, 0.0])
def test_a_bias_is_added_where_there_was_none(beta: float) -> None:
    """Conv, Gemm and MatMul in a row, each moved by a constant."""
    b = Builder()
    x = b.add("Conv", "x", b.constant(draw(4, 3, 3, 3), "conv"))
    x = b.add("Flatten", b.add("GlobalAveragePool", b.add("Relu", x)))
    x = b.add("Relu", b.add("Gemm", x, b.constant(draw(6, 4), "gemm"), transB=1, beta=beta))
    y = b.add("MatMul", x, b.constant(draw(6, 5), "product"))
    model = load(b.model({"x": [2, 3, 5, 5]}, {y: [2, 5]}))
    taps = [linear.y for linear in linears(model) if linear.y]
    assert [linear.bias for linear in linears(model)] == [None] * 3
    feeds = {"x": draw(2, 3, 5, 5, seed=1)}
    for number, linear in enumerate(linears(model)):
        matrix = linear.matrix(model)
        shift = np.arange(matrix.shape[1])[None] + 1.0
        again = rewritten(model, [(linear, matrix, shift)])
        assert [k.bias is not None for k in linears(again)] == [k == number for k in range(3)]
        before, after = outputs(model, feeds, *taps[:2]), outputs(again, feeds, *taps[:2])
        place = [1, 2, 0][number]
        moved = after[place] - before[place]
        wanted = shift[0].reshape(-1, *[1] * (moved.ndim - 2))
        assert np.allclose(moved, wanted, atol=1e-4)
        assert again.outputs[0].name == y
        onnx.checker.check_model(again.assemble(), full_check=True)
        agreed = next(k for k in linears(again) if k.weight == linear.weight)
        assert agreed.offset(again, matrix.shape[1]) == pytest.approx(shift)


def test_rewritten_several_at_once_and_the_model_given_stays() -> None:
    b = Builder()
    x = b.add("MatMul", "x", b.constant(draw(6, 5), "a"))
    y = b.add("MatMul", b.add("Relu", x), b.constant(draw(5, 4), "b"))
    model = load(b.model({"x": [3, 6]}, {y: [3, 4]}))
    content = model.sha256
    changed = [
        (k, 2 * k.matrix(model), np.ones((1, k.matrix(model).shape[1]))) for k in linears(model)
    ]
    again = rewritten(model, changed)
    given = draw(3, 6, seed=1)
    (found,) = outputs(again, {"x": given})
    hidden = np.maximum(given @ (2 * model.array("a")) + 1, 0)
    assert np.allclose(found, hidden @ (2 * model.array("b")) + 1, atol=1e-4)
    assert load(model.assemble()).sha256 == content


@pytest.mark.parametrize("bias", [True, False])
def test_float16_stays_float16(bias: bool) -> None:
    text = "(float16[2, 6] x) => (float16[2, 4] y) { y = Gemm <alpha = 0.5> (x, w%s) }"
    weights = {"w": draw(6, 4, dtype=np.float16)}
    more = {"b": draw(4, dtype=np.float16)} if bias else {}
    model = parsed(text % (", b" if bias else ""), **weights, **more)
    linear = only(model)
    again = same_when_rewritten(model, linear, {"x": draw(2, 6, seed=1, dtype=np.float16)})
    assert {t.data_type for t in again.initializers.values()} == {onnx.TensorProto.FLOAT16}
    where = np.arange(2)
    assert inputs_at(linear, draw(2, 6, dtype=np.float16), (2, 4), where).dtype == np.float32
    assert outputs_at(linear, draw(2, 4, dtype=np.float16), where).dtype == np.float32


def test_rows_of_a_float16_convolution_are_float32() -> None:
    linear = only(CASES["Conv 2-D"].model())
    y = draw(2, 4, 5, 6, dtype=np.float16)
    assert (
        inputs_at(linear, draw(2, 3, 5, 6, dtype=np.float16), y.shape, np.arange(3)).dtype == "f4"
    )
    assert outputs_at(linear, y, np.arange(3)).dtype == np.float32


# --- weights that are not the node's own


def test_shared_weights_are_left_out() -> None:
    b = Builder()
    w = b.constant(draw(6, 6), "w")
    x = b.add("Relu", b.add("MatMul", "x", w))
    y = b.add("MatMul", b.add("Relu", b.add("MatMul", x, w)), b.constant(draw(6, 3), "own"))
    assert [k.weight for k in linears(load(b.model({"x": [2, 6]}, {y: [2, 3]})))] == ["own"]


def test_a_shared_bias_leaves_both_out() -> None:
    b = Builder()
    bias = b.constant(draw(6), "b")
    x = b.add("Gemm", "x", b.constant(draw(6, 6), "w"), bias)
    y = b.add("Gemm", x, b.constant(draw(6, 6), "v"), bias)
    assert linears(load(b.model({"x": [2, 6]}, {y: [2, 6]}))) == []


def test_computed_weights_are_left_out() -> None:
    b = Builder()
    y = b.add("MatMul", "x", b.add("Relu", "w"))
    assert linears(load(b.model({"x": [2, 6], "w": [6, 4]}, {y: [2, 4]}))) == []


def test_a_weight_that_is_a_graph_output_is_left_out() -> None:
    """Rewriting it would change what the model returns."""
    text = "(float[2, 6] x) => (float[2, 4] y, float[6, 4] w) { y = MatMul(x, w) }"
    assert linears(parsed(text, w=draw(6, 4))) == []


def test_a_weight_that_a_body_captures_is_left_out() -> None:
    text = """(float[2, 6] x, bool c) => (float[2, 4] y) {
        z = MatMul(x, w)
        y = If (c) <then_branch = t () => (float[2, 4] a) { u = MatMul(x, w)  a = Add(u, z) },
                    else_branch = e () => (float[2, 4] a) { a = Neg(z) }>
    }"""
    assert linears(parsed(text, w=draw(6, 4))) == []
