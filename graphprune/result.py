"""What a pruning gives back; prints as the table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import onnx

from graphprune.analysis import PinnedReason
from graphprune.model import Model
from graphprune.pipeline import Change
from graphprune.plan import Plan
from graphprune.repair.damage import Repaired
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

    @cached_property
    def model(self) -> onnx.ModelProto:
        """The pruned model, weights included: in memory, however large."""
        return self.made.assemble()

    def __str__(self) -> str:
        from graphprune.report.terminal import as_text

        return as_text(self)
