"""Latency as predicted by the tables against latency measured; and plans for half of the latency.

    python tools/benchmark_latency.py MODELS [--only resnet18,vit_b16] [--plans 50] [--threads 1]
        [--plot FOLDER] [--halves] [--samples 32]

MODELS is a folder of materialised architectures. For each model ``--plans`` random sets of units
leave (every group keeps its own random share, on the grid of the target); the prediction is laid
through the original and one small plan, which are not among them, and each plan is then timed
interleaved with the original. Quiet machines only: what runs beside it shows in the errors.

``--halves`` also makes plans for half of the latency and, as a plan for MACs that is as fast, the
one found by bisection on what is measured; summed distortion (criterion obspa on made-up inputs)
says how much of what counts each of them gives up.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table as Grid

from graphprune import api
from graphprune.coupling import Mask
from graphprune.cut import cut
from graphprune.options import Options
from graphprune.pace import paced, timed
from graphprune.planning import damage, decide, judge
from graphprune.prepared import Prepared
from graphprune.runtime import random_inputs, session, time_interleaved
from graphprune.study import study

NAMES = ("resnet18", "resnet50", "mobilenet_v2", "densenet121", "vit_b16", "bert_base")
ROUNDS, BUDGET_S = 41, 4.0
BISECTIONS = 7


def random_plan(prepared: Prepared, rng: np.random.Generator) -> Mask:
    """Every group keeps a share of its own, around one that is common to the plan."""
    analysis = prepared.analysis
    assert prepared.latency is not None
    target = prepared.latency.target
    removed = analysis.nothing_removed
    usual = rng.uniform(0.25, 1.0)
    for group in analysis.coupling.groups:
        share = float(np.clip(rng.normal(usual, 0.2), 0.1, 1.0))
        step = target.multiple_of("Conv") if len(group) >= 2 * target.multiple_of("Conv") else 1
        count = max(step, round(share * len(group) / step) * step)
        removed[group.units[min(count, len(group)) :]] = True
    return removed


def ratio_of(prepared: Prepared, removed: Mask, threads: int) -> float:
    """Latency without ``removed`` over the original's: median of interleaved rounds."""
    analysis = prepared.analysis
    alive = analysis.coupling.alive(removed)
    small = cut(analysis.model, analysis.shapes, analysis.coupling, alive)[0].closed
    runners = [session(model, threads) for model in (prepared.original, small)]
    feeds = random_inputs(prepared.original, analysis.shapes)
    return time_interleaved(runners, [feeds, feeds], ROUNDS, BUDGET_S).ratio(1)[0]


def compared(path: Path, plans: int, threads: int) -> list[tuple[float, float]]:
    """(predicted, measured) latency of random plans, as shares of the original's."""
    prepared = timed(api.prepare(path), Options.of(latency=0.5, threads=threads))
    latency = prepared.latency
    assert latency is not None
    rng = np.random.default_rng(0)
    whole = latency(prepared.analysis.nothing_removed)
    found = []
    for _ in range(plans):
        removed = random_plan(prepared, rng)
        found.append((latency(removed) / whole, ratio_of(prepared, removed, threads)))
    return found


def halves(path: Path, threads: int, samples: int) -> tuple[float, float, float, float]:
    """Latency and summed distortion of the plan for half of the latency, and of the plan for MACs
    that is as fast."""
    options = Options.of(latency=0.5, threads=threads, samples=samples, cache=False)
    prepared = timed(api.prepare(path), options)
    studied = study(prepared, options)
    judged = judge(studied, options)
    found = paced(prepared, judged, options)
    assert found.decision is not None
    removed = found.decision.removed
    mine = ratio_of(prepared, removed, threads)
    by_macs = replace(options, latency=None, flops=0.5)
    low, high = 0.1, 0.9
    for _ in range(BISECTIONS):  # by what is measured: predictions favour the plan made by them
        middle = (low + high) / 2
        other = decide(prepared, judged, by_macs, None, middle).removed
        theirs = ratio_of(prepared, other, threads)
        low, high = (middle, high) if theirs < mine else (low, middle)
    return mine, damage(prepared, judged, removed), theirs, damage(prepared, judged, other)


def plot(folder: Path, name: str, pairs: Sequence[tuple[float, float]]) -> None:
    """Predicted against measured as SVG, and as CSV beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"latency_{name}.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("predicted", "measured"), *pairs])
    size, edge = 360, 40
    top = max(1.05, *(max(pair) for pair in pairs))

    def at(value: float) -> float:
        return edge + (size - 2 * edge) * value / top

    marks = "".join(
        f'<circle cx="{at(p):.1f}" cy="{size - at(m):.1f}" r="3" fill="#1f77b4" opacity="0.7"/>'
        for p, m in pairs
    )
    ticks = "".join(
        f'<text x="{at(t):.0f}" y="{size - edge + 16}" text-anchor="middle">{t:g}</text>'
        f'<text x="{edge - 6}" y="{size - at(t) + 4:.0f}" text-anchor="end">{t:g}</text>'
        for t in (0.25, 0.5, 0.75, 1.0)
    )
    (folder / f"latency_{name}.svg").write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{size}" height="{size}" '
        f'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>'
        f'<line x1="{at(0)}" y1="{size - at(0)}" x2="{at(top)}" y2="{size - at(top)}" '
        f'stroke="#999"/><text x="{size / 2}" y="16" text-anchor="middle">{name}: share of the '
        f"original's latency</text>{ticks}{marks}"
        f'<text x="{size / 2}" y="{size - 6}" text-anchor="middle">predicted</text>'
        f'<text x="12" y="{size / 2}" transform="rotate(-90 12 {size / 2})" '
        f'text-anchor="middle">measured</text></svg>\n'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path)
    parser.add_argument("--only", default=",".join(NAMES))
    parser.add_argument("--plans", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--halves", action="store_true")
    parser.add_argument("--samples", type=int, default=32)
    given = parser.parse_args()
    console = Console(width=120)
    errors = Grid(title=f"predicted against measured, {given.plans} random plans")
    for head in ("model", "median error", "90th percentile", "bias", "latencies measured"):
        errors.add_column(head, justify="left" if head == "model" else "right")
    half = Grid(title="half of the latency: by latency, and by MACs at the same latency")
    for head in ("model", "latency", "distortion", "latency (MACs)", "distortion (MACs)"):
        half.add_column(head, justify="left" if head == "model" else "right")
    for name in given.only.split(","):
        path = given.models / f"{name}.onnx"
        if given.plans:
            pairs = compared(path, given.plans, given.threads)
            wrong = np.array([p / m - 1 for p, m in pairs])
            span = f"{min(m for _, m in pairs):.2f} to {max(m for _, m in pairs):.2f}"
            high = np.percentile(np.abs(wrong), 90)
            row = (f"{np.median(np.abs(wrong)):.1%}", f"{high:.1%}", f"{np.median(wrong):+.1%}")
            errors.add_row(name, *row, span)
            print(name, *row, span, file=sys.stderr, flush=True)
            if given.plot:
                plot(given.plot, name, pairs)
        if given.halves:
            values = [f"{v:.3g}" for v in halves(path, given.threads, given.samples)]
            half.add_row(name, *values)
            print(name, *values, file=sys.stderr, flush=True)
    for table in (errors, half):
        if table.row_count:
            console.print(table)


if __name__ == "__main__":
    main()
