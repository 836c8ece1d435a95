"""What does nothing behind masks, in branches, in recurrent and attention operators, quantised."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from graphs import Builder
from idle_forms import cleaned, counts, edit, put, widths


@pytest.mark.parametrize("kind", ["float", "bool"])
def test_masks_in_the_graph_are_multiplied_in(kind: str) -> None:
    b = Builder(8)
    mask = np.ones((8, 12), np.float32)
    mask[[1, 4, 6]] = 0
    mask[:, [2, 3]] = 0
    held = b.constant(mask if kind == "float" else mask.astype(bool))
    held = held if kind == "float" else b.add("Cast", held, to=1)
    weight = b.add("Mul", b.weight(8, 12), held)
    x = b.add("Tanh", b.add("Gemm", "x", b.weight(12, 6), b.weight(12), transB=1))
    x = b.add("Relu", b.add("Gemm", x, weight, transB=1))
    y = b.add("MatMul", x, b.weight(8, 5))
    prepared = cleaned(b.model({"x": [2, 6]}, {y: [2, 5]}))
    assert prepared.cleaned.counts["mask"] == 1
    assert counts(prepared) == (5, 0, 0)
    assert widths(prepared, weight) == [(5, 10)]


def residual(b: Builder, last: float, shift: float) -> str:
    """x + the branch Conv → Relu → Conv → BatchNormalization of scale ``last``, and ``shift``."""
    x = b.add("Relu", b.conv("x", 3, 16))
    inner = b.conv(b.add("Relu", b.conv(x, 16, 16)), 16, 16)
    scale, offset = (np.full(16, v, np.float32) for v in (last, shift))
    mean, variance = b.weight(16), b.constant(np.ones(16, np.float32))
    inner = b.add(
        "BatchNormalization", inner, b.constant(scale), b.constant(offset), mean, variance
    )
    return str(b.add("Relu", b.add("Add", inner, x)))


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_a_branch_of_constants_is_gone(shift: float) -> None:
    b = Builder(9)
    x = residual(b, 0.0, shift)
    y = b.add("MatMul", b.add("Flatten", b.add("GlobalAveragePool", x)), b.weight(16, 5))
    prepared = cleaned(b.model({"x": ["n", 3, 8, 8]}, {y: ["n", 5]}))
    kinds = [node.op_type for node in prepared.analysis.model.nodes]
    assert kinds.count("Conv") == 1
    assert kinds.count("Add") == int(shift > 0)
    assert prepared.cleaned.counts["branch"] == 1


def test_a_branch_at_the_output_is_gone() -> None:
    b = Builder(9)
    y = b.add("Add", "x", b.add("Mul", b.conv("x", 3, 3), b.constant(np.zeros((3, 1, 1), "f"))))
    prepared = cleaned(b.model({"x": ["n", 3, 8, 8]}, {y: ["n", 3, 8, 8]}))
    assert [node.op_type for node in prepared.analysis.model.nodes] == ["Add"]


def test_a_branch_that_gives_the_result_its_shape_stays() -> None:
    """[1, 3] plus zeros of [n, 3]: n rows, however many."""
    b = Builder(9)
    zeros = b.add("Mul", "x", b.constant(np.zeros(3, np.float32)))
    y = b.add("Add", b.add("ReduceMax", "x", axes=[0], keepdims=1), zeros)
    prepared = cleaned(b.model({"x": ["n", 3]}, {y: ["n", 3]}))
    assert not prepared.cleaned


GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def recurrent(kind: str, way: str, **changes: Any) -> onnx.ModelProto:
    """[7, 2, 6] → 8 hidden units → 5; ``changes`` rewrite w, r, b and v, the last weight."""
    b = Builder(11)
    directions, gates = 1 + (way == "bidirectional"), GATES[kind]
    shapes = {"w": (directions, gates * 8, 6), "r": (directions, gates * 8, 8)}
    shapes |= {"b": (directions, gates * 16), "v": (directions * 8, 5)}
    names = {}
    for name, shape in shapes.items():
        value = b.rng.standard_normal(shape).astype(np.float32) / 3
        changes.get(name, lambda v: None)(value)
        names[name] = b.constant(value, name)
    more = {"linear_before_reset": 1} if kind == "GRU" else {}
    y = b.add(kind, "x", "w", "r", "b", hidden_size=8, direction=way, **more)
    y = b.add("Reshape", b.add("Transpose", y, perm=[0, 2, 1, 3]), b.ints(0, 0, -1))
    y = b.add("MatMul", y, "v")
    return b.model({"x": [7, 2, 6]}, {y: [7, 2, 5]})


@pytest.mark.parametrize("way", ["forward", "bidirectional"])
@pytest.mark.parametrize("kind", list(GATES))
def test_hidden_units_of_which_every_gate_is_zero_leave(kind: str, way: str) -> None:
    def rows(value: Any) -> None:
        value.reshape(value.shape[0], -1, 8, *value.shape[2:])[:, :, [0, 5]] = 0

    prepared = cleaned(recurrent(kind, way, w=rows, r=rows, b=rows))
    assert counts(prepared) == (2, 0, 0)
    assert prepared.analysis.model.initializers["r"].dims[2] == 6
    with_bias = cleaned(recurrent(kind, way, w=rows, r=rows))
    assert counts(with_bias) == (0, 0, 0)


@pytest.mark.parametrize("kind", list(GATES))
def test_hidden_units_that_only_read_themselves_leave(kind: str) -> None:
    def columns(value: Any) -> None:
        others = [i for i in range(value.shape[1]) if i % 8 != 3]
        value[:, others, 3] = 0

    prepared = cleaned(recurrent(kind, "forward", r=columns, v=put(3, 0)))
    assert counts(prepared) == (1, 0, 0)
    read = cleaned(recurrent(kind, "forward", r=columns))
    assert counts(read) == (0, 0, 0)


@pytest.mark.parametrize("bias", [False, True])
def test_a_head_whose_values_are_constant_leaves(bias: bool) -> None:
    """Softmax makes means: of zeros zero, and of one bias that bias."""
    b = Builder(12)
    heads, width = 4, 8
    split = []
    for part in "qkv":
        weight, vector = b.weight(6, 32), b.weight(32)
        if part == "v":
            edit(b, weight, put((slice(None), slice(8, 24)), 0))
            edit(b, vector, put(slice(8, 24), np.linspace(0.1, 1, 16) if bias else 0))
        split.append(b.add("Add", b.add("MatMul", "x", weight), vector))
    shaped = [b.add("Reshape", t, b.ints(0, -1, heads, width)) for t in split]
    q, k, v = (b.add("Transpose", t, perm=[0, 2, 1, 3]) for t in shaped)
    scores = b.add("Softmax", b.add("MatMul", q, b.add("Transpose", k, perm=[0, 1, 3, 2])))
    mixed = b.add("Transpose", b.add("MatMul", scores, v), perm=[0, 2, 1, 3])
    y = b.add("MatMul", b.add("Reshape", mixed, b.ints(0, -1, 32)), b.weight(32, 6))
    prepared = cleaned(b.model({"x": [1, "n", 6]}, {y: [1, "n", 6]}))
    assert counts(prepared) == ((0, 2, 0) if bias else (2, 0, 0))


def test_weights_that_are_transposed_in_the_graph_take_constants_over() -> None:
    """As exporters leave a linear layer without constant folding: MatMul(x, Transpose(w)) + b."""
    b = Builder(13)
    x = "x"
    for inner, outer in ((6, 12), (12, 5)):
        weight = b.add("Transpose", b.weight(outer, inner), perm=[1, 0])
        x = b.add("Add", b.add("MatMul", x, weight), b.weight(outer))
        x = b.add("Mul", x, b.add("Sigmoid", x)) if outer == 12 else x
    edit(b, "c0", put([2, 3, 9], 0))
    prepared = cleaned(b.model({"x": ["n", 6]}, {x: ["n", 5]}))
    assert counts(prepared) == (0, 3, 0)
    assert widths(prepared, "c0", "c1") == [(9, 6), (9,)]


def test_branches_are_gone_with_blocks_alone_too() -> None:
    b = Builder(9)
    x = residual(b, 0.0, 0.0)
    y = b.add("MatMul", b.add("Flatten", b.add("GlobalAveragePool", x)), b.weight(16, 5))
    model = b.model({"x": ["n", 3, 8, 8]}, {y: ["n", 5]})
    assert cleaned(model, units=("blocks",)).cleaned.counts["branch"] == 1


@pytest.mark.parametrize("rows", [True, False])
def test_of_quantised_weights_leaves_what_is_zero_and_what_nobody_reads(rows: bool) -> None:
    b = Builder(14)
    integers = [b.rng.integers(-99, 99, size).astype(np.int8) for size in ((6, 16), (16, 5))]
    integers[0 if rows else 1][(slice(None), [1, 4, 9]) if rows else [1, 4, 9]] = 0
    x = "x"
    for value in integers:
        weight = b.add("DequantizeLinear", b.constant(value), b.constant(np.float32(0.01)))
        x = b.add("MatMul", x, weight)
        if len(value) == 6:
            ends = b.constant(np.float32(0.05)), b.constant(np.uint8(0))
            x = b.add("DequantizeLinear", b.add("QuantizeLinear", b.add("Relu", x), *ends), *ends)
    prepared = cleaned(b.model({"x": [2, 6]}, {x: [2, 5]}))
    assert counts(prepared) == (3, 0, 0)


@pytest.mark.parametrize("act", ["Gelu", "FastGelu", "QuickGelu"])
def test_constants_behind_fused_activations(act: str) -> None:
    b = Builder(15)
    x = b.add("Gemm", "x", b.weight(12, 6), b.weight(12), transB=1)
    x = b.add(act, x, domain="com.microsoft")
    y = b.add("Gemm", x, b.weight(5, 12), b.weight(5), transB=1)
    edit(b, "c0", put([2, 3], 0))
    nodes = [node for node in b.nodes if node.domain]
    assert len(nodes) == 1
    model = b.model({"x": [2, 6]}, {y: [2, 5]})
    assert counts(cleaned(model)) == (0, 2, 0)


@pytest.mark.parametrize("bias", [0.0, 0.5])
def test_a_head_of_fused_attention_whose_values_are_constant(bias: float) -> None:
    b = Builder(16, opset=23)
    split = []
    for part in "qkv":
        weight, vector = b.weight(6, 32), b.weight(32)
        if part == "v":
            edit(b, weight, put((slice(None), slice(8, 24)), 0))
            edit(b, vector, put(slice(8, 24), bias))
        split.append(b.add("Add", b.add("MatMul", "x", weight), vector))
    shaped = [b.add("Reshape", t, b.ints(0, -1, 4, 8)) for t in split]
    heads = [b.add("Transpose", t, perm=[0, 2, 1, 3]) for t in shaped]
    mixed = b.add("Transpose", b.add("Attention", *heads), perm=[0, 2, 1, 3])
    y = b.add("MatMul", b.add("Reshape", mixed, b.ints(0, -1, 32)), b.weight(32, 6))
    prepared = cleaned(b.model({"x": [1, "n", 6]}, {y: [1, "n", 6]}, ir_version=11))
    assert counts(prepared) == ((0, 2, 0) if bias else (2, 0, 0))
