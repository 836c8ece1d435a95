"""Models whose pruning tool only zeroed or masked weights: size, MACs and latency before and after.

    python tools/benchmark_lossless.py [--torch PYTHON]

With an interpreter that has torch, networks masked by torch.nn.utils.prune are exported and
cleaned; without one the shipped network, of which half of the filters are made zero.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from graphprune import api

ROOT = Path(__file__).parents[1]
SHARE = 0.5


def zeroed(source: Path, path: Path) -> Path:
    """Write a model of which half of the filters of every convolution, by L2 norm, are zero; its
    biases stay."""
    model = onnx.load(source)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type != "Conv" or node.input[1] not in weights:
            continue
        value = numpy_helper.to_array(weights[node.input[1]]).copy()
        size = np.square(value.reshape(len(value), -1)).sum(axis=1)
        gone = np.argsort(size, kind="stable")[: int(SHARE * len(size))]
        value[gone] = 0
        weights[node.input[1]].CopyFrom(numpy_helper.from_array(value, node.input[1]))
    onnx.save(model, path)
    return path


def row(path: Path) -> str:
    """A line of the table."""
    result = api.prune(path, output=path.with_suffix(".clean.onnx"), cache=False, rounds=51)
    before, after, verdict = result.before, result.after, result.verdict
    assert result.cleaned is not None
    assert verdict.latency is not None
    assert verdict.latency_ratio is not None
    counts = list(result.cleaned.counts.values())
    faster = 1 / verdict.latency_ratio[0]
    cells = [
        path.stem,
        " + ".join(map(str, counts[:3])),
        f"{before.bytes / 1e6:.1f} to {after.bytes / 1e6:.1f}",
        f"{after.macs / before.macs:.1%}",
        f"{verdict.latency[0]:.2f} to {verdict.latency[1]:.2f} ({faster:.2f}x)",
        f"{verdict.output_difference:.1e}",
        f"{sum(result.seconds.get(name, 0) for name in ('load', 'analyse', 'cut', 'save')):.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch", type=Path, help="an interpreter that has torch")
    parser.add_argument("--keep", type=Path, help="a folder for the models")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.keep or Path(temporary)
        shipped = ROOT / "models" / "fashion_resnet.onnx"
        paths = [zeroed(shipped, folder / "fashion_resnet.zeroed.onnx")]
        if given.torch is not None:
            script = ROOT / "tools" / "lossless" / "export_masked.py"
            subprocess.run([given.torch, script, folder], check=True)
            paths += sorted(folder.glob("*.zeroed.onnx")) + sorted(folder.glob("*.masked.onnx"))
        names = ("model", "dead + constant + duplicate units", "MB", "MACs left", "latency, ms")
        print(f"| {' | '.join((*names, 'output difference', 'seconds'))} |")
        print("|---" * 7 + "|")
        for path in dict.fromkeys(paths):
            print(row(path), flush=True)


if __name__ == "__main__":
    main()
