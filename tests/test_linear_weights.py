"""Weights of linear operators: written back, or left alone where they are not the node's own."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from graphs import Builder
from linear_forms import CASES, draw, only, outputs, parsed, same_when_rewritten

from graphprune.linear import linears
from graphprune.rewriting import rewritten
from graphprune.storage import load
from graphprune.unfold import inputs_at, outputs_at

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
