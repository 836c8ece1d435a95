"""Small networks of quantised operators, as other tools write them."""

from __future__ import annotations

import numpy as np
import onnx
from graphs import Builder

MICROSOFT = "com.microsoft"


class Quantising(Builder):
    """Appends quantised weights, drawn as numbers, and products of them."""

    def quantised(self, *shape: int, axis: int | None = None, signed: bool = True) -> list[str]:
        """Integers, scale and zero point of a weight that keeps variances."""
        fan = np.prod(shape) / shape[0 if len(shape) > 2 else -1]
        real = self.rng.standard_normal(shape) / np.sqrt(fan)
        over = None if axis is None else tuple(i for i in range(len(shape)) if i != axis)
        scale = np.asarray(np.abs(real).max(axis=over) / 127, np.float32)
        spread = scale if axis is None else np.expand_dims(scale, over)
        zero = 0 if signed else 128
        kind = np.int8 if signed else np.uint8
        integers = (np.rint(real / spread) + zero).astype(kind)
        names = self.constant(integers), self.constant(scale)
        return [*names, self.constant(np.full(scale.shape, zero, kind))]

    def scaled(self, scale: float, zero: int) -> list[str]:
        """Scale and zero point of an activation."""
        return [self.constant(np.float32(scale)), self.constant(np.uint8(zero))]

    def rounded(self, x: str) -> list[str]:
        return [*self.add("DynamicQuantizeLinear", x, outputs=3)]


def to_float() -> onnx.ModelProto:
    """MatMulIntegerToFloat, with a bias and without."""
    b = Quantising(3)
    x, inner, outer = "x", b.weight(24), None
    for width, bias in ((24, inner), (6, outer)):
        q, scale, zero = b.rounded(x)
        w, ws, wz = b.quantised(6 if width == 24 else 24, width, axis=1)
        names = [q, w, scale, ws, zero, wz, *([bias] if bias else [])]
        x = b.add("MatMulIntegerToFloat", *names, domain=MICROSOFT)
        x = b.add("Relu", x) if width == 24 else x
    return b.model({"x": [4, 6]}, {x: [4, 6]})


def dynamic_product() -> onnx.ModelProto:
    """DynamicQuantizeMatMul, which rounds its input itself; the second has no bias."""
    b = Quantising(4)
    w, v = b.quantised(6, 24, axis=1, signed=False), b.quantised(24, 6, signed=False)
    x = b.add("Relu", b.add("DynamicQuantizeMatMul", "x", *w, b.weight(24), domain=MICROSOFT))
    y = b.add("DynamicQuantizeMatMul", x, *v, domain=MICROSOFT)
    return b.model({"x": [4, 6]}, {y: [4, 6]})


def no_bias() -> onnx.ModelProto:
    """MatMulInteger, scaled in two steps, with nothing added."""
    b = Quantising(5)
    x = "x"
    for rows, columns in ((6, 24), (24, 6)):
        w, ws, wz = b.quantised(rows, columns)
        q, scale, zero = b.rounded(x)
        z = b.add("Cast", b.add("MatMulInteger", q, w, zero, wz), to=1)
        x = b.add("Mul", b.add("Mul", z, scale), ws)
        x = b.add("Relu", x) if columns == 24 else x
    return b.model({"x": [4, 6]}, {x: [4, 6]})


def whole_bias() -> onnx.ModelProto:
    """ConvInteger and a bias that is divided by the scales and rounded at run time."""
    b = Quantising(6)
    x = "x"
    for inside, outside in ((3, 16), (16, 16), (16, 4)):
        w, ws, wz = b.quantised(outside, inside, 3, 3)
        q, scale, zero = b.rounded(x)
        whole = b.add("Div", b.weight(outside), b.add("Mul", scale, ws))
        whole = b.add("Cast", b.add("Floor", whole), to=6)
        whole = b.add("Reshape", whole, b.ints(1, -1, 1, 1))
        z = b.add("Add", b.add("ConvInteger", q, w, zero, wz, pads=[1, 1, 1, 1]), whole)
        x = b.add("Mul", b.add("Cast", z, to=1), b.add("Mul", scale, ws))
        x = b.add("Relu", x) if outside == 16 else x
    return b.model({"x": [1, 3, 8, 8]}, {x: [1, 4, 8, 8]})


def bare_convolutions() -> onnx.ModelProto:
    """ConvInteger with no bias at all."""
    b = Quantising(7)
    x = "x"
    for inside, outside in ((3, 16), (16, 4)):
        w, ws, wz = b.quantised(outside, inside, 3, 3, signed=False)
        q, scale, zero = b.rounded(x)
        z = b.add("Cast", b.add("ConvInteger", q, w, zero, wz, pads=[1, 1, 1, 1]), to=1)
        x = b.add("Mul", z, b.add("Mul", scale, ws))
        x = b.add("Relu", x) if outside == 16 else x
    return b.model({"x": [1, 3, 8, 8]}, {x: [1, 4, 8, 8]})


