"""Quantised models that are pruned twice, or written as exporters seldom write them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from graphs import Builder
from integer_forms import MICROSOFT, Quantising
from onnx import TensorProto

from graphprune.api import prune

QUIET: dict[str, Any] = {"measure": False, "cache": False, "round_to": 1}


def unexplained(first: onnx.ModelProto, second: onnx.ModelProto) -> float:
    """Squared error of the outputs over the energy of the first's."""
    rng = np.random.default_rng(1)
    runners = [ort.InferenceSession(m.SerializeToString()) for m in (first, second)]
    shape = [d.dim_value for d in first.graph.input[0].type.tensor_type.shape.dim]
    feeds = [{"x": rng.standard_normal(shape).astype(np.float32)} for _ in range(20)]
    a, b = (np.stack([r.run(None, feed)[0] for feed in feeds]).astype(float) for r in runners)
    return float(np.square(a - b).sum() / np.square(a).sum())


def as_wide_as_its_channels() -> onnx.ModelProto:
    """ConvInteger without a bias, on maps of 5 x 5, of which a result may have 5 channels."""
    b, x = Quantising(7), "x"
    for inside, outside in ((3, 8), (8, 8), (8, 8), (8, 4)):
        w, scale, zero = b.quantised(outside, inside, 3, 3, signed=False)
        q, s, z = b.rounded(x)
        y = b.add("ConvInteger", q, w, z, zero, pads=[1] * 4)
        y = b.add("Cast", y, to=TensorProto.FLOAT)
        x = b.add("Mul", y, b.add("Mul", s, scale))
        x = b.add("Relu", x) if outside == 8 else x
    return b.model({"x": [1, 3, 5, 5]}, {x: [1, 4, 5, 5]})


def test_a_bias_of_an_earlier_run_stays_on_its_axis() -> None:
    model = as_wide_as_its_channels()
    first = prune(model, flops=0.75, samples=64, **QUIET)
    second = prune(first.model, flops=0.95, samples=64, **QUIET)
    dims = [list(t.dims) for t in second.model.graph.initializer if "graphprune_bias" in t.name]
    assert dims and all(len(each) == 3 for each in dims)
    assert unexplained(first.model, second.model) < 0.2


@pytest.mark.parametrize("options", [{}, {"fast": True}])
def test_one_zero_point_for_all_channels(options: dict[str, Any]) -> None:
    """ONNX Runtime takes that; DequantizeLinear does not."""
    b, x = Quantising(8), "x"
    for width in (24, 6):
        w, scale, _ = b.quantised(6 if width == 24 else 24, width, axis=1)
        x = b.add("DynamicQuantizeMatMul", x, w, scale, b.constant(np.int8(0)), domain=MICROSOFT)
        x = b.add("Relu", x) if width == 24 else x
    model = b.model({"x": [4, 6]}, {x: [4, 6]})
    result = prune(model, flops=0.6, samples=64, **options, **QUIET)
    assert all(one.after < one.before for one in result.repairs if one.after is not None)
    assert result.repairs


@pytest.mark.parametrize("between", ["Clip", "scale"])
def test_integers_that_are_read_otherwise_are_not_taken_for_numbers(between: str) -> None:
    b = Builder(4)
    scale, zero = b.constant(np.float32(0.02)), b.constant(np.uint8(0))
    h = b.add("Relu", b.add("Gemm", "x", b.weight(24, 8), b.weight(24), transB=1))
    q = b.add("QuantizeLinear", h, scale, zero)
    if between == "Clip":
        q = b.add("Clip", q, b.constant(np.uint8(5)), b.constant(np.uint8(200)))
    else:
        scale = b.constant(np.float32(0.08))
    h = b.add("DequantizeLinear", q, scale, zero)
    h = b.add("Relu", b.add("Gemm", h, b.weight(24, 24), b.weight(24), transB=1))
    y = b.add("Gemm", h, b.weight(6, 24), b.weight(6), transB=1)
    model = b.model({"x": [10, 8]}, {y: [10, 6]})
    as_cut, repaired = (
        prune(model, flops=0.5, fast=True, **more, **QUIET) for more in ({"repair": "none"}, {})
    )
    assert unexplained(model, repaired.model) <= 1.05 * unexplained(model, as_cut.model)
