"""Quantised and mixed precision models: every operator, and whole networks as ORT quantises them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import Builder
from onnx import TensorProto, numpy_helper, parser
from onnxruntime import quantization
from quantised_forms import NETWORKS, WAYS, Random, by_weights, convolutional, quantised

from graphprune import validate
from graphprune.api import plan, prepare, prune
from graphprune.check import check_rule
from graphprune.cut import cut
from graphprune.errors import VerificationError
from graphprune.linear import linears, repairable
from graphprune.model import Model, set_initializer
from graphprune.options import Options
from graphprune.oracle import law_error
from graphprune.plan import removed_units
from graphprune.quantisation import Quantised, real
from graphprune.rewriting import rewritten
from graphprune.rules import relate
from graphprune.runtime import opened, random_inputs
from graphprune.shapes import infer
from graphprune.storage import load
from graphprune.unrounded import rounds, unrounded

OPSETS = '"": {}, "com.microsoft": 1'
HEAD = "<ir_version: 10, opset_import: [{opsets}]> g ({inputs}) => ({outputs})"
SCALES = "".join(
    f"{name} = Constant<value = float {{{value}}}>() "
    for name, value in (("xs", 0.02), ("ws", 0.01), ("ys", 0.05))
)
SIGNED = SCALES + "".join(
    f"{name} = Constant<value = int8 {{{value}}}>() "
    for name, value in (("xz", -3), ("wz", 0), ("yz", 5))
)
UNSIGNED = SCALES + "".join(
    f"{name} = Constant<value = uint8 {{{value}}}>() "
    for name, value in (("xz", 120), ("wz", 131), ("yz", 118))
)
ROWS = "xs = Constant<value = float {0.02}>() ys = Constant<value = float {0.05}>() "
ROWS += "ws = Constant<value = float[4] {0.01, 0.02, 0.015, 0.03}>() "
ROWS += "xz = Constant<value = uint8 {120}>() yz = Constant<value = uint8 {118}>() "
ROWS += "wz = Constant<value = int8[4] {0, 0, 0, 0}>() "

# operator: opset, inputs, outputs, body. Everything free must obey the law, and something must be.
MODELS = {
    "DequantizeLinear": (13, "int8[6,3] x", "float[6,3] y", SIGNED + "y = DequantizeLinear(x, ws, xz)"),
    "DequantizeLinear axis": (13, "int8[2,4,3] x", "float[2,4,3] y",
        ROWS + "y = DequantizeLinear<axis=1>(x, ws, wz)"),
    "DequantizeLinear blocks": (21, "int8[8,3] x, float[4,3] s", "float[8,3] y",
        "y = DequantizeLinear<axis=0, block_size=2>(x, s)"),
    "QuantizeLinear": (13, "float[6,3] x", "uint8[6,3] y", UNSIGNED + "y = QuantizeLinear(x, ws, xz)"),
    "QuantizeLinear axis": (13, "float[4,3] x", "int8[4,3] y",
        ROWS + "y = QuantizeLinear<axis=0>(x, ws, wz)"),
    "DynamicQuantizeLinear": (13, "float[3,6] x", "uint8[3,6] y, float s, uint8 z",
        "y, s, z = DynamicQuantizeLinear(x)"),
    "QDQ Conv": (13, "uint8[1,6,5,5] x, uint8[4,6,3,3] w, float[4] b", "uint8[1,4,3,3] y",
        UNSIGNED + "d = DequantizeLinear(x, xs, xz) v = DequantizeLinear(w, ws, wz) "
        "c = Conv(d, v, b) y = QuantizeLinear(c, ys, yz)"),
    "QDQ MatMul": (13, "int8[5,6] x, int8[6,4] w", "float[5,4] y",
        SIGNED + "d = DequantizeLinear(x, xs, xz) v = DequantizeLinear(w, ws, wz) y = MatMul(d, v)"),
    "QDQ blocked MatMul": (21, "float[5,8] x, int8[8,4] w, float[2,4] s, int8[2,4] z", "float[5,4] y",
        "v = DequantizeLinear<axis=0, block_size=4>(w, s, z) y = MatMul(x, v)"),
    "Cast and Mul": (13, "float[5,6] x, int8[6,4] w, float[4] s", "float[5,4] y",
        "c = Cast<to=1>(w) v = Mul(c, s) y = MatMul(x, v)"),
    "QLinearConv": (13, "uint8[1,6,5,5] x, uint8[4,6,3,3] w, int32[4] b", "uint8[1,4,3,3] y",
        UNSIGNED + "y = QLinearConv(x, xs, xz, w, ws, wz, ys, yz, b)"),
    "QLinearConv signed": (13, "int8[1,6,5,5] x, int8[4,6,3,3] w", "int8[1,4,5,5] y",
        SIGNED + "y = QLinearConv<pads=[1,1,1,1]>(x, xs, xz, w, ws, wz, ys, yz)"),
    "QLinearConv axis": (13, "uint8[1,6,5,5] x, int8[4,6,3,3] w, int32[4] b", "uint8[1,4,3,3] y",
        ROWS + "y = QLinearConv(x, xs, xz, w, ws, wz, ys, yz, b)"),
    "QLinearConv grouped": (13, "uint8[1,6,5,5] x, uint8[8,3,3,3] w", "uint8[1,8,5,5] y",
        UNSIGNED + "y = QLinearConv<group=2, pads=[1,1,1,1]>(x, xs, xz, w, ws, wz, ys, yz)"),
    "QLinearConv depthwise": (13, "uint8[1,4,5,5] x, int8[4,1,3,3] w, int32[4] b", "uint8[1,4,3,3] y",
        ROWS + "y = QLinearConv<group=4>(x, xs, xz, w, ws, wz, ys, yz, b)"),
    "ConvInteger": (13, "uint8[1,6,5,5] x, uint8[4,6,3,3] w", "int32[1,4,3,3] y",
        UNSIGNED + "y = ConvInteger(x, w, xz, wz)"),
    "ConvInteger symmetric": (13, "uint8[1,6,5,5] x, uint8[4,6,3,3] w", "int32[1,4,3,3] y",
        UNSIGNED + "y = ConvInteger(x, w, xz)"),
    "QLinearMatMul": (13, "uint8[3,6] a, uint8[6,5] b", "uint8[3,5] y",
        UNSIGNED + "y = QLinearMatMul(a, xs, xz, b, ws, wz, ys, yz)"),
    "QLinearMatMul signed": (13, "int8[2,3,6] a, int8[6,5] b", "int8[2,3,5] y",
        SIGNED + "y = QLinearMatMul(a, xs, xz, b, ws, wz, ys, yz)"),
    "QLinearMatMul axis": (13, "uint8[3,6] a, int8[6,4] b", "uint8[3,4] y",
        ROWS + "y = QLinearMatMul(a, xs, xz, b, ws, wz, ys, yz)"),
    "MatMulInteger": (13, "uint8[3,6] a, uint8[6,5] b", "int32[3,5] y",
        UNSIGNED + "y = MatMulInteger(a, b, xz, wz)"),
    "MatMulInteger axis": (13, "uint8[3,6] a, uint8[6,4] b, uint8[4] z", "int32[3,4] y",
        UNSIGNED + "y = MatMulInteger(a, b, xz, z)"),
    "MatMulIntegerToFloat": (13, "uint8[3,6] a, uint8[6,4] b, float[4] s, uint8[4] z, float[4] c",
        "float[3,4] y", UNSIGNED + "y = com.microsoft.MatMulIntegerToFloat(a, b, xs, s, xz, z, c)"),
    "DynamicQuantizeMatMul": (13, "float[3,6] a, uint8[6,4] b, float[4] s, uint8[4] z, float[4] c",
        "float[3,4] y", "y = com.microsoft.DynamicQuantizeMatMul(a, b, s, z, c)"),
    "QGemm": (13, "uint8[3,6] a, int8[4,6] b, int32[4] c", "uint8[3,4] y",
        ROWS + "y = com.microsoft.QGemm<transB=1>(a, xs, xz, b, ws, wz, c, ys, yz)"),
    "QGemm float": (13, "uint8[3,6] a, uint8[6,5] b", "float[3,5] y",
        UNSIGNED + "y = com.microsoft.QGemm(a, xs, xz, b, ws, wz)"),
    "QLinearAdd": (13, "uint8[2,6,3] a, uint8[6,1] b", "uint8[2,6,3] y",
        UNSIGNED + "y = com.microsoft.QLinearAdd(a, xs, xz, b, ws, wz, ys, yz)"),
    "QLinearMul": (13, "int8[2,6,3] a, int8[6,3] b", "int8[2,6,3] y",
        SIGNED + "y = com.microsoft.QLinearMul(a, xs, xz, b, ws, wz, ys, yz)"),
    "QLinearWhere": (13, "bool[2,6] c, uint8[2,6] a, uint8[2,6] b", "uint8[2,6] y",
        UNSIGNED + "y = com.microsoft.QLinearWhere(c, a, xs, xz, b, ws, wz, ys, yz)"),
    "QLinearSigmoid": (13, "uint8[2,6] a", "uint8[2,6] y",
        UNSIGNED + "y = com.microsoft.QLinearSigmoid(a, xs, xz, ys, yz)"),
    "QLinearLeakyRelu": (13, "int8[2,6] a", "int8[2,6] y",
        SIGNED + "y = com.microsoft.QLinearLeakyRelu<alpha=0.1>(a, xs, xz, ys, yz)"),
    "QLinearSoftmax": (13, "uint8[2,3,6] a", "uint8[2,3,6] y",
        UNSIGNED + "y = com.microsoft.QLinearSoftmax<axis=-1, opset=13>(a, xs, xz, ys, yz)"),
    "QLinearAveragePool": (13, "uint8[1,6,4,4] a", "uint8[1,6,3,3] y",
        UNSIGNED + "y = com.microsoft.QLinearAveragePool<kernel_shape=[2,2]>(a, xs, xz, ys, yz)"),
    "QLinearGlobalAveragePool": (13, "uint8[1,6,4,4] a", "uint8[1,6,1,1] y",
        UNSIGNED + "y = com.microsoft.QLinearGlobalAveragePool(a, xs, xz, ys, yz)"),
    "QLinearConcat": (13, "uint8[2,3] a, uint8[2,4] b", "uint8[2,7] y",
        UNSIGNED + "y = com.microsoft.QLinearConcat<axis=1>(ys, yz, a, xs, xz, b, ws, wz)"),
    "Q and DQ of com.microsoft": (13, "float[5,6] x, int8[6,4] w", "float[5,4] y",
        ROWS + "q = com.microsoft.QuantizeLinear(x, xs, xz) d = com.microsoft.DequantizeLinear(q, xs, xz) "
        "v = com.microsoft.DequantizeLinear<axis=1>(w, ws, wz) y = MatMul(d, v)"),
    "float16": (17, "float16[1,6,5,5] x, float16[4,6,3,3] w, float16[4] b", "float16[1,4,3,3] y",
        "y = Conv(x, w, b)"),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_law_holds(name: str) -> None:
    opset, inputs, outputs, body = MODELS[name]
    head = HEAD.format(opsets=OPSETS.format(opset), inputs=inputs, outputs=outputs)
    assert check_rule(head + " {" + body + "}").passed


PINNED = {
    "blocks that do not divide": (21, "float[5,7] x, int8[7,4] w, float[2,4] s", "float[5,4] y",
        "v = DequantizeLinear<axis=0, block_size=4>(w, s) y = MatMul(x, v)", "no multiple of blocks"),
    "a scale of the output per row": (13, "uint8[3,6] a, uint8[6,5] b, float[3] s, uint8[3] z",
        "uint8[3,5] y", UNSIGNED + "y = QLinearMatMul(a, xs, xz, b, ws, wz, s, z)", "is a vector"),
}  # fmt: skip


@pytest.mark.parametrize("name", PINNED)
def test_pinned_with_a_reason(name: str) -> None:
    opset, inputs, outputs, body, reason = PINNED[name]
    head = HEAD.format(opsets=OPSETS.format(opset), inputs=inputs, outputs=outputs)
    model = load(parser.parse_model(head + " {" + body + "}"))
    pins = relate(model, infer(model), pin_interface=False).pins
    assert any(reason in pin.reason for pin in pins)


# --- whole networks, as ONNX Runtime's quantiser makes them ---


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("network", NETWORKS)
def test_networks_lose_half(network: str, way: str, tmp_path: Path) -> None:
    """Half the work leaves, the proof holds with rounding or without it, and bytes follow."""
    model = quantised(network, way, tmp_path)
    result = by_weights(model)
    assert result.verdict.passed
    assert result.after.macs <= 0.5 * result.before.macs
    assert result.after.params < 0.75 * result.before.params
    kinds = {t.name: t.data_type for t in model.graph.initializer}
    assert all(
        kinds.get(t.name, t.data_type) == t.data_type for t in result.model.graph.initializer
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("network", NETWORKS)
def test_proof_without_rounding(network: str, way: str, tmp_path: Path) -> None:
    """It holds for the right cut, and sees two neighbours of one weight change places."""
    prepared = prepare(quantised(network, way, tmp_path))
    analysis = prepared.analysis
    options = Options(flops=0.5, criterion="l1", repair="none", cache=False)
    alive = analysis.coupling.alive(removed_units(plan(prepared, options)[0], analysis))
    whole = analysis.model, analysis.shapes, analysis.coupling, alive
    smaller, _ = cut(*whole)
    feeds = random_inputs(analysis.model, analysis.shapes)

    def error(result: Model) -> float:
        model, shapes, coupling, kept = whole
        return law_error(
            model, result, shapes, coupling, kept, feeds, lambda m: opened(unrounded(m))
        )

    assert rounds(analysis.model)
    assert error(smaller) < 1e-4
    name = next(
        n for n, t in smaller.initializers.items() if t.data_type in (2, 3) and len(t.dims) > 1
    )
    value = smaller.array(name)
    swapped = value[[1, 0, *range(2, len(value))]]
    weights = {**smaller.initializers, name: set_initializer(name, swapped)}
    assert error(replace(smaller, initializers=weights)) > 1e-4


def test_noise_that_rounding_makes_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the comparison with rounding fails, the one without decides, and the verdict says so."""
    true = validate.law_errors

    def noisy(*models: Any, must_be_finite: bool = False) -> list[float]:
        rounded = models[-1] is validate.opened
        return [0.03] if rounded else true(*models, must_be_finite=must_be_finite)

    monkeypatch.setattr(validate, "law_errors", noisy)
    result = by_weights(quantised("convolutional", "QDQ", tmp_path))
    assert result.verdict.rounding == 0.03
    assert "without rounding" in str(result.verdict)
    with pytest.raises(VerificationError):
        by_weights(convolutional())


