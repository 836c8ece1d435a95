"""Seconds per stage and peak memory of the default pruning, and its growth with the depth.

    python tools/benchmark_stages.py MODELS [--samples 128]

MODELS is a folder of materialised architectures: resnet18.onnx, resnet50.onnx, vit_b16.onnx. Two
residual networks of 9 and 18 blocks per stage (the shapes of ResNet-56 and ResNet-110, random
weights) show the cost ratio of twice the depth. Each model runs in a process of its own, on made-up
inputs from a file, so that matching them to a model is not part of it; nothing is cached.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table

ARCHITECTURES = ("resnet18", "resnet50", "vit_b16")
BLOCKS = (9, 18)
STAGES = ("analyse", "calibrate", "score", "plan", "cut", "verify", "repair", "refine")
GROWING = ("calibrate", "score", "repair", "refine")


def residual(blocks: int) -> onnx.ModelProto:
    """Three stages of ``blocks`` basic blocks, 16, 32 and 64 channels, on 32 x 32 pixels."""
    rng = np.random.default_rng(0)
    nodes, weights = [], []

    def conv(x: str, inputs: int, outputs: int, size: int, stride: int, gain: float) -> str:
        name = f"conv{len(weights)}"
        scale = gain * np.sqrt(2 / (inputs * size * size))
        values = rng.standard_normal((outputs, inputs, size, size)) * scale
        weights.append(numpy_helper.from_array(values.astype(np.float32), f"{name}.w"))
        pads = [size // 2] * 4
        nodes.append(
            helper.make_node(
                "Conv", [x, f"{name}.w"], [name], name=name, pads=pads, strides=[stride, stride]
            )
        )
        return name

    def write(kind: str, *inputs: str) -> str:
        name = f"{kind.lower()}{len(nodes)}"
        nodes.append(helper.make_node(kind, list(inputs), [name], name=name))
        return name

    x, width = write("Relu", conv("x", 3, 16, 3, 1, 1.0)), 16
    for stage, outputs in enumerate((16, 32, 64)):
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            inner = write("Relu", conv(x, width, outputs, 3, stride, 1.0))
            y = conv(inner, outputs, outputs, 3, 1, 0.3)
            shortcut = x if width == outputs else conv(x, width, outputs, 1, stride, 1.0)
            x, width = write("Relu", write("Add", y, shortcut)), outputs
    pooled = write("Flatten", write("GlobalAveragePool", x))
    head = rng.standard_normal((10, 64)).astype(np.float32)
    weights.append(numpy_helper.from_array(head, "head.w"))
    nodes.append(helper.make_node("Gemm", [pooled, "head.w"], ["y"], name="head", transB=1))
    ends = (
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 32, 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 10])],
    )
    graph = helper.make_graph(nodes, "residual", *ends, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def one(path: Path, samples: int) -> None:
    """Prune in this process; print seconds by stage and peak memory as JSON."""
    from graphprune import api
    from graphprune.calibrate import synthesise

    analysis = api.prepare(path).analysis
    made = synthesise(analysis.model, analysis.shapes, samples, 0)
    with tempfile.TemporaryDirectory() as folder:
        calib = Path(folder) / "inputs.npz"
        np.savez(calib, **made.read(0, samples))
        result = api.prune(
            path, flops=0.5, calib=calib, samples=samples, measure=False, cache=False
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(json.dumps({"seconds": dict(result.seconds), "gigabytes": peak}))


def measured(path: Path, samples: int) -> dict[str, object]:
    command = [sys.executable, __file__, "--one", str(path), "--samples", str(samples)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path, nargs="?")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one is not None:
        one(given.one, given.samples)
        return
    table = Table(title=f"seconds per stage, {given.samples} samples, half of the MACs")
    for name in ("model", *STAGES, "sum", "peak GB"):
        table.add_column(name, justify="left" if name == "model" else "right")
    growing = []
    console = Console(width=120)
    with tempfile.TemporaryDirectory() as folder:
        paths = [given.models / f"{name}.onnx" for name in ARCHITECTURES] if given.models else []
        for blocks in BLOCKS:
            paths.append(Path(folder) / f"residual_{blocks}.onnx")
            onnx.save(residual(blocks), paths[-1])
        for path in paths:
            found = measured(path, given.samples)
            seconds = found["seconds"]
            assert isinstance(seconds, dict)
            row = [f"{seconds.get(stage, 0.0):.1f}" for stage in STAGES]
            table.add_row(
                path.stem, *row, f"{sum(seconds.values()):.1f}", f"{found['gigabytes']:.1f}"
            )
            console.print(f"{path.stem}: {row}, {found['gigabytes']:.1f} GB")
            growing.append(sum(seconds.get(stage, 0.0) for stage in GROWING))
    console.print(table)
    ratio = growing[-1] / growing[-2]
    console.print(f"twice the depth costs {ratio:.2f} times as much ({', '.join(GROWING)})")


if __name__ == "__main__":
    main()
