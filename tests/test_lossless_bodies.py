"""What does nothing inside bodies of control flow; equal hidden units; zeros behind quantisers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from body_forms import parsed
from graphs import Builder
from idle_forms import cleaned, counts, edit, put, same
from onnx import numpy_helper
from test_bodies import as_if
from test_lossless_forms import GATES, recurrent

from graphprune import api
from graphprune.errors import VerificationError
from graphprune.model import set_initializer
from graphprune.validate import verify_normal


def two_layers(*changes: tuple[str, Any]) -> onnx.ModelProto:
    """[2, 6] → 12 → 5, a Relu between: c0 with bias c1, then c2 with c3."""
    b = Builder(21)
    h = b.add("Relu", b.add("Gemm", "x", b.weight(12, 6), b.weight(12), transB=1))
    y = b.add("Gemm", h, b.weight(5, 12), b.weight(5), transB=1)
    for name, change in changes:
        edit(b, name, change)
    return b.model({"x": [2, 6]}, {y: [2, 5]})


ZERO = ("c0", put([1, 4, 9], 0)), ("c1", put([1, 4, 9], -0.5))
UNREAD = (("c2", put((slice(None), [2, 3]), 0)),)
CONSTANT = ("c0", put([1, 4, 9], 0)), ("c1", put([1, 4, 9], 0.5))


@pytest.mark.parametrize(("changes", "gone"), [(ZERO, 3), (UNREAD, 2), (CONSTANT, 0)])
def test_of_a_branch_what_is_zero_or_not_read_leaves(changes: Any, gone: int) -> None:
    """Constants stay: their readers are not rewritten there."""
    prepared = cleaned(as_if(two_layers(*changes), two_layers()))
    assert counts(prepared) == (gone, 0, 0)
    sizes = [tuple(t.dims) for t in prepared.analysis.model.initializers.values()]
    assert (12 - gone, 6) in sizes
    assert (12, 6) in sizes


LOOP = """
  turns = Constant<value = int64 {3}>()
  go = Constant<value = bool {1}>()
  y = Loop(turns, go, x) <body = body (int64 i, bool c, float[2, 6] s)
      => (bool c2, float[2, 6] s2) {
    c2 = Identity(c)
    h = MatMul(s, up)
    r = Relu(h)
    d = MatMul(r, down)
    s2 = Add(s, d)
  }>"""


@pytest.mark.parametrize("what", ["up", "down"])
def test_of_a_loop(what: str) -> None:
    """A hidden channel that every turn computes for nothing; the state stays."""
    rng = np.random.default_rng(3)
    weights = {"up": rng.standard_normal((6, 12)), "down": rng.standard_normal((12, 6)) / 9}
    weights[what][(slice(None), [2, 7]) if what == "up" else [2, 7]] = 0
    model = parsed("float[2, 6] x", "float[2, 6] y", LOOP)
    for name, value in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))
    prepared = cleaned(model)
    assert counts(prepared) == (2, 0, 0)
    assert tuple(prepared.analysis.model.initializers["up"].dims) == (6, 10)


@pytest.mark.parametrize("way", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("kind", list(GATES))
def test_equal_hidden_units_are_one(kind: str, way: str) -> None:
    """Rows of every gate alike, in both directions; columns as they may be."""

    def rows(value: Any) -> None:
        gates = value.reshape(value.shape[0], -1, 8, *value.shape[2:])
        gates[:, :, [5, 6]] = gates[:, :, [2]]

    equal = {"w": rows, "r": rows, "b": rows}
    prepared = cleaned(recurrent(kind, way, **equal))
    assert counts(prepared) == (0, 0, 2)
    assert prepared.analysis.model.initializers["r"].dims[2] == 6
    for name in equal:
        two = {key: change for key, change in equal.items() if key != name}
        assert counts(cleaned(recurrent(kind, way, **two))) == (0, 0, 0)


def test_units_that_are_equal_one_way_alone_stay() -> None:
    def rows(value: Any) -> None:
        gates = value.reshape(2, -1, 8, *value.shape[2:])
        gates[0, :, 5] = gates[0, :, 2]

    assert counts(cleaned(recurrent("LSTM", "bidirectional", w=rows, r=rows, b=rows)))[2] == 0


@pytest.mark.parametrize("alike", [True, False])
def test_equal_units_that_start_alike(alike: bool) -> None:
    """First states and peepholes are looked at too."""
    b = Builder(23)
    sizes = {"w": (1, 32, 6), "r": (1, 32, 8), "b": (1, 64), "p": (1, 24), "h": (1, 2, 8)}
    for name, size in {**sizes, "s": (1, 2, 8), "v": (8, 5)}.items():
        value = b.rng.standard_normal(size).astype(np.float32) / 3
        if name in sizes:
            last = value.reshape(1, -1, 8, 6) if name == "w" else value.reshape(1, -1, 8)
            last = value.reshape(1, 4, 8, 8) if name == "r" else last
            last[:, :, 5] = last[:, :, 2]
        if name == "s":
            value[..., 5] = value[..., 2] if alike else value[..., 5]
        b.constant(value, name)
    y = b.add("LSTM", "x", "w", "r", "b", "", "h", "s", "p", hidden_size=8)
    y = b.add("MatMul", b.add("Squeeze", y, b.ints(1)), "v")
    prepared = cleaned(b.model({"x": [7, 2, 6]}, {y: [7, 2, 5]}))
    assert counts(prepared) == (0, 0, int(alike))


def quantised_chain(zero_point: int, bias: float) -> onnx.ModelProto:
    """Conv → QuantizeLinear → DequantizeLinear → Conv, weights of integers per channel."""
    b = Builder(22)
    x = "x"
    for inner, outer in ((3, 16), (16, 8)):
        integers = b.rng.integers(-99, 99, (outer, inner, 3, 3)).astype(np.int8)
        vector = b.rng.standard_normal(outer).astype(np.float32)
        if inner == 3:
            integers[[0, 5, 6, 11]] = 0
            vector[[0, 5, 6, 11]] = bias
        scales = b.constant((b.rng.random(outer) / 100 + 0.01).astype(np.float32))
        zeros = b.constant(np.zeros(outer, np.int8))
        weight = b.add("DequantizeLinear", b.constant(integers), scales, zeros, axis=0)
        x = b.add("Conv", x, weight, b.constant(vector), pads=[1] * 4)
        ends = b.constant(np.float32(0.05)), b.constant(np.uint8(zero_point))
        x = b.add("DequantizeLinear", b.add("QuantizeLinear", x, *ends), *ends)
    y = b.add("MatMul", b.add("Flatten", b.add("GlobalAveragePool", x)), b.weight(8, 5))
    return b.model({"x": [1, 3, 6, 6]}, {y: [1, 5]})


@pytest.mark.parametrize("zero_point", [0, 128])
@pytest.mark.parametrize(("bias", "gone"), [(0.0, 4), (0.02, 4), (0.3, 0)])
def test_zero_filters_behind_quantisers(zero_point: int, bias: float, gone: int) -> None:
    """What rounds to zero is zero; other constants stay: weights of integers take none over."""
    prepared = cleaned(quantised_chain(zero_point, bias))
    assert counts(prepared) == (gone, 0, 0)


def test_what_a_range_cuts_off_is_zero() -> None:
    """Below zero, and the integers start there."""
    assert counts(cleaned(quantised_chain(0, -0.7))) == (4, 0, 0)
    assert counts(cleaned(quantised_chain(128, -0.7))) == (0, 0, 0)


def test_equal_channels_stay_equal_behind_a_quantiser() -> None:
    """Read by weights that can be rewritten."""
    b = Builder(24)
    h = b.add("Relu", b.add("Gemm", "x", b.weight(12, 6), b.weight(12), transB=1))
    ends = b.constant(np.float32(0.05)), b.constant(np.uint8(0))
    h = b.add("DequantizeLinear", b.add("QuantizeLinear", h, *ends), *ends)
    y = b.add("Gemm", h, b.weight(5, 12), b.weight(5), transB=1)
    for name in ("c0", "c1"):
        edit(b, name, same([3, 7], [2, 2]))
    assert counts(cleaned(b.model({"x": [2, 6]}, {y: [2, 5]}))) == (0, 0, 2)


@pytest.mark.parametrize("then", [True, False])
def test_bodies_are_made_to_run_when_that_is_proved(then: bool) -> None:
    """Also a branch that random inputs pass by: what is wrong there is found."""
    models = two_layers(*ZERO), two_layers()
    prepared = api.prepare(as_if(*(models if then else models[::-1])))
    verify_normal(prepared.original, prepared.analysis)
    model = prepared.analysis.model
    name = "c2" if then else "if/else_branch/c2"
    assert model.initializers[name].dims[1] == 9
    other = set_initializer(name, model.array(name) + np.float32(1))
    wrong = model.with_graph(model.nodes, {**model.initializers, name: other}.values())
    with pytest.raises(VerificationError, match="prepared model differs"):
        verify_normal(prepared.original, replace(prepared.analysis, model=wrong))


def test_a_rewritten_body_that_does_not_run_is_not_passed_over() -> None:
    body = """
      k = Not(c)
      y = If(k) <then_branch = one () => (float[n, 6] a) {
          row = Constant<value = int64 {100}>()
          g = Gather<axis = 0>(x, row)
          h = MatMul(x, up)
          r = Relu(h)
          d = MatMul(r, down)
          a = Add(d, g)
        }, else_branch = two () => (float[n, 6] e) {
          e = Identity(x)
        }>"""
    model = parsed("float[n, 6] x, bool c", "float[n, 6] y", body)
    rng = np.random.default_rng(3)
    up, down = (rng.standard_normal(size).astype(np.float32) for size in ((6, 12), (12, 6)))
    up[:, [2, 7]] = 0
    for name, array in (("up", up), ("down", down)):
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    with pytest.raises(VerificationError, match="does not run"):
        api.prune(model, flops=0.9, fast=True, measure=False, cache=False, allow_miss=True)
