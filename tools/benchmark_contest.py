"""By what signs on held-out inputs plans with selectors are told from those that lose accuracy.

    python -m tools.benchmark_contest --work FOLDER --shared FOLDER [--only resnet20_cifar10_bn]
        [--criteria l1,obspa] [--repairs obs,none] [--ratios 0.7,0.5] [--samples 256] [--round-to 4]

The folders are those of tools/benchmark_upscale.py. Every plan that ``--unconstrained`` looks at is
made, refused ones too, and scored on all labelled pictures. A line gives what is left of the
distortion and of the divergence with one set for all readers, how many more predictions are the
original's, the gain of a row in standard errors, and points of accuracy won. Then each rule takes
of every row the plan that it likes best, and shows what that wins.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from graphprune import api
from graphprune.contest import CLEARLY, SIGMAS
from graphprune.options import Options
from graphprune.planning import judge
from graphprune.scoring import scorer_of
from graphprune.search import Nearness, candidate, held_out
from graphprune.study import study
from graphprune.unconstrained import Chosen, field_of, settled
from tools.benchmark_upscale import Opened, add_options, opened

NAMES = "resnet20_cifar10_bn,fashion_resnet"


@dataclass(frozen=True)
class Signs:
    """One plan with selectors against the one without."""

    row: str  # model, criterion, repair, share of the MACs
    distortion: float  # shares of the usual plan's
    divergence: float
    agreement: float  # more than the usual plan's
    sigmas: float
    points: float

    def __str__(self) -> str:
        numbers = f"{self.distortion:.3f} | {self.divergence:.3f} | {self.agreement:+.3f}"
        return f"| {self.row} | {numbers} | {self.sigmas:.1f} | {self.points:+.2f} |"


RULES: dict[str, tuple[Callable[[Signs], bool], Callable[[Signs], float]]] = {
    "distortion": (lambda s: s.distortion <= CLEARLY, lambda s: s.distortion),
    "divergence": (lambda s: s.divergence <= CLEARLY, lambda s: s.divergence),
    "distortion and agreement, two standard errors": (
        lambda s: s.distortion <= CLEARLY and s.agreement >= 0 and s.sigmas >= 2,
        lambda s: s.distortion,
    ),
    "all, and chance (the rule)": (
        lambda s: (
            s.distortion <= CLEARLY
            and s.divergence <= 1
            and s.agreement >= 0
            and s.sigmas >= SIGMAS
        ),
        lambda s: s.distortion * s.divergence,
    ),
}


def signs(one: Opened, given: argparse.Namespace) -> Iterator[Signs]:
    """All plans of one case."""
    case, copy, places = one.case, one.model, one.places
    data, calib = case.data.format(**places), Path(case.calibration.format(**places))
    for repair in given.repairs.split(","):
        for criterion in given.criteria.split(","):
            for ratio in map(float, given.ratios.split(",")):
                options = Options.of(
                    flops=ratio,
                    criterion=criterion,
                    repair=repair,
                    samples=given.samples,
                    round_to=given.round_to,
                    calib=calib,
                    unconstrained=True,
                )
                name = f"{case.name} | {criterion} | {repair} | {ratio:g}"
                yield from _of_row(name, copy, data, options)


def _of_row(name: str, model: Path, data: str, options: Options) -> Iterator[Signs]:
    prepared = api.prepare(model, options.scope)
    studied = study(prepared, options)
    field = field_of(Chosen(studied, judge(studied, options), None, None, False), options)
    if isinstance(field, str):
        return
    fit, near = held_out(studied, options)
    score = scorer_of(data, prepared.original)

    def scored(result: Any) -> float:
        return 100 * score(result.closed, options.threads, options.provider)

    usual = candidate(fit, field.base.removed, options)
    before, top1 = near(usual), scored(usual)
    for one, removed in field.plans(options):
        made = candidate(field.fit(fit), removed, options)
        points = scored(settled(one.studied.prepared, made.opened)) - top1
        yield _signs(name, near(made), before, points)


def _signs(row: str, after: Nearness, before: Nearness, points: float) -> Signs:
    gain = before.rows - after.rows
    error = gain.std(ddof=1) / np.sqrt(len(gain))
    return Signs(
        row,
        after.distortion / before.distortion,
        after.divergence / before.divergence,
        after.agreement - before.agreement,
        float(gain.mean() / error),
        points,
    )


def summary(found: Sequence[Signs]) -> str:
    """What each rule takes, and what that wins."""
    rows = {sign.row: [s for s in found if s.row == sign.row] for sign in found}
    lines = [f"{len(found)} plans of {len(rows)} rows", "| rule | taken | points in all | least |"]
    for name, (takes, order) in RULES.items():
        liked = [[s for s in some if takes(s)] for some in rows.values()]
        points = [min(some, key=order).points for some in liked if some]
        least = f"{min(points):+.2f}" if points else ""
        lines.append(f"| {name} | {len(points)} | {sum(points):+.2f} | {least} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser, NAMES, "obs,none")
    parser.add_argument("--round-to", type=int, default=4)
    given = parser.parse_args()
    found: list[Signs] = []
    for one in opened(given):
        for sign in signs(one, given):
            print(sign, flush=True)
            found.append(sign)
    print(summary(found))


if __name__ == "__main__":
    main()
