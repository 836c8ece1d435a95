"""Small models of many operators, to be mutated: own ones, and ONNX's one-operator tests."""

from __future__ import annotations

import random
from functools import cache

import numpy as np
import onnx
from graphs import Builder, attention, random_cnn
from onnx import TensorProto, helper

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def any_model(choose: random.Random) -> onnx.ModelProto:
    """One model of the pool, a fresh copy."""
    kind = choose.random()
    if kind < 0.3:
        model = random_cnn(choose.randrange(40))
    elif kind < 0.7:
        model = choose.choice(OWN)()
    else:
        models = node_tests()
        model = models[choose.randrange(len(models))]
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


@cache
def node_tests() -> list[onnx.ModelProto]:
    """The one-operator models that onnx ships."""
    from onnx.backend.test.loader import load_model_tests

    with np.errstate(all="ignore"):
        return [case.model for case in load_model_tests(kind="node") if case.model is not None]


def recurrent() -> onnx.ModelProto:
    b = Builder(2)
    x = b.add("LSTM", "x", b.weight(1, 32, 6), b.weight(1, 32, 8), outputs=1, hidden_size=8)
    x = b.add("Reshape", x, b.ints(4, 1, 8))
    x = b.add("GRU", x, b.weight(1, 12, 8), b.weight(1, 12, 4), hidden_size=4)
    x = b.add("Squeeze", x, b.ints(1))
    y = b.add("MatMul", x, b.weight(4, 3))
    return b.model({"x": [4, 1, 6]}, {y: [4, 1, 3]})


def quantised() -> onnx.ModelProto:
    b = Builder(3)
    weight = b.constant(b.rng.integers(-100, 100, (8, 3, 3, 3)).astype(np.int8))
    scale = b.constant((b.rng.random(8) / 100 + 0.001).astype(np.float32))
    zero = b.constant(np.zeros(8, np.int8))
    unit, middle = b.constant(np.float32(0.02)), b.constant(np.uint8(128))
    x = b.add("DequantizeLinear", b.add("QuantizeLinear", "x", unit, middle), unit, middle)
    w = b.add("DequantizeLinear", weight, scale, zero, axis=0)
    x = b.add("Relu", b.add("Conv", x, w))
    y = b.conv(x, 8, 4)
    return b.model({"x": [1, 3, 6, 6]}, {y: [1, 4, 4, 4]})


def mixed() -> onnx.ModelProto:
    """Normalisations, gates, gathers and shape arithmetic."""
    b = Builder(4)
    table = b.weight(20, 8)
    x = b.add("Gather", table, b.add("Cast", "x", to=INT64))
    n = b.add("LayerNormalization", x, b.weight(8), b.weight(8))
    gate, up = b.add("MatMul", n, b.weight(8, 16)), b.add("MatMul", n, b.weight(8, 16))
    h = b.add("Mul", b.add("Mul", gate, b.add("Sigmoid", gate)), up)
    x = b.add("Add", x, b.add("MatMul", h, b.weight(16, 8)))
    rows = b.add("Gather", b.add("Shape", x), b.ints(0))
    flat = b.add("Reshape", x, b.add("Concat", rows, b.ints(-1), axis=0))
    y = b.add("Gemm", flat, b.weight(4, 40), b.weight(4), transB=1)
    return b.model({"x": ["n", 5]}, {y: ["n", 4]})


def branches() -> onnx.ModelProto:
    """An If whose branches capture, and a Loop."""
    b = Builder(5)
    x = b.add("Relu", b.add("MatMul", "x", b.weight(6, 8)))
    w = b.weight(8, 4)

    def branch(op: str) -> onnx.GraphProto:
        nodes = [helper.make_node("MatMul", [x, w], ["m"]), helper.make_node(op, ["m"], ["r"])]
        return helper.make_graph(nodes, op, [], [helper.make_tensor_value_info("r", FLOAT, [2, 4])])

    flag = b.add("Greater", b.add("ReduceSum", x, keepdims=0), b.constant(np.float32(0)))
    y = b.add("If", flag, then_branch=branch("Tanh"), else_branch=branch("Sigmoid"))
    return b.model({"x": [2, 6]}, {y: [2, 4]})


def functions() -> onnx.ModelProto:
    b = Builder(6)
    x = b.add("MatMul", "x", b.weight(6, 8))
    x = b.add("act", x, domain="local")
    y = b.add("MatMul", x, b.weight(8, 3))
    ends = [[helper.make_tensor_value_info(n, FLOAT, [2, s])] for n, s in (("x", 6), (y, 3))]
    graph = helper.make_graph(b.nodes, "g", *ends, b.initializers)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    inner = [helper.make_node("Sigmoid", ["x"], ["s"]), helper.make_node("Mul", ["x", "s"], ["y"])]
    act = helper.make_function("local", "act", ["x"], ["y"], inner, opsets[:1])
    return helper.make_model(graph, opset_imports=opsets, functions=[act], ir_version=8)


OWN = (attention, recurrent, quantised, mixed, branches, functions)
