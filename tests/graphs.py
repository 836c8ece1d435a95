"""Small models for tests: a builder with random weights, and random graphs for hypothesis."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


class Builder:
    """Append nodes; every method returns the name of the tensor it made."""

    def __init__(self, seed: int = 0, opset: int = 17) -> None:
        self.rng = np.random.default_rng(seed)
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def constant(self, value: Any, name: str = "") -> str:
        name = name or f"c{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def weight(self, *shape: int) -> str:
        scale = 1 / np.sqrt(max(1, np.prod(shape[1:])))
        return self.constant((self.rng.standard_normal(shape) * scale).astype(np.float32))

    def ints(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def add(self, op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        names = [f"t{len(self.nodes)}_{i}" for i in range(outputs)]
        node = helper.make_node(op, inputs, names, name=f"n{len(self.nodes)}_{op}", **attributes)
        self.nodes.append(node)
        return names[0] if outputs == 1 else names

    def conv(self, x: str, c_in: int, c_out: int, kernel: int = 3, group: int = 1) -> str:
        weight = self.weight(c_out, c_in // group, kernel, kernel)
        pad = kernel // 2
        return self.add("Conv", x, weight, self.weight(c_out), group=group, pads=[pad] * 4)

    def norm(self, x: str, channels: int) -> str:
        mean, bias = self.weight(channels), self.weight(channels)
        scale = self.constant((self.rng.random(channels) + 0.5).astype(np.float32))
        variance = self.constant((self.rng.random(channels) + 0.5).astype(np.float32))
        return self.add("BatchNormalization", x, scale, bias, mean, variance)

    def model(
        self, inputs: dict[str, list[Any]], outputs: dict[str, list[Any]], ir_version: int = 8
    ) -> onnx.ModelProto:
        ends = [
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in side.items()]
            for side in (inputs, outputs)
        ]
        graph = helper.make_graph(self.nodes, "g", *ends, self.initializers)
        domains = sorted({"", *(node.domain for node in self.nodes)})
        opsets = [helper.make_opsetid(name, 1 if name else self.opset) for name in domains]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=ir_version)
        onnx.checker.check_model(model, full_check=True)
        return model


def random_cnn(seed: int) -> onnx.ModelProto:
    """A random network of residuals, concatenations, splits, shuffles, groups, SE and flatten."""
    choose = random.Random(seed)
    b = Builder(seed)
    size, channels = 4, choose.choice([2, 4, 6, 8])
    x = b.conv("x", 3, channels)
    for _ in range(choose.randint(1, 6)):
        x, channels = _random_block(b, choose, x, channels)
    if choose.random() < 0.5:
        x = b.add("GlobalAveragePool", x)
        size = 1
    x = b.add("Flatten", x)
    if choose.random() < 0.5:
        x = b.add("Gemm", x, b.weight(6, channels * size * size), b.weight(6), transB=1)
        x, channels, size = b.add("Relu", x), 6, 1
    y = b.add("MatMul", x, b.weight(channels * size * size, 5))
    return b.model({"x": ["n", 3, 4, 4]}, {y: ["n", 5]})


def _random_block(b: Builder, choose: random.Random, x: str, c: int) -> tuple[str, int]:
    kind = choose.choice(
        ["conv", "residual", "concat", "split", "shuffle", "group", "depthwise", "se", "pad", "act"]
    )
    if kind == "conv" or c % 2:  # halves need an even number
        out = choose.choice([2, 4, 6, 8])
        return b.add("Relu", b.norm(b.conv(x, c, out, choose.choice([1, 3])), out)), out
    if kind == "residual":
        middle = choose.choice([2, 4, 6])
        return b.add("Add", x, b.conv(b.add("Relu", b.conv(x, c, middle)), middle, c)), c
    if kind == "concat":
        out = choose.choice([2, 4])
        return b.add("Concat", x, b.conv(x, c, out), axis=1), c + out
    if kind == "split":
        first, second = b.add("Split", x, b.ints(c // 2, c - c // 2), outputs=2, axis=1)
        other = b.conv(second, c - c // 2, c // 2, 1)
        return b.add("Mul", first, other), c // 2
    if kind == "shuffle":
        x = b.add("Reshape", x, b.ints(0, 2, c // 2, 4, 4))
        x = b.add("Transpose", x, perm=[0, 2, 1, 3, 4])
        return b.add("Reshape", x, b.ints(0, c, 4, 4)), c
    if kind == "group":
        return b.conv(x, c, c * 2, 3, group=2), c * 2
    if kind == "depthwise":
        return b.conv(x, c, c, 3, group=c), c
    if kind == "se":
        s = b.add("ReduceMean", x, axes=[2, 3], keepdims=1)
        s = b.conv(b.add("Relu", b.conv(s, c, 2, 1)), 2, c, 1)
        return b.add("Mul", x, b.add("Sigmoid", s)), c
    if kind == "pad":
        padded = b.add("Pad", x, b.ints(0, 1, 0, 0, 0, 1, 0, 0))
        return b.add("Add", padded, b.conv(x, c, c + 2, 1)), c + 2
    return b.add(choose.choice(["Relu", "Tanh", "Sigmoid", "Erf"]), x), c


def attention(
    heads: int = 4, width: int = 8, length: int = 5, packed: bool = False
) -> onnx.ModelProto:
    """Decomposed self-attention on [1, length, 6], separate or packed projections."""
    b = Builder(1)
    inner = heads * width
    if packed:
        qkv = b.add("MatMul", "x", b.weight(6, 3 * inner))
        split = b.add("Split", qkv, b.ints(inner, inner, inner), outputs=3, axis=2)
    else:
        split = [
            b.add("Add", b.add("MatMul", "x", b.weight(6, inner)), b.weight(inner)) for _ in "qkv"
        ]
    q, k, v = (
        b.add("Transpose", b.add("Reshape", t, b.ints(0, -1, heads, width)), perm=[0, 2, 1, 3])
        for t in split
    )
    scores = b.add("MatMul", q, b.add("Transpose", k, perm=[0, 1, 3, 2]))
    scores = b.add("Mul", scores, b.constant(np.float32(width**-0.5)))
    mixed = b.add("Transpose", b.add("MatMul", b.add("Softmax", scores), v), perm=[0, 2, 1, 3])
    joined = b.add("Reshape", mixed, b.ints(0, -1, inner))
    y = b.add("MatMul", joined, b.weight(inner, 6))
    return b.model({"x": [1, length, 6]}, {y: [1, length, 6]})
