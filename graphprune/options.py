"""What a user may ask of a pruning, in one place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from graphprune.analysis import Scope
from graphprune.criteria import Scoring
from graphprune.errors import UsageError
from graphprune.shapes import Shape


@dataclass(frozen=True)
class Options:
    """Everything that decides a plan, then everything that decides how it is checked.

    Budgets are the shares of the original's MACs, parameters and file size that may remain.
    """

    flops: float | None = None
    params: float | None = None
    size: float | None = None
    criterion: str = "l1"
    scoring: Scoring = field(default_factory=Scoring)
    spread: str = "balanced"
    hardware: str = "auto"
    round_to: int | None = None
    min_channels: int | None = None
    protect: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    input_shapes: Mapping[str, Shape] | None = None
    allow_miss: bool = False
    verify: bool = True
    measure: bool = True
    rounds: int = 21
    threads: int = 1
    provider: str = "cpu"
    eval_data: Path | None = None
    max_accuracy_drop: float | None = None
    min_speedup: float | None = None

    @staticmethod
    def of(**given: Any) -> Options:
        """Options by name; one that does not exist is an error that names those that do."""
        known = [f.name for f in fields(Options)]
        for name in given:
            if name not in known:
                raise UsageError(
                    f"there is no option {name!r}", hint=f"One of: {', '.join(known)}."
                )
        return Options(**given)

    def budgets(self) -> dict[str, float]:
        """Kind of cost → share that may remain."""
        asked = {"macs": self.flops, "params": self.params, "bytes": self.size}
        budgets = {kind: share for kind, share in asked.items() if share is not None}
        for kind, share in budgets.items():
            if not isinstance(share, int | float) or not 0 < share <= 1:
                raise UsageError(
                    f"the {kind} budget is {share!r}", hint="A budget is a share in (0, 1]."
                )
        if not budgets:
            raise UsageError(
                "no budget is given",
                hint="Say how much may remain, for example --target-flops 0.5.",
            )
        if self.spread not in ("global", "uniform", "balanced"):
            raise UsageError(
                f"--spread {self.spread!r} is unknown", hint="global, uniform or balanced"
            )
        return budgets

    @property
    def scope(self) -> Scope:
        return Scope(self.protect, self.only, self.input_shapes)
