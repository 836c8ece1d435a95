"""Channels alone against channels and layers of lower rank: quality and latency at equal budgets.

    python tools/benchmark_ranks.py MODEL.onnx --calib FILE.npz --eval FILE.npz --keep FOLDER
        [--budgets 0.7,0.5] [--by flops|params|size|latency] [--seconds 4]

``--eval`` is what ``graphprune prune --eval`` takes. Each plan is made, proved, repaired and scored
once and kept in FOLDER; what is there already is only timed, interleaved with the original, one
thread. So the second run, on a quiet machine, gives the latencies.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from graphprune import api
from graphprune.runtime import random_inputs, session, time_interleaved
from graphprune.storage import load

UNITS = {"channels": ("channels", "heads"), "channels and ranks": ("channels", "heads", "ranks")}
ROUNDS = 101


def made(path: Path, source: Path, given: dict[str, Any], units: tuple[str, ...]) -> dict[str, Any]:
    """What is known of one pruned model, which is made unless it is there."""
    told = path.with_suffix(".json")
    if not told.exists():
        result = api.prune(source, output=path, units=units, **given)
        chosen = dict(result.plan.options["ranks"])
        row = {
            "macs": result.after.macs / result.before.macs,
            "params": result.after.params / result.before.params,
            "before": result.before.accuracy,
            "after": result.after.accuracy,
            "nodes": len(result.model.graph.node),
            "two": len(chosen),
        }
        told.write_text(json.dumps(row))
    found: dict[str, Any] = json.loads(told.read_text())
    return found


def ratio(source: Path, path: Path, seconds: float) -> tuple[float, float, float]:
    """Latency of the second over the first: median and quartiles."""
    original = load(source)
    feeds = random_inputs(original, api.prepare(source).analysis.shapes)
    runners = [session(original, 1), session(load(path), 1)]
    return time_interleaved(runners, [feeds, feeds], ROUNDS, seconds).ratio(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", type=Path)
    parser.add_argument("--eval", required=True)
    parser.add_argument("--keep", type=Path, required=True)
    parser.add_argument("--budgets", default="0.7,0.5")
    parser.add_argument("--by", default="flops", choices=("flops", "params", "size", "latency"))
    parser.add_argument("--seconds", type=float, default=4.0)
    asked = parser.parse_args()
    asked.keep.mkdir(parents=True, exist_ok=True)
    grid = Table("budget", "units", "MACs", "parameters", "score", "latency", "layers as two")
    for budget in (float(share) for share in asked.budgets.split(",")):
        for name, units in UNITS.items():
            given = {asked.by: budget, "calib": asked.calib, "eval_data": asked.eval}
            given["allow_miss"] = asked.by == "latency"  # said by the latency beside it
            stem = f"{asked.model.stem}-{asked.by}-{budget:g}-{len(units)}"
            path = asked.keep / f"{stem}.onnx"
            row = made(path, asked.model, given, units)
            middle, low, high = ratio(asked.model, path, asked.seconds)
            grid.add_row(
                f"{asked.by} {budget:g}",
                name,
                f"{row['macs']:.1%}",
                f"{row['params']:.1%}",
                f"{row['before']:.2%} -> {row['after']:.2%}",
                f"{middle:.3f} ({low:.3f} to {high:.3f})",
                str(row["two"]),
            )
    Console(width=120).print(grid)


if __name__ == "__main__":
    main()