def static_convolutions(opset: int = 17) -> onnx.ModelProto:
    """QLinearConv with a scale for each channel and no bias; the second's is shared."""
    b = Quantising(8)
    ends = [b.scaled(0.03, 128), b.scaled(0.02, 0), b.scaled(0.02, 0), b.scaled(0.03, 120)]
    x = b.add("QuantizeLinear", "x", *ends[0])
    shared = b.constant(b.rng.integers(-2000, 2000, 16).astype(np.int32))
    for i, (inside, outside, bias) in enumerate(((3, 16, ""), (16, 16, shared), (16, 4, ""))):
        w = b.quantised(outside, inside, 3, 3, axis=0)
        names = [x, *ends[i], *w, *ends[i + 1], *([bias] if bias else [])]
        x = b.add("QLinearConv", *names, pads=[1, 1, 1, 1])
    y = b.add("DequantizeLinear", x, *ends[3])
    model = b.model({"x": [1, 3, 8, 8]}, {y: [1, 4, 8, 8]})
    for entry in model.opset_import:
        entry.version = entry.version if entry.domain else opset
    return model


def gemms() -> onnx.ModelProto:
    """QGemm with an alpha: in integers without a bias, then to floats."""
    b = Quantising(9)
    ends = [b.scaled(0.03, 128), b.scaled(0.02, 0)]
    x = b.add("QuantizeLinear", "x", *ends[0])
    w, v = b.quantised(24, 6, axis=0), b.quantised(24, 4)
    x = b.add("QGemm", x, *ends[0], *w, "", *ends[1], domain=MICROSOFT, transB=1, alpha=1.5)
    bias = b.constant(np.arange(4, dtype=np.int32) * 100)
    y = b.add("QGemm", x, *ends[1], *v, bias, domain=MICROSOFT, alpha=0.5)
    return b.model({"x": [4, 6]}, {y: [4, 4]})


def lstm(bias: bool = True) -> onnx.ModelProto:
    """Two layers, the first in both directions, weights by row or as a whole."""
    b = Quantising(10)
    x, width = "x", 5
    for directions, axis in ((2, 2), (1, None)):
        hidden = 12
        parts = []
        for rows in (width, hidden):
            real = b.rng.standard_normal((directions, rows, 4 * hidden)) / np.sqrt(rows)
            over = (1,) if axis else (1, 2)
            scale = (np.abs(real).max(axis=over) / 127).astype(np.float32)
            spread = scale[:, None] if axis else scale[:, None, None]
            integers = np.rint(real / spread).astype(np.int8)
            zeros = np.zeros(scale.shape, np.int8)
            parts.append([b.constant(a) for a in (integers, scale, zeros)])
        (w, ws, wz), (r, rs, rz) = parts
        added = b.weight(directions, 8 * hidden) if bias else ""
        names = [x, w, r, added, "", "", "", "", ws, wz, rs, rz]
        way = "bidirectional" if directions == 2 else "forward"
        x = b.add(
            "DynamicQuantizeLSTM", *names, domain=MICROSOFT, direction=way, hidden_size=hidden
        )
        x = b.add("Reshape", b.add("Transpose", x, perm=[0, 2, 1, 3]), b.ints(0, 0, -1))
        width = directions * hidden
    y = b.add("MatMul", x, b.weight(width, 3))
    return b.model({"x": [9, 1, 5]}, {y: [9, 1, 3]})


FORMS = {
    "MatMulIntegerToFloat": to_float,
    "DynamicQuantizeMatMul": dynamic_product,
    "MatMulInteger without a bias": no_bias,
    "ConvInteger and a rounded bias": whole_bias,
    "ConvInteger without a bias": bare_convolutions,
    "QLinearConv without a bias": static_convolutions,
    "QLinearConv of opset 10": lambda: static_convolutions(10),
    "QGemm": gemms,
    "DynamicQuantizeLSTM": lstm,
    "DynamicQuantizeLSTM without a bias": lambda: lstm(bias=False),
}


def read_twice() -> onnx.ModelProto:
    """MatMulInteger whose integers are read by two: no one scale says what they stand for."""
    b = Quantising(11)
    h = b.add("Relu", b.add("MatMul", "x", b.weight(6, 24)))
    w, ws, wz = b.quantised(24, 6)
    q, scale, zero = b.rounded(h)
    z = b.add("Cast", b.add("MatMulInteger", q, w, zero, wz), to=1)
    x = b.add("Mul", b.add("Mul", z, scale), ws)
    return b.model({"x": [4, 6]}, {x: [4, 6], b.add("Sign", z): [4, 6]})


def vector() -> onnx.ModelProto:
    """MatMulInteger with a vector, whose product has no axis of outputs."""
    b = Quantising(12)
    h = b.add("Relu", b.add("MatMul", "x", b.weight(6, 24)))
    q, scale, zero = b.rounded(h)
    w, ws = b.constant(np.arange(-12, 12, dtype=np.int8)), b.constant(np.float32(0.02))
    z = b.add("Cast", b.add("MatMulInteger", q, w, zero), to=1)
    y = b.add("Mul", z, b.add("Mul", scale, ws))
    return b.model({"x": [4, 6]}, {y: [4]})
