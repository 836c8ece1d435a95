"""Where the time goes: latency by type of operator, as ONNX Runtime's own profiler reports it."""

from __future__ import annotations

import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from graphprune.interface import fitted
from graphprune.model import Model
from graphprune.profiling import Event, own_times
from graphprune.runtime import Feeds, run_session, session

RUNS, WARM_UP = 10, 2  # of each model; the first ones are not counted
SECONDS = 5.0  # less runs where they would take longer, but not fewer than MIN_RUNS
MIN_RUNS = 5


@dataclass(frozen=True)
class Operator:
    """All operators of a type in two models: milliseconds for one inference, one after another.

    Types are those that ONNX Runtime runs: fused ones by their fused names, its own copies into
    another layout (ReorderInput, ReorderOutput) apart.
    """

    name: str
    before_ms: float
    after_ms: float
    share: float  # of the first model's time


def profiled_sessions(
    models: Sequence[Model], feeds: Feeds, threads: int, provider: str
) -> tuple[list[Any], tuple[Operator, ...]]:
    """Sessions of two models, ready to be timed, and what their operators took in runs before that.

    The models run in turn, so that noise meets both alike; a number is the median over the runs.
    """
    with tempfile.TemporaryDirectory() as folder:
        runners = [
            session(model, threads, provider, profile=Path(folder) / str(i))
            for i, model in enumerate(models)
        ]
        fed = [fitted(model, feeds) for model in models]
        begin = time.perf_counter()
        for run in range(RUNS):
            if run >= MIN_RUNS and time.perf_counter() - begin > SECONDS:
                break
            for runner, feed in zip(runners, fed, strict=True):
                run_session(runner, feed)
        files = [Path(runner.end_profiling()) for runner in runners]
        before, after = (by_type(json.loads(file.read_text())) for file in files)
    total = max(sum(before.values()), 1e-9)
    names = sorted({*before, *after}, key=lambda n: (-before.get(n, 0), -after.get(n, 0), n))
    return runners, tuple(
        Operator(n, before.get(n, 0.0), after.get(n, 0.0), before.get(n, 0.0) / total)
        for n in names
    )


def by_type(events: Sequence[Event]) -> dict[str, float]:
    """Milliseconds by type of operator: of each run the sum, of the runs after the warm-up the
    median. What runs inside a body counts as itself, not once more as its Loop or If."""
    runs = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e["name"] == "model_run")
    sums: dict[str, Any] = defaultdict(lambda: np.zeros(len(runs)))
    starts = np.array([start for start, _ in runs])
    for event, own in own_times(events):
        run = int(np.searchsorted(starts, event["ts"], side="right")) - 1
        if run >= 0:
            sums[event["args"]["op_name"]][run] += own / 1e3
    return {name: float(np.median(values[WARM_UP:])) for name, values in sums.items()}
