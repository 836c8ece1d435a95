"""--units blocks beside ranks: blocks leave, and of those that stay layers become two."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import Builder
from test_ranks import ALL, INNER, USUAL, WIDTH, error_of, low_rank, ranks_of

from graphprune import api
from graphprune.analysis import Scope
from graphprune.cost import count_params
from graphprune.factoring import factored
from graphprune.ladders import BLOCKS
from graphprune.options import Options
from graphprune.planning import decide, judge, settled
from graphprune.result import Result
from graphprune.storage import load
from graphprune.study import study

UNITS = (*ALL, "blocks")


def stream(weak: tuple[float, ...] = (1, 0.03, 1, 1)) -> onnx.ModelProto:
    """x + W2 silu(W1 x + b1) with layers of low rank, and blocks that add little."""
    b = Builder(1)
    x = "x"
    for size in weak:
        h = b.add("Add", b.add("MatMul", x, low_rank(b, (WIDTH, INNER))), b.weight(INNER))
        h = b.add("Mul", h, b.add("Sigmoid", h))
        weight = low_rank(b, (INNER, WIDTH))
        y = b.add("MatMul", h, weight)
        x = b.add("Add", x, b.add("Mul", y, b.constant(np.float32(size))))
    y = b.add("MatMul", x, b.weight(WIDTH, 10))
    return b.model({"x": ["n", WIDTH]}, {y: ["n", 10]})


def pruned(source: onnx.ModelProto, **given: Any) -> Result:
    return api.prune(source, **{**USUAL, "flops": 0.17, "units": UNITS, **given})


def gone(result: Result) -> list[int]:
    return [i for i, block in enumerate(result.plan.blocks) if block.removed]


def test_a_weak_block_leaves_and_layers_become_two() -> None:
    source = stream()
    both = pruned(source)
    assert gone(both) == [1]
    assert len(ranks_of(both.plan)) >= 2
    assert both.verdict.passed
    assert both.after.macs <= 0.17 * both.before.macs
    for units in (ALL, ("channels", "heads", "blocks")):
        assert error_of(both, source) < 0.1 * error_of(pruned(source, units=units), source)


def test_made_again() -> None:
    source = stream()
    made = pruned(source)
    again = api.apply(source, made.plan, options=Options(measure=False, cache=False))
    assert again.model.SerializeToString() == made.model.SerializeToString()


@pytest.mark.parametrize("size", [1, 0.03])
def test_layers_of_a_block_that_has_left_are_not_two(size: float) -> None:
    """Costs of what is left are counted, whatever has left or become two."""
    source = stream((1, size, 1))
    wanted = Options.of(flops=0.35, **{**USUAL, "units": UNITS})
    prepared = api.prepare(source, Scope(units=UNITS))
    studied = study(prepared, wanted)
    judged = judge(studied, wanted)
    assert judged.ranks is not None
    blocks = judged.evidence[BLOCKS]
    judged = replace(
        judged, evidence={**judged.evidence, BLOCKS: replace(blocks, curve=blocks.curve * 0)}
    )
    decision = decide(prepared, judged, wanted)
    after, _, settle = settled(studied, judged, decision)
    analysis = prepared.analysis
    left = decision.removed[analysis.coupling.blocks]
    assert left.any()
    inside = {
        name
        for block, one in zip(analysis.blocks, left, strict=True)
        if one
        for i in block.nodes
        for name in analysis.model.nodes[i].input
    }
    assert not inside & decision.ranks.keys()
    there = after.prepared.analysis
    assert settle.removed[there.coupling.blocks].tolist() == left.tolist()
    costs = there.cost.of(settle.removed)
    assert decision.costs is None or decision.costs.macs == costs.macs
    made = pruned(source, flops=0.35)
    assert count_params(load(made.model)) == made.after.params


def test_blocks_are_carried_by_name() -> None:
    """Whichever layers become two."""
    source = stream()
    wanted = Options.of(flops=0.5, **{**USUAL, "units": UNITS})
    prepared = api.prepare(source, Scope(units=UNITS))
    studied = study(prepared, wanted)
    judged = judge(studied, wanted)
    assert judged.ranks is not None
    units = prepared.analysis.coupling.blocks
    for place, site in enumerate(judged.ranks.sites[:4]):
        removed = prepared.analysis.nothing_removed
        removed[units[place]] = True
        after, found, _ = factored(studied, {site.weight: 4}, removed)
        there = after.prepared.analysis
        assert found[there.coupling.blocks].tolist() == [i == place for i in range(4)]
        assert [b.name for b in there.blocks] == [b.name for b in prepared.analysis.blocks]


def test_without_channels() -> None:
    made = pruned(stream(), units=("blocks", "ranks"), flops=0.6)
    assert made.verdict.passed
    assert gone(made) or ranks_of(made.plan)
    assert made.after.macs <= 0.6 * made.before.macs


def test_with_only() -> None:
    """Layers and blocks that a pattern names."""
    source = stream()
    model = load(source)
    named = tuple(node.name for node in model.nodes if node.op_type in ("MatMul", "Mul"))
    made = pruned(source, only=named, flops=0.5)
    assert made.verdict.passed
    again = api.apply(source, made.plan, options=Options(measure=False, cache=False))
    assert again.model.SerializeToString() == made.model.SerializeToString()
