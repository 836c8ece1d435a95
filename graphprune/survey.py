"""A device measured: a target file with the latency of every piece of some models."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import numpy as np
import onnx

from graphprune.analysis import Scope
from graphprune.latency.device import Device
from graphprune.latency.gauge import gauges
from graphprune.latency.predict import Latency
from graphprune.prepared import Prepared, prepare
from graphprune.study import Progress
from graphprune.tables import Table
from graphprune.targets import Target

VALUES = {1: 16, 2: 8}  # counts of each knob that are timed, by the number of knobs
VALUES_OF_MANY = 4
Stage = Callable[[str], AbstractContextManager[Progress]]


def survey(
    models: Sequence[tuple[str, str | onnx.ModelProto]],
    base: Target,
    device: Device,
    scope: Scope,
    stage: Stage,
) -> Target:
    """``base`` with a latency table of all pieces of ``models`` (name, file or model) on
    ``device``, or of networks of usual shapes; ``rates`` serve for pieces that are not in it."""
    table = Table()
    pace: dict[str, list[float]] = defaultdict(list)
    for name, model in models or list(gauges()):
        prepared = prepare(model, scope if models else None)
        latency = Latency(prepared.analysis, base, table, device)
        with stage(f"timing {name}") as progress:
            _measure(latency, progress)
        for operator, rate in _rates(prepared, latency):
            pace[operator].append(rate)
    rates = {operator: float(np.median(values)) for operator, values in sorted(pace.items())}
    return replace(base, latency=table.entries, rates=rates, latency_command="")


def _measure(latency: Latency, progress: Progress) -> None:
    for i, form in enumerate(latency.forms):
        values = VALUES.get(len(form.knobs), VALUES_OF_MANY)
        grids = [
            _spread(len(knob), step, values)
            for knob, step in zip(form.knobs, latency.steps[i], strict=True)
        ]
        for counts in itertools.product(*grids):
            latency.measured(i, counts)
        progress((i + 1) / len(latency.forms))


def _spread(full: int, step: int, values: int) -> list[int]:
    """About ``values`` counts from one step to all, whole steps apart."""
    steps = np.unique(np.linspace(1, max(1, full // step), values).round().astype(int)) * step
    return sorted({min(full, int(count)) for count in steps} | {full})


def _rates(prepared: Prepared, latency: Latency) -> list[tuple[str, float]]:
    """MACs per microsecond of every piece that has any, as it stands in the model."""
    analysis = prepared.analysis
    nothing = analysis.nothing_removed
    times = latency.by_piece(nothing) * 1e3
    found = []
    for macs, operator, time in zip(*latency.work(nothing), times, strict=True):
        if macs and time > 0:
            found.append((operator, float(macs / time)))
    return found
