"""Two ways to meet one budget, compared by what they do: how near the outputs are to the original's
on inputs held out, and how long the models take.

What comes second must be clearly nearer, and no slower than the noise of measuring explains: the
same MACs in more operators (copies that select channels, two layers for one) can take longer.

Nearer means in squared errors of the outputs, by more than chance in rows compared in pairs, with
predictions that diverge no more and are the same as often. Any one of these alone
takes plans that lose accuracy (``tools/benchmark_contest.py``, ``docs/figures.md``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from graphprune.distortion import TINY
from graphprune.latency.device import Device
from graphprune.model import Model
from graphprune.options import Options
from graphprune.pace import NEAR_ENOUGH, measuring
from graphprune.pipeline import Pipeline
from graphprune.planning import slow_fusions
from graphprune.prepared import Prepared
from graphprune.runtime import random_inputs
from graphprune.search import Nearness
from graphprune.targets import Target, choose

CLEARLY = 0.9  # of the usual plan's distortion that another one may have at most
SIGMAS, FEW = 1.5, 8  # standard errors of the mean gain of a row; rows that say nothing of that


def clearly_nearer(other: Nearness, usual: Nearness) -> bool:
    """Whether a plan is nearer to the original by more than chance, in all that is measured."""
    gain = usual.rows - other.rows
    sure = len(gain) < FEW or gain.mean() >= SIGMAS * gain.std(ddof=1) / np.sqrt(len(gain))
    nearer = other.distortion <= CLEARLY * usual.distortion
    same = other.divergence <= usual.divergence and other.agreement >= usual.agreement
    return bool(sure) and nearer and same


def share_left(other: Nearness, usual: Nearness) -> float:
    """Of two plans the one for which this is less is nearer to the original: what is left of the
    usual plan's distortion, times what is left of its divergence."""
    distortion = (other.distortion + TINY) / (usual.distortion + TINY)
    return distortion * (other.divergence + TINY) / (usual.divergence + TINY)


def compared(other: Nearness, usual: Nearness) -> str:
    """The numbers of both, for a note."""
    text = f"distortion of the outputs {other.distortion:.4f} against {usual.distortion:.4f}"
    if not usual.divergence:
        return text
    return f"{text}, of predictions {other.divergence:.4f} against {usual.divergence:.4f}"


@dataclass(frozen=True)
class Race:
    """Milliseconds of the usual plan and of another, or why nobody knows."""

    usual: float = 0.0
    other: float = 0.0
    unknown: str = ""

    @property
    def lost(self) -> bool:
        """Whether the other plan takes longer by more than noise."""
        return self.other > self.usual * (1 + NEAR_ENOUGH)

    def __str__(self) -> str:
        return self.unknown or f"{self.other:.4g} ms against {self.usual:.4g} ms"


@dataclass(frozen=True)
class Track:
    """Where plans for a budget on anything but latency race; without a device, why there is none.
    A decision that was measured stands in the plan: who applies that measures nothing."""

    prepared: Prepared
    options: Options
    target: Target
    device: Device | None
    closed: str = ""

    def __call__(self, usual: Model, other: Model) -> Race:
        """Both models, cut and repaired, in turn."""
        if self.device is None:
            return Race(unknown=self.closed)
        shapes = self.prepared.analysis.shapes
        feeds = random_inputs(self.prepared.original, shapes, self.options.scoring.seed)
        apart = Pipeline(self.prepared.apart(slow_fusions(self.target, self.options)))
        first, second = (
            apart.run(model.opened, self.prepared.context).model.closed for model in (usual, other)
        )
        before, ratio = self.device.pair(first, second, feeds)
        return Race(before, before * ratio)


def track(prepared: Prepared, options: Options) -> Track:
    """Where the options say that times are taken."""
    target = choose(
        prepared.registry.targets, options.hardware, options.round_to, options.min_channels
    )
    if options.timed:
        return Track(prepared, options, target, None, "latency is the budget")
    if not options.measure:
        return Track(prepared, options, target, None, "latency not compared: --no-measure")
    device = measuring(target, options)
    unknown = f"latency not compared: target {target.name} has a table, nothing measures here"
    return Track(prepared, options, target, device, "" if device is not None else unknown)
