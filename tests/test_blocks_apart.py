"""--unconstrained with --units blocks: readers with own channels, and blocks that leave."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from block_forms import FORMS
from graphs import Builder
from test_unconstrained import uneven

from graphprune import api
from graphprune.analysis import Scope
from graphprune.cut import cut
from graphprune.unconstrained import opened
from graphprune.validate import verify

UNITS = ("channels", "heads", "blocks")
QUICK = {"samples": 64, "measure": False, "round_to": 1, "cache": False, "units": UNITS}


def with_a_weak_block() -> onnx.ModelProto:
    """Readers that need other halves of a stream, and a block that hardly adds to it."""
    b = Builder(9)
    x = b.conv("x", 3, 16)
    for half in (slice(0, 8), slice(8, 16), None):
        weight = b.rng.standard_normal((32, 16, 3, 3)) / 12
        if half is not None:
            weight[:, half] *= 1e-3
        inner = b.add("Conv", b.add("Relu", x), b.constant(np.float32(weight)), pads=[1] * 4)
        last = b.rng.standard_normal((16, 32, 3, 3)) / (17 if half is not None else 1700)
        x = b.add(
            "Add",
            x,
            b.add("Conv", b.add("Relu", inner), b.constant(np.float32(last)), pads=[1] * 4),
        )
    y = b.add("MatMul", b.add("Flatten", b.add("GlobalAveragePool", x)), b.weight(16, 5))
    return b.model({"x": [1, 3, 8, 8]}, {y: [1, 5]})


@pytest.mark.parametrize("form", [*FORMS, "uneven"])
def test_law(form: str) -> None:
    source = uneven() if form == "uneven" else FORMS[form]()[0]
    usual = api.prepare(source, Scope(units=UNITS))
    wide, _ = opened(usual)
    before, after = usual.analysis, wide.analysis
    assert [(b.name, b.entry, b.exit) for b in before.blocks] == [
        (b.name, b.entry, b.exit) for b in after.blocks
    ]
    assert np.array_equal(before.coupling.blocks >= 0, after.coupling.blocks >= 0)
    rng = np.random.default_rng(0)
    coupling = after.coupling
    blocks = coupling.blocks[coupling.blocks >= 0]
    for _ in range(2):
        removed = rng.random(coupling.n_units) < 0.25
        removed[blocks] = rng.random(len(blocks)) < 0.5
        removed = coupling.closed(removed)
        alive = coupling.alive(removed)
        if any(len(a) and not alive[a.slots].any() for a in coupling.relations.slots.axes):
            continue
        small = cut(after.model, after.shapes, coupling, alive)[0]
        verify(after, small, removed)


def test_blocks_leave_beside_readers_with_channels_of_their_own() -> None:
    result = api.prune(with_a_weak_block(), flops=0.5, unconstrained=True, **QUICK)
    assert sum(block.removed for block in result.plan.blocks) == 1
    assert any(note.startswith("unconstrained: ") for note in result.notes)
    assert result.verdict.passed
    assert result.after.macs <= 0.5 * result.before.macs
    again = api.apply(
        with_a_weak_block(), result.plan, options=api.Options(measure=False, cache=False)
    )
    assert again.model == result.model
