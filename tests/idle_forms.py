"""Networks with channels that do nothing, and the proof that they may leave."""

from __future__ import annotations

from typing import Any

import onnx
from graphs import Builder
from onnx import numpy_helper

from graphprune import api
from graphprune.analysis import Scope
from graphprune.oracle import relative_error
from graphprune.prepared import Prepared
from graphprune.runtime import opened, random_inputs

NOISE = 1e-5


def cleaned(model: onnx.ModelProto, **scope: Any) -> Prepared:
    """Prepared with the clean-up, and proved: on random inputs of several seeds."""
    prepared = api.prepare(model, Scope(**scope))
    runs = opened(prepared.original), opened(prepared.analysis.model.closed)
    for seed in range(3):
        feeds = random_inputs(prepared.original, prepared.analysis.shapes, seed)
        assert relative_error(runs[0](feeds), runs[1](feeds)) < NOISE
    return prepared


def counts(prepared: Prepared) -> tuple[int, int, int]:
    """Units that left: dead, constant, duplicate."""
    found = list(prepared.cleaned.counts.values())
    return found[0], found[1], found[2]


def widths(prepared: Prepared, *names: str) -> list[tuple[int, ...]]:
    return [tuple(prepared.analysis.model.initializers[name].dims) for name in names]


def edit(b: Builder, name: str, change: Any) -> None:
    """Rewrite an initialiser of a builder in place."""
    for i, tensor in enumerate(b.initializers):
        if tensor.name == name:
            value = numpy_helper.to_array(tensor).copy()
            change(value)
            b.initializers[i] = numpy_helper.from_array(value, name)


def mlp(*changes: tuple[int, Any], act: str = "Relu") -> onnx.ModelProto:
    """[2, 6] → 12 → 8 → 5: weights c0, c2, c4 with biases c1, c3, c5."""
    b = Builder(4)
    x = "x"
    for inner, outer in ((6, 12), (12, 8), (8, 5)):
        x = b.add("Gemm", x, b.weight(outer, inner), b.weight(outer), transB=1)
        x = b.add(act, x) if outer != 5 else x
    for number, change in changes:
        edit(b, f"c{number}", change)
    return b.model({"x": [2, 6]}, {x: [2, 5]})


def put(where: Any, what: Any) -> Any:
    def change(value: Any) -> None:
        value[where] = what

    return change


def same(to: Any, source: Any) -> Any:
    def change(value: Any) -> None:
        value[to] = value[source]

    return change


def conv_chain(norm: bool, kernel: int = 3, pad: int = 1) -> Builder:
    """Conv (32) → [BatchNormalization] → Relu → Conv (32) → pool → MatMul; its weights are c0 with
    bias c1, then (c2 mean, c3 bias, c4 scale, c5 variance)."""
    b = Builder(6)
    x = b.add("Conv", "x", b.weight(32, 3, 3, 3), b.weight(32), pads=[1] * 4)
    x = b.add("Relu", b.norm(x, 32) if norm else x)
    x = b.add("Conv", x, b.weight(32, 32, kernel, kernel), b.weight(32), pads=[pad] * 4)
    b.add("MatMul", b.add("Flatten", b.add("GlobalAveragePool", x)), b.weight(32, 5))
    b.nodes[-1].output[0] = "y"
    return b


def finished(b: Builder) -> onnx.ModelProto:
    return b.model({"x": ["n", 3, 8, 8]}, {"y": ["n", 5]})


HALF = list(range(16))
