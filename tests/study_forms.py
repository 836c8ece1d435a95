"""A small network, its calibration inputs and the study of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from graphs import Builder

from graphprune import api
from graphprune.model import Array
from graphprune.options import Options
from graphprune.result import Result
from graphprune.study import Study, study

QUICK: dict[str, Any] = {"flops": 0.5, "samples": 16, "measure": False, "verify": False}
QUICK |= {"round_to": 1}


def draw(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape, dtype=np.float32)


def network(norm: bool = False, side: int = 6) -> onnx.ModelProto:
    """Two convolutions, a residual, a classifier; batch free."""
    b = Builder(3)
    bridge: Callable[[str, int], str] = b.norm if norm else lambda x, _: x
    x = b.add("Relu", bridge(b.conv("x", 3, 8), 8))
    hidden = b.add("Relu", bridge(b.conv(x, 8, 12), 12))
    x = b.add("Relu", b.add("Add", x, bridge(b.conv(hidden, 12, 8), 8)))
    y = b.add("MatMul", b.add("Flatten", b.add("GlobalAveragePool", x)), b.weight(8, 5))
    return b.model({"x": ["n", 3, side, side]}, {y: ["n", 5]})


def studied(model: Any, **options: Any) -> tuple[Study, Options]:
    given = {"flops": 0.5, "samples": 20, **options}
    chosen = Options.of(**given)
    chosen.check()
    return study(api.prepare(model), chosen), chosen


def content(result: Result) -> bytes:
    return result.model.SerializeToString(deterministic=True)
