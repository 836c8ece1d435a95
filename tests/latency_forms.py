"""Stand-ins for devices, and models that are timed."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from graphs import Builder

from graphprune import api
from graphprune.analysis import Analysis
from graphprune.latency.micro import Micro


def analysed(model: onnx.ModelProto) -> Analysis:
    return api.prepare(model).analysis


def weights_in(model: onnx.ModelProto) -> float:
    sizes = [np.prod(t.dims) for t in model.graph.initializer if "near" not in t.name]
    return float(sum(sizes))


class ByWeights:
    """A device on which a piece takes a microsecond for every number it holds."""

    key = "by weights"

    def __init__(self) -> None:
        self.asked = 0

    def piece(self, micro: Micro) -> float:
        self.asked += 1
        return weights_in(micro.model)

    def pair(self, first: Any, second: Any, feeds: Any) -> tuple[float, float]:
        before, after = (weights_in(m.assemble()) for m in (first, second))
        return before / 1e3, after / before


def repeated() -> onnx.ModelProto:
    """Three equal residual blocks of 16 channels."""
    b = Builder(1)
    x = b.add("Relu", b.conv("x", 3, 16))
    for _ in range(3):
        y = b.conv(b.add("Relu", b.conv(x, 16, 16)), 16, 16)
        x = b.add("Relu", b.add("Add", y, x))
    y = b.add("MatMul", b.add("Flatten", b.add("GlobalAveragePool", x)), b.weight(16, 5))
    return b.model({"x": [1, 3, 8, 8]}, {y: [1, 5]})


BOARD = """
import json, os, sys
asked = json.load(sys.stdin)
times = [os.path.getsize(model["path"]) / 1e3 for model in asked["models"]]
print(json.dumps({"milliseconds": times}))
"""


def wide() -> onnx.ModelProto:
    b = Builder(3)
    x = b.add("Relu", b.add("MatMul", "x", b.weight(64, 64)))
    y = b.add("MatMul", x, b.weight(64, 64))
    return b.model({"x": [1, 64]}, {y: [1, 64]})
