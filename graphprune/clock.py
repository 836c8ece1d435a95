"""Seconds per named stage, each shown on the caller's progress display."""

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


class Clock:
    """Seconds per named stage; each stage also shows on the caller's progress display."""

    def __init__(self, stage: Stage | None) -> None:
        self.stage = stage or (lambda name: nullcontext(silent))
        self.seconds: dict[str, float] = {}
        self.start = time.perf_counter()

    def __call__(self, name: str, work: Callable[[Progress], Done]) -> Done:
        start = time.perf_counter()
        with self.stage(name) as progress:
            done = work(progress)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        return done

    def spent(self, besides: float = 0.0) -> dict[str, float]:
        """The seconds by stage, and as ``OTHER`` what passed between stages, less what is told of
        ``besides``: together all since the clock was made."""
        all_ = time.perf_counter() - self.start
        return {**self.seconds, OTHER: max(0.0, all_ - besides - sum(self.seconds.values()))}