def test_default_options(tmp_path: Path) -> None:
    """Integers are repaired on their grid, whatever operator reads them."""
    for way in ("QDQ per channel", "dynamic"):
        model = quantised("convolutional", way, tmp_path)
        result = prune(model, flops=0.5, samples=16, measure=False, cache=False)
        assert result.verdict.passed
        assert not any("not repaired" in note for note in result.notes)
        assert result.repairs


def test_real_numbers_decide_and_count() -> None:
    """A unit of large integers and a small scale is small; integers of 8 bits are parameters."""
    head = HEAD.format(
        opsets=OPSETS.format(13),
        inputs="float[1,3] x",
        outputs="float[1,2] y",
    )
    body = "{ v = DequantizeLinear<axis=1>(w, s, z) h = MatMul(x, v) r = Relu(h) y = MatMul(r, u) }"
    proto = parser.parse_model(head + body)
    arrays = {
        "w": np.array([[100, 5], [100, -5], [100, 5]], np.int8),
        "s": np.array([0.001, 1.0], np.float32),
        "z": np.zeros(2, np.int8),
        "u": np.ones((2, 2), np.float32),
    }
    proto.graph.initializer.extend(set_initializer(name, a) for name, a in arrays.items())
    result = by_weights(proto, min_channels=1, round_to=1)
    assert result.before.params == 6 + 2 + 2 + 4
    kept = {t.name: numpy_helper.to_array(t) for t in result.model.graph.initializer}
    assert kept["w"].tolist() == [[5], [-5], [5]]
    assert kept["s"].tolist() == [1.0]


