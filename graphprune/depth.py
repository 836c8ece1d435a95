"""A model's residual blocks: what each costs, what it is worth, and in what order they would go."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from graphprune.cache import Cache, beside
from graphprune.clock import Clock, Stage
from graphprune.early import check_early
from graphprune.errors import UsageError
from graphprune.latency.predict import Latency
from graphprune.memory import too_large
from graphprune.options import Options
from graphprune.pace import device_of
from graphprune.prepared import Prepared, analyse
from graphprune.report.blocks import BlockRow, Depth
from graphprune.storage import load, source_bytes
from graphprune.study import announced, block_evidence, study
from graphprune.tables import Table
from graphprune.targets import choose

Values = NDArray[np.float64]


def depth(
    model: str | Path | onnx.ModelProto, options: Options, *, stage: Stage | None = None
) -> Depth:
    """Find and measure the residual blocks of ``model``. Of ``options`` count the calibration
    inputs, what is protected, sizes of inputs, and how pieces are timed (``measure``)."""
    clock = Clock(stage)
    original = clock("load", lambda _: load(model))
    check_early(options, original)
    if too_large(original):
        raise UsageError(
            "the model is too large to be run here, and blocks are measured by running it",
            hint="`graphprune inspect MODEL --units blocks` runs nothing.",
        )
    size = source_bytes(model, original)
    cache = Cache(beside(model) if options.cache else None)
    prepared = clock("analyse", lambda _: analyse(original, size, options.scope, cache=cache))
    analysis = prepared.analysis
    free = analysis.coupling.blocks >= 0
    kept = tuple(b.name for b, one in zip(analysis.blocks, free, strict=True) if not one)
    if not free.any():
        return Depth((), kept, "nothing", (), clock.spent())
    more = announced(prepared, options)
    studied = clock("calibrate", lambda progress: study(prepared, options, progress), more)
    assert studied.inputs is not None
    found = clock("score", lambda progress: block_evidence(studied, progress))
    times = clock("time", lambda _: _latencies(prepared, options)) if options.measure else None
    whole = analysis.cost.of(analysis.nothing_removed)
    places = {int(i): k + 1 for k, i in enumerate(found.greedy.order)}
    rows = []
    chosen = [block for block, one in zip(analysis.blocks, free, strict=True) if one]
    for i, (block, unit) in enumerate(zip(chosen, analysis.coupling.blocks[free], strict=True)):
        removed = analysis.nothing_removed
        removed[unit] = True
        after = analysis.cost.of(removed)
        row = BlockRow(
            block.name,
            block.kind,
            block.entry,
            block.exit,
            1 - after.macs / max(whole.macs, 1.0),
            1 - after.params / max(whole.params, 1.0),
            None if times is None else float(times[i]),
            float(found.alone[i]),
            float(found.turn[i]),
            places[i],
            float(found.greedy.curve[places[i]]),
        )
        rows.append(row)
    notes = (*analysis.shapes.notes, *prepared.notes, *studied.notes)
    return Depth(tuple(rows), kept, studied.inputs.source, notes, clock.spent())


def _latencies(prepared: Prepared, options: Options) -> Values:
    """Share of the latency of every block that may leave: of its pieces, timed alone."""
    analysis = prepared.analysis
    target = choose(prepared.registry.targets, options.hardware)
    device = device_of(target, options.threads, options.provider)
    latency = Latency(analysis, target, Table(), device)
    whole = max(float(latency.by_piece(analysis.nothing_removed).sum()), 1e-9)
    found = []
    for unit in analysis.coupling.blocks[analysis.coupling.blocks >= 0]:
        removed = analysis.nothing_removed
        removed[unit] = True
        found.append(1 - float(latency.by_piece(removed).sum()) / whole)
    return np.array(found)
