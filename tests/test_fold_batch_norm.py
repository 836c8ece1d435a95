"""BatchNormalization folded into the operator before it, exactly, or left alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from graphs import Builder
from onnx import helper, numpy_helper

from graphprune.model import Array, Model
from graphprune.pipeline import Context, PassResult
from graphprune.runtime import run_session, session
from graphprune.storage import load
from graphprune_passes.fold_batch_norm import FoldBatchNorm


def draw(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape, dtype=np.float32)


def parsed(text: str, opset: int = 17, **weights: Array) -> Model:
    """A model from ONNX text, ``weights`` beside it."""
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]> g {text}')
    proto.graph.initializer.extend(numpy_helper.from_array(w, n) for n, w in weights.items())
    return load(proto)


def folded(model: Model) -> PassResult:
    return FoldBatchNorm().run(model, Context())


def norms(model: Model) -> int:
    return sum(node.op_type == "BatchNormalization" for node in model.nodes)


def same(a: Model, b: Model, shape: tuple[int, ...]) -> None:
    feeds = {"x": draw(*shape, seed=7)}
    pairs = zip(run_session(session(a, 1), feeds), run_session(session(b, 1), feeds), strict=True)
    for expected, actual in pairs:
        assert np.abs(expected - actual).max() < 1e-5 * max(1, np.abs(expected).max())


KINDS: dict[str, tuple[str, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "Conv": ("Conv", (2, 3, 5, 5), (4, 3, 3, 3), {"pads": [1] * 4}),
    "Conv 1-D": ("Conv", (2, 3, 7), (4, 3, 3), {"strides": [2]}),
    "grouped Conv": ("Conv", (2, 6, 5, 5), (4, 3, 3, 3), {"group": 2}),
    "depthwise Conv": ("Conv", (2, 4, 5, 5), (4, 1, 3, 3), {"group": 4}),
    "ConvTranspose": ("ConvTranspose", (2, 3, 4, 4), (3, 4, 3, 3), {"strides": [2, 2]}),
    "grouped ConvTranspose": ("ConvTranspose", (2, 4, 4, 4), (4, 2, 3, 3), {"group": 2}),
    "Gemm": ("Gemm", (3, 6), (4, 6), {"transB": 1}),
    "scaled Gemm": ("Gemm", (3, 6), (6, 4), {"alpha": 0.3, "beta": -2.0}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "bare"])
def test_outputs_stay(kind: str, bias: bool) -> None:
    op, shape, weight, attributes = KINDS[kind]
    b = Builder(2)
    more = [b.weight(4)] if bias else []
    x = b.add(op, "x", b.constant(draw(*weight), "w"), *more, **attributes)
    y = b.add("Relu", b.norm(x, 4))
    model = load(b.model({"x": list(shape)}, {y: [shape[0], 4, *[None] * (len(shape) - 2)]}))
    result = folded(model)
    assert norms(result.model) == 0
    assert len(result.changes) == 1
    assert result.model.array("w").dtype == np.float32
    onnx.checker.check_model(result.model.assemble(), full_check=True)
    same(model, result.model, shape)


def test_the_normalisation_may_make_the_output() -> None:
    b = Builder()
    y = b.norm(b.conv("x", 3, 4), 4)
    model = load(b.model({"x": [1, 3, 5, 5]}, {y: [1, 4, 5, 5]}))
    result = folded(model)
    assert norms(result.model) == 0
    assert [value.name for value in result.model.outputs] == [y]
    same(model, result.model, (1, 3, 5, 5))


def test_a_whole_network_and_again() -> None:
    """Both branches of a residual, each with statistics of its own; twice changes nothing more."""
    b = Builder()
    x = b.add("Relu", b.norm(b.conv("x", 3, 6), 6))
    for _ in range(2):
        middle = b.add("Relu", b.norm(b.conv(x, 6, 4), 4))
        x = b.add("Relu", b.add("Add", x, b.norm(b.conv(middle, 4, 6), 6)))
    model = load(b.model({"x": [1, 3, 6, 6]}, {x: [1, 6, 6, 6]}))
    result = folded(model)
    assert norms(result.model) == 0
    assert len(result.changes) == 5
    names = {name for node in result.model.nodes for name in node.output}
    assert names <= {name for node in model.nodes for name in node.output}
    same(model, result.model, (1, 3, 6, 6))
    again = folded(result.model)
    assert not again.modified
    assert again.model is result.model
    assert norms(model) == 5  # the model given stays


def test_the_epsilon_is_the_nodes_own() -> None:
    b = Builder()
    x = b.conv("x", 3, 4)
    ones = [b.constant(np.full(4, v, np.float32)) for v in (1, 0, 0, 1e-3)]
    y = b.add("BatchNormalization", x, *ones, epsilon=0.1)
    model = load(b.model({"x": [1, 3, 5, 5]}, {y: [1, 4, 5, 5]}))
    same(model, folded(model).model, (1, 3, 5, 5))


def test_statistics_that_two_normalisations_share() -> None:
    b = Builder()
    shared = [b.constant(np.abs(draw(4, seed=s)) + 0.5) for s in range(4)]
    x = b.add("BatchNormalization", b.conv("x", 3, 4), *shared)
    y = b.add("BatchNormalization", b.conv(b.add("Relu", x), 4, 4), *shared)
    model = load(b.model({"x": [1, 3, 5, 5]}, {y: [1, 4, 5, 5]}))
    result = folded(model)
    assert norms(result.model) == 0
    same(model, result.model, (1, 3, 5, 5))


def test_two_in_a_row_fold_one_after_the_other() -> None:
    b = Builder()
    y = b.norm(b.norm(b.conv("x", 3, 4), 4), 4)
    model = load(b.model({"x": [1, 3, 5, 5]}, {y: [1, 4, 5, 5]}))
    once = folded(model).model
    twice = folded(once).model
    assert (norms(once), norms(twice)) == (1, 0)
    same(model, twice, (1, 3, 5, 5))


# --- left alone


def untouched(model: Model) -> None:
    result = folded(model)
    assert result.model is model
    assert not result.modified


def test_training_mode() -> None:
    b = Builder()
    mean, var = b.weight(4), b.constant(np.ones(4, np.float32))
    scale, shift = b.weight(4), b.weight(4)
    x = b.conv("x", 3, 4)
    y, _, _ = b.add("BatchNormalization", x, scale, shift, mean, var, outputs=3, training_mode=1)
    untouched(load(b.model({"x": [2, 3, 5, 5]}, {y: [2, 4, 5, 5]})))


def test_another_reader_of_the_convolution() -> None:
    b = Builder()
    x = b.conv("x", 3, 4)
    y = b.add("Add", b.norm(x, 4), x)
    untouched(load(b.model({"x": [1, 3, 5, 5]}, {y: [1, 4, 5, 5]})))


def test_the_convolution_is_an_output() -> None:
    b = Builder()
    x = b.conv("x", 3, 4)
    ends = {x: [1, 4, 5, 5], b.norm(x, 4): [1, 4, 5, 5]}
    untouched(load(b.model({"x": [1, 3, 5, 5]}, ends)))


@pytest.mark.parametrize("what", ["weight", "bias"])
def test_shared_parameters(what: str) -> None:
    """One convolution on two inputs, with a normalisation behind each."""
    b = Builder()
    w, bias = b.weight(3, 3, 3, 3), b.weight(3)
    other = (b.weight(3, 3, 3, 3), bias) if what == "bias" else (w, b.weight(3))
    x = b.norm(b.add("Conv", "x", w, bias, pads=[1] * 4), 3)
    y = b.norm(b.add("Conv", b.add("Relu", x), *other, pads=[1] * 4), 3)
    untouched(load(b.model({"x": [1, 3, 5, 5]}, {y: [1, 3, 5, 5]})))


def test_statistics_that_are_inputs() -> None:
    b = Builder()
    x = b.conv("x", 3, 4)
    var = b.constant(np.ones(4, np.float32))
    y = b.add("BatchNormalization", x, "scale", b.weight(4), b.weight(4), var)
    untouched(load(b.model({"x": [1, 3, 5, 5], "scale": [4]}, {y: [1, 4, 5, 5]})))


def test_something_between_them() -> None:
    b = Builder()
    y = b.norm(b.add("Relu", b.conv("x", 3, 4)), 4)
    untouched(load(b.model({"x": [1, 3, 5, 5]}, {y: [1, 4, 5, 5]})))


def test_a_body_that_captures_the_convolution() -> None:
    text = """(float[1, 3, 5, 5] x, bool c) => (float[1, 4, 3, 3] y) {
        a = Conv(x, w)
        n = BatchNormalization(a, s, t, m, v)
        y = If (c) <then_branch = p () => (float[1, 4, 3, 3] u) { u = Add(n, a) },
                    else_branch = q () => (float[1, 4, 3, 3] u) { u = Neg(n) }>
    }"""
    vectors = {name: np.abs(draw(4, seed=k)) + 1 for k, name in enumerate("stmv")}
    untouched(parsed(text, w=draw(4, 3, 3, 3), **vectors))


def test_a_normalisation_in_a_body_reads_the_convolution() -> None:
    text = """(float[1, 3, 5, 5] x, bool c) => (float[1, 4, 3, 3] y) {
        a = Conv(x, w)
        y = If (c) <then_branch = p () => (float[1, 4, 3, 3] u)
                        { u = BatchNormalization(a, s, t, m, v) },
                    else_branch = q () => (float[1, 4, 3, 3] u) { u = Neg(a) }>
    }"""
    vectors = {name: np.abs(draw(4, seed=k)) + 1 for k, name in enumerate("stmv")}
    untouched(parsed(text, w=draw(4, 3, 3, 3), **vectors))


def test_statistics_by_element() -> None:
    """``spatial`` = 0 of the old operator sets: a vector for each pixel cannot be a filter's."""
    b = Builder()
    sizes = (4, 3, 3)
    stats = [b.constant(np.abs(draw(*sizes, seed=s)) + 0.5) for s in range(4)]
    x = b.add("Conv", "x", b.weight(4, 3, 3, 3), b.weight(4))
    b.nodes.append(helper.make_node("BatchNormalization", [x, *stats], ["y"], spatial=0))
    graph = helper.make_graph(
        b.nodes,
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 3, 5, 5])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 4, 3, 3])],
        b.initializers,
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 7)], ir_version=3)
    untouched(load(proto))


def test_float16_stays_float16() -> None:
    text = """(float16[1, 3, 5, 5] x) => (float16[1, 4, 3, 3] y) {
        a = Conv(x, w)
        y = BatchNormalization(a, s, t, m, v)
    }"""
    vectors = {n: (np.abs(draw(4, seed=k)) + 1).astype("f2") for k, n in enumerate("stmv")}
    result = folded(parsed(text, w=draw(4, 3, 3, 3).astype("f2"), **vectors)).model
    assert norms(result) == 0
    assert {t.data_type for t in result.initializers.values()} == {onnx.TensorProto.FLOAT16}
    session(result, 1)