def test_integers_read_as_numbers() -> None:
    """Per tensor, per axis, per block; without a scale, as shares of the largest magnitude."""
    w = np.array([[10, 20], [30, 40]], np.uint8)
    model = load(parser.parse_model(HEAD.format(
        opsets=OPSETS.format(13), inputs="uint8[2,2] x", outputs="uint8[2,2] y"
    ) + "{ y = Identity(x) }"))  # fmt: skip
    arrays = {
        "w": w,
        "z": np.array([10, 20], np.uint8),
        "s": np.array([1, 2], np.float32),
        "b": np.array([[1.0, 3.0]], np.float32),
    }
    tensors = {name: set_initializer(name, array) for name, array in arrays.items()}
    model = replace(model, initializers=tensors)
    assert real(model, "w", Quantised(0, "s", "z")).tolist() == [[0, 10], [20, 40]]
    assert real(model, "w", Quantised(1, "s")).tolist() == [[10, 40], [30, 80]]
    assert real(model, "w", Quantised(0, "b", None, 2)).tolist() == [[10, 60], [30, 120]]
    assert real(model, "w", Quantised(0, None, None)).max() == 1.0


def test_quantised_weights_are_read_as_floats(tmp_path: Path) -> None:
    """Calibration reads the weights of QDQ operators; written, they are the same integers."""
    model = prepare(quantised("convolutional", "QDQ per channel", tmp_path)).analysis.model
    assert not linears(model)
    found = repairable(model)
    assert [linear.kind for linear in found] == ["Conv"] * 5 + ["Gemm"]
    outputs = [len(linear.matrix(model)[0]) for linear in found]
    changes = [
        (linear, linear.matrix(model), linear.offset(model, n))
        for linear, n in zip(found, outputs, strict=True)
    ]
    written = rewritten(model, changes).initializers
    assert {n: t.SerializeToString() for n, t in written.items()} == {
        n: t.SerializeToString() for n, t in model.initializers.items()
    }


