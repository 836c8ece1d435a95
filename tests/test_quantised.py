"""Quantised and mixed precision models: every operator, and whole networks as ORT quantises them."""

from __future__ import annotations

import pytest

from graphprune.check import check_rule

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
    "bfloat16 weights": (17, "float[3,6] x, bfloat16[6,4] w", "float[3,4] y",
        "v = Cast<to=1>(w) y = MatMul(x, v)"),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_law_holds(name: str) -> None:
    opset, inputs, outputs, body = MODELS[name]
    head = HEAD.format(opsets=OPSETS.format(opset), inputs=inputs, outputs=outputs)
    assert check_rule(head + " {" + body + "}").passed
