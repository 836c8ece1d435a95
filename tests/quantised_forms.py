"""Networks as ONNX Runtime's quantiser makes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from graphs import Builder
from onnxruntime import quantization

from graphprune.api import prune
from graphprune.result import Result


def convolutional(channels: int = 16) -> onnx.ModelProto:
    """A residual network with a concatenation and a pool."""
    b = Builder(5)
    x = b.add("Relu", b.conv("x", 3, channels))
    y = b.add("Relu", b.conv(x, channels, channels))
    x = b.add("Relu", b.add("Add", x, b.conv(y, channels, channels)))
    x = b.add("Concat", x, b.add("Sigmoid", b.conv(x, channels, channels, 1)), axis=1)
    x = b.add("AveragePool", x, kernel_shape=[2, 2], strides=[2, 2])
    x = b.add("Flatten", b.add("GlobalAveragePool", b.conv(x, 2 * channels, channels)))
    y = b.add("Gemm", x, b.weight(5, channels), b.weight(5), transB=1)
    return b.model({"x": [1, 3, 8, 8]}, {y: [1, 5]})


def feed_forward(width: int = 12, inner: int = 32) -> onnx.ModelProto:
    """Two residual blocks of a Transformer without its attention."""
    b = Builder(7)
    x = "x"
    for _ in range(2):
        scale, bias = b.weight(width), b.weight(width)
        h = b.add("LayerNormalization", x, scale, bias)
        h = b.add("Add", b.add("MatMul", h, b.weight(width, inner)), b.weight(inner))
        h = b.add("Mul", h, b.add("Sigmoid", h))
        h = b.add("Add", b.add("MatMul", h, b.weight(inner, width)), b.weight(width))
        x = b.add("Add", x, h)
    return b.model({"x": [1, 6, width]}, {x: [1, 6, width]})


class Random(quantization.CalibrationDataReader):  # type: ignore[misc]
    """Two random inputs."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        rng = np.random.default_rng(0)
        self.left = [{"x": rng.standard_normal(shape).astype(np.float32)} for _ in range(2)]

    def get_next(self) -> dict[str, np.ndarray] | None:
        return self.left.pop() if self.left else None


NETWORKS = {
    "convolutional": (convolutional, (1, 3, 8, 8)),
    "feed forward": (feed_forward, (1, 6, 12)),
}
S8, U8 = quantization.QuantType.QInt8, quantization.QuantType.QUInt8
WAYS = {
    "QDQ": {"quant_format": quantization.QuantFormat.QDQ, "weight_type": S8},
    "QDQ per channel": {
        "quant_format": quantization.QuantFormat.QDQ, "weight_type": S8, "per_channel": True,
    },
    "QOperator per channel": {
        "quant_format": quantization.QuantFormat.QOperator, "weight_type": S8, "per_channel": True,
    },
    "QOperator asymmetric": {
        "quant_format": quantization.QuantFormat.QOperator, "weight_type": U8,
        "activation_type": U8, "extra_options": {"WeightSymmetric": False},
    },
    "dynamic": {"weight_type": S8},
    "dynamic asymmetric per channel": {
        "weight_type": U8, "per_channel": True, "extra_options": {"WeightSymmetric": False},
    },
}  # fmt: skip


def quantised(network: str, way: str, folder: Path) -> onnx.ModelProto:
    make, shape = NETWORKS[network]
    source, target = folder / "float.onnx", folder / "quantised.onnx"
    onnx.save(make(), source)
    if way.startswith("dynamic"):
        quantization.quantize_dynamic(source, target, **WAYS[way])
    else:
        quantization.quantize_static(source, target, Random(shape), **WAYS[way])
    return onnx.load(target)


def by_weights(model: onnx.ModelProto, **options: Any) -> Result:
    given = {"criterion": "l1", "repair": "none", "measure": False, "cache": False}
    return prune(model, flops=0.5, **(given | options))
