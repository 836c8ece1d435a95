"""What looks idle on the inputs tried, and is not: large inputs, other sizes, integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from graphprune import api
from graphprune.errors import GraphPruneError
from graphprune.model import Array
from graphprune.runtime import opened

RNG = np.random.default_rng(0)
W = (RNG.standard_normal((6, 8)) * 0.1).astype(np.float32)
TWICE = np.concatenate([W[:, :4], W[:, :4]], axis=1)
V = RNG.standard_normal((8, 5)).astype(np.float32)
TABLE = np.where(np.arange(512)[:, None] < 100, np.float32([0, 0, 0, 0, 1, 1, 1, 1]), 1)


def floats(**values: Any) -> dict[str, Array]:
    return {name: np.asarray(value, np.float32) for name, value in values.items()}


def model(inputs: str, body: str, extra: str = "", **weights: Array) -> onnx.ModelProto:
    text = (
        f'<ir_version: 8, opset_import: ["": 17{extra}]> g ({inputs}) => (float[a,b] y) {{{body}}}'
    )
    if "S" in inputs:
        text = text.replace("float[a,b] y", "float[a,b,c] y")
    made = onnx.parser.parse_model(text)
    weights = {"W": W, "V": V, **weights}
    used = {name for node in made.graph.node for name in node.input}
    given = {name: value for name, value in weights.items() if name in used}
    made.graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in given.items())
    return made


def largest_error(made: onnx.ModelProto, feeds: Array) -> float:
    prepared = api.prepare(made)
    pair = opened(prepared.original), opened(prepared.analysis.model.closed)
    (before,), (after,) = (run({"x": feeds}) for run in pair)
    return float(np.abs(np.asarray(before) - after).max())


HALVES = "h = MatMul(x, W) a, c = Split<axis=1>(h)"
CLIPS = {
    "different tops": ("p = Clip(a, , six) q = Clip(c, , hundred)", 100.0),
    "a bottom and a top": ("p = Clip(a, zero) q = Clip(c, , zero)", 10.0),
    "shifted by three": ("p = Clip(a, zero, six) q = Clip(c, three, nine)", 100.0),
}


@pytest.mark.parametrize("name", CLIPS)
def test_clips_of_other_bounds_are_others(name: str) -> None:
    body, size = CLIPS[name]
    body = f"{HALVES} {body} z = Concat<axis=1>(p, q) y = MatMul(z, V)"
    ends = floats(zero=0, three=3, six=6, nine=9, hundred=100)
    made = model("float[4,6] x", body, W=TWICE, **ends)
    x = (RNG.standard_normal((4, 6)) * size).astype(np.float32)
    assert largest_error(made, x) < 1e-4


@pytest.mark.parametrize(
    "body",
    [
        "h = MatMul(x, W) g = com.microsoft.QuickGelu<alpha=0.2>(h) s = Add(g, c) "
        "m = Min(s, zero) y = MatMul(m, V)",
        "h = MatMul(x, W) g = HardSigmoid<alpha=-1.0>(h) k = MatMul(x, U) s = Sigmoid(k) "
        "m = Add(g, s) y = MatMul(m, V)",
    ],
)
def test_bounds_of_curves_with_a_parameter(body: str) -> None:
    more = floats(c=0.45, zero=0, U=RNG.standard_normal((6, 8)))
    made = model("float[4,6] x", body, ', "com.microsoft": 1', **more)
    x = (RNG.standard_normal((4, 6)) * 60).astype(np.float32)
    assert largest_error(made, x) < 1e-3


def test_integers_wrap() -> None:
    body = """d = Sub(x, n) f = Cast<to=1>(d) s = Sub(f, c) r = Relu(s)
      h = MatMul(r, W) y = MatMul(h, V)"""
    more = {"n": np.uint8([200]), **floats(c=60)}
    made = model("uint8[4,6] x", body, **more)
    assert largest_error(made, RNG.integers(0, 256, (4, 6), np.uint8)) < 1e-2


@pytest.mark.parametrize("length", [20, 200])
def test_a_table_is_read_as_far_as_the_inputs_say(length: int) -> None:
    """Its first rows are zero in some columns: not so those that a longer input reads."""
    body = """h = MatMul(x, W) sh = Shape(x) n = Gather<axis=0>(sh, one) e = Unsqueeze(n, at)
      p = Slice(T, at, e, at) g = Mul(h, p) y = MatMul(g, V)"""
    more = {"one": np.int64(1), "at": np.int64([0]), "T": TABLE.astype(np.float32)}
    made = model("float[B,S,6] x", body, **more)
    x = RNG.standard_normal((1, length, 6)).astype(np.float32)
    assert largest_error(made, x) < 1e-4


def test_what_has_left_without_loss_meets_a_budget() -> None:
    """Nothing with MACs is left: no budget on them can be missed."""
    body = "h = MatMul(x, W) r = Relu(h) k = MatMul(r, N) y = Add(x, k)"
    made = model("float[4,6] x", body, N=np.zeros((8, 6), np.float32))
    result = api.prune(made, flops=0.5, measure=False, cache=False, fast=True, repair="none")
    assert result.after.macs == 0


def test_a_budget_on_parameters_met_by_the_clean_up_alone() -> None:
    body = "h = MatMul(x, W) r = Relu(h) k = MatMul(r, N) s = Add(x, k) y = MatMul(s, U)"
    weights = {"N": np.zeros((8, 6), np.float32), **floats(U=RNG.standard_normal((6, 6)))}
    made = model("float[4,6] x", body, **weights)
    result = api.prune(made, params=0.5, measure=False, cache=False, fast=True, repair="none")
    assert result.after.params == 36


def test_a_bias_of_too_many_axes_is_one_error() -> None:
    """What rules compute from it has not the shape of the tensor, and is no fact."""
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[1,3,4,4] x) => (float[1,4,4,4] y)
    { h = Conv(x, W, B) r = Relu(h) y = Conv(r, V) }"""
    made = onnx.parser.parse_model(text)
    for name, shape in {"W": (2, 3, 1, 1), "B": (2, 1), "V": (4, 2, 1, 1)}.items():
        weight = RNG.standard_normal(shape).astype(np.float32)
        made.graph.initializer.append(numpy_helper.from_array(weight, name))
    with pytest.raises(GraphPruneError):
        api.prune(made, flops=0.5, fast=True, measure=False)
