"""Seconds per named stage, each announced on the caller's progress display."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

from graphprune.repair.damage import silent

Progress = Callable[[float], None]
Stage = Callable[[str], AbstractContextManager[Progress]]
Done = TypeVar("Done")
OTHER = "other"
# What people read while a stage runs; of one that is not here, its name.
DOING = {
    "load": "reading the model",
    "analyse": "analysing the graph",
    "time": "timing the model",
    "plan": "planning",
    "record": "writing the plan down",
    "calibrate": "calibrating",
    "score": "scoring units",
    "search": "trying plans",
    "blocks": "weighing residual blocks",
    "pace": "timing plans",
    "ranks": "weighing layers of lower rank",
    "unconstrained": "trying plans with selectors",
    "cut": "cutting",
    "verify": "verifying the cut",
    "repair": "repairing",
    "refine": "tuning as a whole",
    "order": "putting channels in order",
    "measure": "measuring",
    "save": "writing",
}


class Clock:
    """Seconds per named stage; each stage is also announced on the caller's progress display, with
    the ``label`` of what the clock is for before it."""

    def __init__(self, stage: Stage | None, label: str = "") -> None:
        self.stage = stage or (lambda name: nullcontext(silent))
        self.label = label
        self.seconds: dict[str, float] = {}
        self.start = time.perf_counter()

    def __call__(self, name: str, work: Callable[[Progress], Done], more: str = "") -> Done:
        """Do ``work``; ``more`` is said of it beside what the stage is called."""
        start = time.perf_counter()
        with self.stage(f"{self.label}{DOING.get(name, name)}{more}") as progress:
            done = work(progress)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        return done

    def spent(self, besides: float = 0.0) -> dict[str, float]:
        """The seconds by stage, and as ``OTHER`` what passed between stages, less what is told of
        ``besides``: together all since the clock was made."""
        all_ = time.perf_counter() - self.start
        return {**self.seconds, OTHER: max(0.0, all_ - besides - sum(self.seconds.values()))}
