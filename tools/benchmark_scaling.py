"""CPU seconds of analysis, planning and cutting against depth and size, on log axes.

    python tools/benchmark_scaling.py [--folder DIR] [--largest 1e9] [--out docs/scaling.md]

Chains of residual convolution blocks: 10 to 10,000 nodes deep at 32 channels, then 100 nodes deep
with 10^6 to 10^9 parameters (float16 beside the graph, written to the folder and deleted again).
Each model is pruned to half of its MACs by its weights alone, in a process of its own. The slope
on log axes, over the upper half of the sizes, is the exponent of growth: 1 is linear, and more
than 1.1 makes the exit code 1. With `--out` a Markdown table with a plot beside it.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from accuracy.plots import Series, log_chart
from onnx import TensorProto, helper
from rich.console import Console
from rich.table import Table

DEPTHS = (10, 30, 100, 300, 1000, 3000, 10000)
PARAMETERS = (1e6, 3e6, 1e7, 3e7, 1e8, 3e8, 1e9)
WIDTH, DEPTH = 32, 100  # of the models that grow in the other way
STAGES = ("analyse", "plan", "cut")
STEEPEST = 1.1


@dataclass(frozen=True)
class Run:
    """One model: its size, CPU seconds by stage, and the peak memory of the process."""

    nodes: int
    parameters: int
    seconds: dict[str, float]
    megabytes: float

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def chain(path: Path, depth: int, width: int) -> int:
    """About ``depth`` nodes: Conv, Relu, Conv, Add blocks of ``width`` channels on 8 x 8 pixels.

    Weights are float16, in a file beside the graph. Returns their number.
    """
    rng = np.random.default_rng(0)
    nodes, weights, offset = [], [], 0
    square = rng.standard_normal((width, width), dtype=np.float32) / np.float32(width**0.5)
    data = path.with_suffix(".data")
    with data.open("wb") as file:

        def conv(x: str, outputs: int, inputs: int, name: str) -> str:
            nonlocal offset
            part = np.resize(np.roll(square, len(weights)), (outputs, inputs)).astype(np.float16)
            file.write(part.data)
            shape = [outputs, inputs, 1, 1]
            tensor = TensorProto(name=f"{name}.w", data_type=TensorProto.FLOAT16, dims=shape)
            tensor.data_location = TensorProto.EXTERNAL
            place = {"location": data.name, "offset": offset, "length": part.nbytes}
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
            offset += part.nbytes
            weights.append(tensor)
            nodes.append(helper.make_node("Conv", [x, tensor.name], [name], name=name))
            return name

        x = conv("x", width, 3, "stem")
        for i in range(max(1, depth // 4)):
            h = conv(x, width, width, f"b{i}.a")
            nodes.append(helper.make_node("Relu", [h], [f"{h}.r"], name=f"{h}.r"))
            y = conv(f"{h}.r", width, width, f"b{i}.b")
            nodes.append(helper.make_node("Add", [y, x], [f"b{i}.out"], name=f"b{i}.out"))
            x = f"b{i}.out"
        conv(x, 10, width, "y")
    ends = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT16, [1, channels, 8, 8])]
        for name, channels in (("x", 3), ("y", 10))
    ]
    graph = helper.make_graph(nodes, "chain", *ends, weights)
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return offset // 2


def one(path: Path) -> dict[str, object]:
    """Analyse, plan and cut in this process: CPU seconds by stage, and the peak memory."""
    from graphprune import api
    from graphprune.options import Options

    seconds, start = {}, time.process_time()

    def lap(stage: str) -> None:
        nonlocal start
        now = time.process_time()
        seconds[stage], start = now - start, now

    prepared = api.prepare(path)
    lap("analyse")
    plan, _ = api.plan(prepared, Options.of(flops=0.5, criterion="l1", repair="none"))
    lap("plan")
    prepared.registry.passes["remove_channels"](plan).run(prepared.analysis.model, prepared.context)
    lap("cut")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": seconds, "megabytes": peak}


def measured(folder: Path, depth: int, width: int) -> Run:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "chain.onnx"
    parameters = chain(path, depth, width)
    command = [sys.executable, __file__, "--one", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    nodes = len(onnx.load(path, load_external_data=False).graph.node)
    shutil.rmtree(folder)
    return Run(nodes, parameters, found["seconds"], found["megabytes"])


def slope(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The exponent of growth over the upper half of the sizes."""
    half = len(sizes) // 2
    return float(np.polyfit(np.log(sizes[half:]), np.log(seconds[half:]), 1)[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="for the models; needs 2 bytes a parameter")
    parser.add_argument("--largest", type=float, default=PARAMETERS[-1], help="parameters at most")
    parser.add_argument("--out", type=Path, help="write the table here as Markdown, a plot beside")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one is not None:
        print(json.dumps(one(given.one)))
        return 0
    console = Console(width=120)
    if given.folder is not None:
        given.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.folder) as made:
        folder = Path(made) / "model"
        deep = [measured(folder, depth, WIDTH) for depth in DEPTHS]
        blocks = 2 * (DEPTH // 4)
        widths = [round((p / blocks) ** 0.5) for p in PARAMETERS if p <= given.largest]
        wide = [measured(folder, DEPTH, width) for width in widths]
    found = {
        f"depth, {WIDTH} channels": (deep, [float(run.nodes) for run in deep]),
        f"size, {DEPTH} nodes": (wide, [float(run.parameters) for run in wide]),
    }
    slopes = {}
    for title, (runs, sizes) in found.items():
        slopes[title] = slope(sizes, [run.total for run in runs])
        table = Table("nodes", "parameters", *STAGES, "CPU seconds", "peak MiB", title=title)
        for run in runs:
            table.add_row(*_cells(run))
        table.caption = f"slope over the upper half: {slopes[title]:.2f}"
        console.print(table)
    if given.out is not None:
        _write(given.out, found, slopes)
    return int(max(slopes.values()) > STEEPEST)


def _cells(run: Run) -> list[str]:
    stages = [f"{run.seconds[stage]:.2f}" for stage in STAGES]
    size = f"{run.parameters:,}"
    return [f"{run.nodes:,}", size, *stages, f"{run.total:.2f}", f"{run.megabytes:,.0f}"]


def _write(
    path: Path, found: dict[str, tuple[list[Run], list[float]]], slopes: dict[str, float]
) -> None:
    """The Markdown file, and one plot for each way to grow in `plots` beside it."""
    folder = path.parent / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    text = ["# Growth with depth and size", "", (__doc__ or "").split("\n\n")[2].strip(), ""]
    for title, (runs, sizes) in found.items():
        kind = title.split(",")[0]
        chart = folder / f"scaling_{kind}.svg"
        lines = [
            Series(stage, tuple(zip(sizes, [r.seconds[stage] for r in runs], strict=True)))
            for stage in STAGES
        ]
        lines.insert(0, Series("all", tuple(zip(sizes, [r.total for r in runs], strict=True))))
        x = "nodes" if kind == "depth" else "parameters"
        chart.write_text(log_chart(f"{title}: slope {slopes[title]:.2f}", x, "CPU seconds", lines))
        head = ("nodes", "parameters", *STAGES, "CPU seconds", "peak MiB")
        text += [f"## {title}: slope {slopes[title]:.2f}", ""]
        text += ["| " + " | ".join(head) + " |", "|" + "---:|" * len(head)]
        text += ["| " + " | ".join(_cells(run)) + " |" for run in runs]
        text += ["", f"![{title}](plots/{chart.name})", ""]
    path.write_text("\n".join([*text, "Made by `tools/benchmark_scaling.py`.", ""]))


if __name__ == "__main__":
    sys.exit(main())
