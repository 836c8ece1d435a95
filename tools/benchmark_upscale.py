"""Constrained against unconstrained plans: accuracy, latency and nodes at the same budget.

    python tools/benchmark_upscale.py --work FOLDER --shared FOLDER [--by latency]
        [--only resnet20_cifar10_bn] [--criteria l1,obspa] [--repairs none,obs] [--ratios 0.7,0.5]
        [--samples 256] [--quick] [--output TABLE.md]

The folders are those of tools/benchmark_accuracy.py (tools.accuracy.prepare fills the first; the
second holds ``models``). Under a budget on MACs both plans keep as many; with ``--by latency`` both
are brought to the same measured latency, on a quiet machine only. Every row is one pair of runs:
a plan with one set for all readers of a tensor, and what ``--unconstrained`` makes of it, which is
the same plan where that was refused. The latency of both is measured against the original's in
interleaved rounds. The last line is the mean over the rows, with the published one beside it.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from graphprune import api
from graphprune.errors import GraphPruneError
from graphprune.result import Result
from tools.accuracy.cases import CASES, Case

NAMES = "resnet20_cifar10_bn,resnet56_cifar10_bn,efficientnet_lite0,fashion_resnet"
CRITERIA, REPAIRS = "l1,lamp,fpgm,obspa", "none,obs"
PUBLISHED = "published (ImageNet, 15 networks, not repaired, arXiv 2307.08771): +2.1 points"
HEAD = (
    "| model | criterion | repair | left of {by} | one set | own sets | points | latency, one set "
    "| own sets | nodes | |\n|---|---|---|---|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class Row:
    """A pair of runs, the plan with one set for all readers first."""

    case: str
    criterion: str
    repair: str
    ratio: float
    top1: tuple[float, float]  # percent
    latency: tuple[float, float]  # of the original's
    nodes: tuple[int, int]
    refused: str  # empty where the readers got sets of their own

    @property
    def points(self) -> float:
        return self.top1[1] - self.top1[0]

    def __str__(self) -> str:
        cells = (
            self.case,
            self.criterion,
            self.repair,
            f"{self.ratio:g}",
            *(f"{value:.1f}" for value in self.top1),
            f"{self.points:+.1f}",
            *(f"{value:.3f}" for value in self.latency),
            f"{self.nodes[0]}, {self.nodes[1]}",
            f"refused: {self.refused}" if self.refused else "taken",
        )
        return f"| {' | '.join(cells)} |"


@dataclass(frozen=True)
class Opened:
    """A case with its places: the model is a copy in a folder of its own, where what all runs share
    is kept."""

    case: Case
    model: Path
    places: dict[str, Path]


def opened(given: argparse.Namespace) -> Iterator[Opened]:
    """The cases that were asked for, one after the other."""
    places = {"work": given.work, "shared": given.shared, "root": Path(__file__).parents[1]}
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            if case.name in given.only.split(","):
                copy = Path(folder) / f"{case.name}.onnx"
                shutil.copy(case.model.format(**places), copy)
                yield Opened(case, copy, places)


def add_options(parser: argparse.ArgumentParser, names: str, repairs: str) -> None:
    """What says which cases are run, and how; the defaults that differ are given."""
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--only", default=names)
    parser.add_argument("--criteria", default=CRITERIA)
    parser.add_argument("--repairs", default=repairs)
    parser.add_argument("--ratios", default="0.7,0.5")
    parser.add_argument("--samples", type=int, default=256)


def rows(one: Opened, given: argparse.Namespace) -> Iterator[Row]:
    """Every criterion, repair and ratio of one case."""
    case, copy, places = one.case, one.model, one.places
    data = (case.quick if given.quick else case.data).format(**places)
    calibration = case.calibration.format(**places)
    for criterion in given.criteria.split(","):
        for repair in given.repairs.split(","):
            for ratio in map(float, given.ratios.split(",")):
                options: dict[str, Any] = {
                    "criterion": criterion,
                    "repair": repair,
                    "eval_data": data,
                    "samples": given.samples,
                    "round_to": given.round_to,
                    "latency" if given.by == "latency" else "flops": ratio,
                }
                try:
                    pair = [_run(copy, calibration, options, own) for own in (False, True)]
                except GraphPruneError as error:
                    print(case.name, criterion, repair, ratio, error, file=sys.stderr, flush=True)
                    continue
                yield _row(case, criterion, repair, ratio, pair)


def _run(model: Path, calibration: str, options: dict[str, Any], own: bool) -> Result:
    looks = own or options["repair"] != "none" or options["criterion"] == "obspa"
    calib = Path(calibration) if looks else None
    return api.prune(model, calib=calib, unconstrained=own, **options)


def _row(case: Case, criterion: str, repair: str, ratio: float, pair: Sequence[Result]) -> Row:
    top1 = [100 * (result.after.accuracy or 0.0) for result in pair]
    latency = [(result.verdict.latency_ratio or (0.0,))[0] for result in pair]
    nodes = [len(result.made.nodes) for result in pair]
    said = [n for n in pair[1].notes if n.startswith("--unconstrained refused: ")]
    refused = said[0].removeprefix("--unconstrained refused: ").split(":")[0] if said else ""
    return Row(
        case.name,
        criterion,
        repair,
        ratio,
        (top1[0], top1[1]),
        (latency[0], latency[1]),
        (nodes[0], nodes[1]),
        refused,
    )


def summary(found: Sequence[Row]) -> str:
    """Means over all rows and over those without repair, and the published one."""
    taken = [row for row in found if not row.refused]
    lines = [f"{len(taken)} of {len(found)} taken, the others refused (the same plan)."]
    kinds = {"all": found, "taken": taken, "not repaired": [r for r in found if r.repair == "none"]}
    for kind, some in kinds.items():
        if some:
            points = [row.points for row in some]
            lines.append(
                f"{kind}: {mean(points):+.2f} points on average, {min(points):+.1f} to "
                f"{max(points):+.1f}"
            )
    return "\n".join([*lines, PUBLISHED])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser, NAMES, REPAIRS)
    parser.add_argument("--by", choices=("macs", "latency"), default="macs")
    parser.add_argument("--round-to", type=int)
    parser.add_argument("--quick", action="store_true", help="fewer labelled samples")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    found: list[Row] = []
    print(HEAD.format(by=given.by), flush=True)
    for one in opened(given):
        for row in rows(one, given):
            print(row, flush=True)
            found.append(row)
    if not found:
        sys.exit("nothing was compared")
    text = f"{HEAD.format(by=given.by)}\n" + "\n".join(map(str, found)) + f"\n\n{summary(found)}\n"
    print(summary(found))
    if given.output:
        given.output.write_text(text)


if __name__ == "__main__":
    main()
