"""Seconds of analysis, planning and cutting against depth and width, and the slot merge alone.

    python tools/benchmark_scaling.py

Chains of residual convolution blocks, 10 to 10,000 nodes deep, then a fixed depth with growing
weights. The slope on log axes is the exponent of growth: 1 is linear.
"""

from __future__ import annotations

import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table

from graphprune import api
from graphprune.coupling import couple
from graphprune.rules import relate
from graphprune.shapes import infer
from graphprune.storage import load

DEPTHS = (10, 30, 100, 300, 1000, 3000, 10000)
WIDTHS = (64, 128, 256, 512, 1024)


def chain(depth: int, width: int) -> onnx.ModelProto:
    """``depth`` nodes: Conv, Relu, Conv, Add blocks of ``width`` channels on 8 x 8 pixels."""
    rng = np.random.default_rng(0)
    nodes, weights = [], []

    def conv(x: str, c_in: int, name: str) -> str:
        w = rng.standard_normal((width, c_in, 1, 1), dtype=np.float32) / np.float32(c_in**0.5)
        weights.append(numpy_helper.from_array(w, f"{name}.w"))
        nodes.append(helper.make_node("Conv", [x, f"{name}.w"], [name], name=name))
        return name

    x = conv("x", 3, "stem")
    for i in range(max(1, depth // 4)):
        h = conv(x, width, f"b{i}.a")
        nodes.append(helper.make_node("Relu", [h], [f"{h}.r"], name=f"{h}.r"))
        y = conv(f"{h}.r", width, f"b{i}.b")
        x = f"b{i}.out"
        nodes.append(helper.make_node("Add", [y, f"b{i - 1}.out" if i else "stem"], [x], name=x))
    last = rng.standard_normal((10, width, 1, 1), dtype=np.float32)
    weights.append(numpy_helper.from_array(last, "head.w"))
    nodes.append(helper.make_node("Conv", [x, "head.w"], ["y"], name="head"))
    ends = (
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 10, 8, 8])],
    )
    graph = helper.make_graph(nodes, "chain", *ends, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def measure(model: onnx.ModelProto) -> tuple[float, dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.onnx"
        result = api.prune(model, flops=0.5, verify=False, measure=False, output=out)
    return sum(result.seconds.values()), dict(result.seconds)


def merge_seconds(model: onnx.ModelProto) -> tuple[int, float]:
    loaded = load(model)
    shapes = infer(loaded)
    relations = relate(loaded, shapes)
    start = time.perf_counter()
    couple(loaded, shapes, relations)
    return relations.total, time.perf_counter() - start


def table(title: str, sizes: tuple[int, ...], models: list[onnx.ModelProto]) -> Table:
    rows = Table("size", "nodes", "parameters", "seconds", "stages", title=title)
    totals, measures = [], []
    for size, model in zip(sizes, models, strict=True):
        seconds, stages = measure(model)
        parameters = sum(int(np.prod(t.dims)) for t in model.graph.initializer)
        totals.append(seconds)
        measures.append(parameters)
        text = ", ".join(f"{k} {v:.2f}" for k, v in stages.items())
        rows.add_row(
            str(size), str(len(model.graph.node)), f"{parameters:,}", f"{seconds:.2f}", text
        )
    half = len(sizes) // 2
    slope = np.polyfit(np.log(measures[half:]), np.log(totals[half:]), 1)[0]
    rows.caption = f"slope of seconds against parameters, upper half: {slope:.2f}"
    return rows


def main() -> None:
    console = Console(width=120)
    console.print(table("depth, 32 channels", DEPTHS, [chain(d, 32) for d in DEPTHS]))
    console.print(table("width, 100 nodes", WIDTHS, [chain(100, w) for w in WIDTHS]))
    slots, seconds = merge_seconds(chain(8000, 32))
    console.print(f"coupling of {slots:,} slots: {seconds:.2f} s")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    console.print(f"peak memory of this process: {peak:,.0f} MiB")


if __name__ == "__main__":
    main()