def test_shared_scales_couple_nothing() -> None:
    """Exporters store equal scales and zero points once; each weight has its own for the cut."""
    b = Builder(3)
    scale, zero = b.constant(np.full(8, 0.1, np.float32)), b.constant(np.zeros(8, np.int8))
    x = "x"
    for _ in range(2):
        weight = b.constant(b.rng.integers(-128, 128, (8, 8)).astype(np.int8))
        x = b.add("MatMul", x, b.add("DequantizeLinear", weight, scale, zero, axis=1))
    result = by_weights(b.model({"x": [3, 8]}, {x: [3, 8]}))
    assert result.verdict.passed
    assert result.after.macs == 0.5 * result.before.macs


def test_repair_on_the_grid(tmp_path: Path) -> None:
    """An operator without a bias gains one of integers, in the scales of what it multiplies."""
    b = Builder(5)
    x = b.add("Relu", b.add("Conv", "x", b.weight(16, 3, 3, 3)))
    x = b.add("Relu", b.add("Conv", x, b.weight(8, 16, 3, 3)))
    x = b.add("Flatten", b.add("GlobalAveragePool", x))
    y = b.add("Gemm", x, b.weight(8, 8), transB=1)
    source, target = tmp_path / "float.onnx", tmp_path / "quantised.onnx"
    onnx.save(b.model({"x": [1, 3, 8, 8]}, {y: [1, 8]}), source)
    feeds = Random((1, 3, 8, 8))
    quantization.quantize_static(source, target, feeds, **WAYS["QDQ per channel"])
    result = prune(target, flops=0.5, samples=32, measure=False, cache=False)
    assert result.verdict.passed
    assert any(r.after is not None and r.after < r.before for r in result.repairs)
    kinds = {t.name: t.data_type for t in result.model.graph.initializer}
    biases = [kinds[n.input[0]] for n in result.model.graph.node if "graphprune_bias" in n.name]
    assert biases == [TensorProto.INT32] * 2
