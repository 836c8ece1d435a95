"""What a pruning gives back; prints as the table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import onnx

from graphprune.analysis import Inexact, PinnedReason
from graphprune.cleaned import Cleaned
from graphprune.errors import GraphPruneError
from graphprune.interface import Reshaped
from graphprune.model import Model
from graphprune.pipeline import Change
from graphprune.plan import Plan
from graphprune.repair.damage import Repaired
from graphprune.repair.refine import Refined
from graphprune.validate import Verdict


@dataclass(frozen=True)
class Summary:
    """One side of the comparison."""

    macs: float
    params: float
    bytes: int
    latency_ms: float | None = None
    accuracy: float | None = None
    memory: float = 0.0  # bytes of activations in use at once, at most


@dataclass(frozen=True)
class Point:
    """One target of a sweep: what came of it, or why nothing did."""

    target: float
    after: Summary | None = None
    latency_ratio: float | None = None  # over the original's
    error: float | None = None  # of the outputs, relative; see ``Sweep.error_on``
    output: Path | None = None
    replaced: bool = False  # an earlier file
    notes: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    failure: GraphPruneError | None = None
    best: bool = False  # no other plan is both faster and nearer to the original
    held_back: str | None = None  # what keeps latency from falling as the MACs did


@dataclass(frozen=True)
class Sweep:
    """Plans of one model under several budgets on one kind of cost, the largest first."""

    by: str
    before: Summary
    points: tuple[Point, ...]
    error_on: str  # the inputs on which outputs were compared
    seconds: Mapping[str, float]  # of what all plans share
    written: tuple[Path, ...] = ()  # besides the models: the table and the plot
    cleaned: Cleaned | None = None  # what left all of them without loss, where that was asked for

    @property
    def exit_code(self) -> int:
        """That of the first target that was not met, else 0."""
        failures = [point.failure for point in self.points if point.failure is not None]
        return failures[0].exit_code if failures else 0

    def __str__(self) -> str:
        from graphprune.report.sweep import sweep_table
        from graphprune.report.terminal import to_text

        return to_text(sweep_table(self))


@dataclass(frozen=True)
class Result:
    """The pruned model, the plan that made it, what changed, and what was measured."""

    made: Model
    plan: Plan
    changes: tuple[Change, ...]
    verdict: Verdict
    before: Summary
    after: Summary
    pinned: tuple[PinnedReason, ...]
    prunable: float  # share of the MACs in groups
    notes: tuple[str, ...]
    seconds: Mapping[str, float]
    calibration: str | None = None  # what the calibration inputs were
    repairs: tuple[Repaired, ...] = ()
    refined: Refined | None = None  # as a whole, after the repair
    interface: tuple[Reshaped, ...] = ()  # graph inputs and outputs that lost slots
    inexact: tuple[Inexact, ...] = ()  # groups that lost units under statistics
    cleaned: Cleaned | None = None  # what the lossless clean-up did, where it was asked for
    replaced: bool = False  # whether what was written took the place of an earlier file

    @cached_property
    def model(self) -> onnx.ModelProto:
        """The pruned model, weights included: in memory, however large."""
        return self.made.assemble()

    def __str__(self) -> str:
        from graphprune.report.terminal import as_text

        return as_text(self)
