"""Allocation: exact, on the grid, never emptying a layer, honest about what it cannot reach."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from graphs import Builder, attention, random_cnn
from numpy.typing import NDArray

from graphprune import api
from graphprune.analysis import Analysis
from graphprune.budget import MOST_GIVEN_BACK, Decision, _give_back, allocate
from graphprune.criteria import Scoring, score
from graphprune.errors import NothingPrunableError, TargetError
from graphprune.oracle import law_error
from graphprune.runtime import random_inputs
from graphprune.targets import Target

FREE = Target("free")
KINDS = ("macs", "params", "bytes")


def grid(multiple: int, minimum: int = 1) -> Target:
    """What --round-to makes of a target."""
    return Target("grid", minimum=minimum, multiple={"default": multiple}, strict=True)


def analysed(model: onnx.ModelProto) -> tuple[Analysis, Any]:
    prepared = api.prepare(model)
    criterion = prepared.registry.criterion("l1")
    analysis = prepared.analysis
    return analysis, score(analysis.model, analysis.coupling, criterion, Scoring())


def shares(analysis: Analysis, decision: Decision) -> dict[str, float]:
    before, after = (analysis.cost.of(m) for m in (analysis.nothing_removed, decision.removed))
    return {kind: after.of(kind) / before.of(kind) for kind in KINDS}


def kept_counts(analysis: Analysis, decision: Decision) -> list[tuple[int, int]]:
    """(left, original) for each group."""
    groups = analysis.coupling.groups
    return [(int((~decision.removed[g.units]).sum()), len(g)) for g in groups]


def reachable(analysis: Analysis, kind: str) -> list[float]:
    """Every share that some choice of counts gives; lowest units first, so few groups only."""
    before = analysis.cost.of(analysis.nothing_removed).of(kind)
    found = []
    for counts in product(*(range(1, len(g) + 1) for g in analysis.coupling.groups)):
        removed = analysis.nothing_removed
        for group, count in zip(analysis.coupling.groups, counts, strict=True):
            removed[group.units[count:]] = True
        found.append(analysis.cost.of(removed).of(kind) / before)
    return found


def empty_axes(analysis: Analysis, decision: Decision) -> list[str]:
    alive = analysis.coupling.alive(decision.removed)
    axes = analysis.relations.slots.axes
    return [str(axis) for axis in axes if len(axis) and not alive[axis.slots].any()]


@pytest.mark.parametrize("spread", ["global", "uniform", "balanced"])
@pytest.mark.parametrize("share", [0.8, 0.7, 0.6, 0.5, 0.4, 0.3])
def test_exact_wherever_some_choice_of_counts_is(
    chain: onnx.ModelProto, share: float, spread: str
) -> None:
    """Two groups of 16: where any counts land in [R - 0.02, R], so must the result."""
    analysis, scores = analysed(chain)
    assert any(share - 0.02 <= value <= share for value in reachable(analysis, "macs"))
    decision = allocate(analysis, scores, FREE, {"macs": share}, spread)
    assert share - 0.02 <= shares(analysis, decision)["macs"] <= share
    assert decision.notes == ()


@pytest.mark.parametrize("share", [0.75, 0.5, 0.25])
@pytest.mark.parametrize("kind", KINDS)
def test_exact_with_many_groups(kind: str, share: float) -> None:
    b, x = Builder(5), "x"
    for before, after in ((3, 40), (40, 56), (56, 72), (72, 64)):
        x = b.add("Relu", b.conv(x, before, after))
    y = b.add("MatMul", b.add("Flatten", b.add("GlobalAveragePool", x)), b.weight(64, 9))
    analysis, scores = analysed(b.model({"x": [1, 3, 8, 8]}, {y: [1, 9]}))
    decision = allocate(analysis, scores, FREE, {kind: share})
    assert share - 0.02 <= shares(analysis, decision)[kind] <= share


def test_several_budgets_hold_at_once(chain: onnx.ModelProto) -> None:
    analysis, scores = analysed(chain)
    budgets = {"macs": 0.7, "params": 0.6, "bytes": 0.8}
    reached = shares(analysis, allocate(analysis, scores, FREE, budgets))
    assert all(reached[kind] <= share for kind, share in budgets.items())


def test_a_whole_budget_removes_nothing(chain: onnx.ModelProto) -> None:
    analysis, scores = analysed(chain)
    decision = allocate(analysis, scores, FREE, dict.fromkeys(KINDS, 1.0))
    assert not decision.removed.any()


@pytest.mark.parametrize("seed", range(60))
def test_no_axis_is_ever_emptied(seed: int) -> None:
    """As far down as it goes: every axis keeps a slot, ONNX Runtime takes it, law 3 holds."""
    model = random_cnn(seed)
    prepared = api.prepare(model)
    analysis = prepared.analysis
    scores = np.random.default_rng(seed).random(analysis.coupling.n_units)
    decision = allocate(analysis, scores, FREE, {"macs": 1e-6}, allow_miss=True)
    assert empty_axes(analysis, decision) == []
    options = {"round_to": 1, "min_channels": 1, "measure": False, "allow_miss": True}
    result = api.prune(model, flops=1e-6, criterion="l1", repair="none", **options)
    ort.InferenceSession(result.model.SerializeToString())


def test_a_split_into_single_channels_keeps_both() -> None:
    """The second channel is all that the second half has."""
    b = Builder()
    first, second = b.add("Split", b.conv("x", 3, 2), b.ints(1, 1), outputs=2, axis=1)
    x = b.add("Mul", first, b.conv(second, 1, 1, 1))
    y = b.conv(x, 1, 5)
    analysis, scores = analysed(b.model({"x": [1, 3, 4, 4]}, {y: [1, 5, 4, 4]}))
    decision = allocate(analysis, scores, FREE, {"macs": 0.1}, allow_miss=True)
    assert empty_axes(analysis, decision) == []


@pytest.mark.parametrize("multiple", [2, 3, 4, 8])
def test_grid_is_honoured(chain: onnx.ModelProto, multiple: int) -> None:
    analysis, scores = analysed(chain)
    for share in (0.9, 0.6, 0.4):
        decision = allocate(analysis, scores, grid(multiple), {"macs": share}, allow_miss=True)
        for left, size in kept_counts(analysis, decision):
            assert left % multiple == 0 or left == size


@pytest.mark.parametrize("seed", range(20))
def test_grid_is_honoured_on_every_producer(seed: int) -> None:
    """Also through concatenations, splits, groups and flattens."""
    multiple = 2
    before = {t.name: list(t.dims) for t in random_cnn(seed).graph.initializer}
    result = api.prune(
        random_cnn(seed), flops=0.3, round_to=multiple, min_channels=1, measure=False,
        allow_miss=True, criterion="l1", repair="none",
    )  # fmt: skip
    for node in result.model.graph.node:
        if node.op_type != "Conv":
            continue
        weight = next(t for t in result.model.graph.initializer if t.name == node.input[1])
        assert weight.dims[0] % multiple == 0 or weight.dims[0] == before[weight.name][0]


def test_a_head_counts_with_all_its_channels() -> None:
    """Heads of width 8 are on a grid of 8 whatever their number."""
    analysis, scores = analysed(attention(heads=4, width=8))
    decision = allocate(analysis, scores, grid(8), {"params": 0.8})
    assert decision.removed.any()
    result = shares(analysis, decision)
    assert result["params"] <= 0.8


@pytest.mark.parametrize("minimum", [1, 5, 12])
def test_minimum_is_honoured(chain: onnx.ModelProto, minimum: int) -> None:
    analysis, scores = analysed(chain)
    decision = allocate(analysis, scores, grid(1, minimum), {"macs": 1e-6}, allow_miss=True)
    assert [left for left, _ in kept_counts(analysis, decision)] == [minimum, minimum]


def test_a_coarse_grid_is_said(chain: onnx.ModelProto) -> None:
    analysis, scores = analysed(chain)
    decision = allocate(analysis, scores, grid(8), {"macs": 0.9})
    reached = shares(analysis, decision)["macs"]
    assert reached < 0.9 - 0.02
    assert any("macs" in note and "grid" in note for note in decision.notes)


def test_out_of_reach(chain: onnx.ModelProto) -> None:
    analysis, scores = analysed(chain)
    with pytest.raises(TargetError, match="reachable"):
        allocate(analysis, scores, FREE, {"macs": 1e-6})
    with pytest.raises(TargetError, match="params"):
        allocate(analysis, scores, FREE, {"macs": 0.5, "params": 1e-6})


def test_what_is_said_to_be_reachable_is(chain: onnx.ModelProto) -> None:
    analysis, scores = analysed(chain)
    least = min(reachable(analysis, "macs"))
    decision = allocate(analysis, scores, FREE, {"macs": least})
    assert shares(analysis, decision)["macs"] == least


def test_allow_miss_goes_as_far_as_it_can(chain: onnx.ModelProto) -> None:
    analysis, scores = analysed(chain)
    decision = allocate(analysis, scores, FREE, {"macs": 1e-6}, allow_miss=True)
    assert [left for left, _ in kept_counts(analysis, decision)] == [1, 1]
    assert any("missed" in note for note in decision.notes)


def test_nothing_prunable() -> None:
    b = Builder()
    y = b.add("MatMul", "x", b.weight(6, 5))
    analysis, scores = analysed(b.model({"x": [1, 6]}, {y: [1, 5]}))
    with pytest.raises(NothingPrunableError):
        allocate(analysis, scores, FREE, {"macs": 0.5})
    assert not allocate(analysis, scores, FREE, {"macs": 1.0}).removed.any()


def test_uniform_takes_equal_shares(chain: onnx.ModelProto) -> None:
    """Whatever the scores are: here one group's are a thousand times the other's."""
    analysis, scores = analysed(chain)
    scores = scores.copy()
    scores[analysis.coupling.groups[0].units] *= 1000
    decision = allocate(analysis, scores, FREE, {"macs": 0.5}, "uniform")
    left = [count / size for count, size in kept_counts(analysis, decision)]
    assert max(left) - min(left) <= 2 / 16  # one step each, and one that was given back


def test_global_takes_the_least_important(chain: onnx.ModelProto) -> None:
    analysis, scores = analysed(chain)
    scores = scores.copy()
    scores[analysis.coupling.groups[0].units] *= 1000
    counts = kept_counts(analysis, allocate(analysis, scores, FREE, {"macs": 0.7}, "global"))
    assert counts[0] == (16, 16)
    assert counts[1][0] < 16


def test_smaller_budget_never_keeps_more(chain: onnx.ModelProto) -> None:
    analysis, scores = analysed(chain)
    reached = [
        shares(analysis, allocate(analysis, scores, FREE, {"macs": share}))["macs"]
        for share in np.linspace(0.1, 1.0, 19)
    ]
    assert reached == sorted(reached)


def test_decision_obeys_law_3(chain: onnx.ModelProto) -> None:
    from graphprune.cut import cut

    analysis, scores = analysed(chain)
    alive = analysis.coupling.alive(allocate(analysis, scores, FREE, {"macs": 0.3}).removed)
    result, _ = cut(analysis.model, analysis.shapes, analysis.coupling, alive)
    feeds = random_inputs(analysis.model, analysis.shapes)
    parts = (analysis.model, result, analysis.shapes, analysis.coupling, alive, feeds)
    assert law_error(*parts) <= 1e-4


def test_scores_below_zero_rank_as_any_others(chain: onnx.ModelProto) -> None:
    """Standardised scores: the damage of what leaves grows with every step all the same."""
    analysis, scores = analysed(chain)
    counted = replace(analysis.cost, timed=lambda removed: float((~removed).sum()))
    analysis = replace(analysis, cost=counted)
    first = allocate(analysis, scores, FREE, {"latency": 0.5})
    lowered = allocate(analysis, scores - float(scores.mean()), FREE, {"latency": 0.5})
    for group in analysis.coupling.groups:
        gone = lowered.removed[group.units]
        assert gone.sum() == first.removed[group.units].sum()
        assert scores[group.units][gone].max() <= scores[group.units][~gone].min()


def test_what_is_given_back_comes_close_to_the_budget_of_many_groups() -> None:
    """The last step of a wide group overshoots by what thousands of narrow ones are worth."""
    groups, looks = 5000, 0

    def fits(levels: NDArray[np.int64]) -> bool:
        nonlocal looks
        looks += 1
        return int(levels[1:].sum()) >= 1000 and levels[0] == 1

    taken = [(group, 1) for group in range(1, groups)] + [(0, 1)]
    levels = _give_back(np.ones(groups, np.int64), taken, fits)
    assert levels[0] == 1 and int(levels[1:].sum()) == 1000
    assert levels[1] == 1 and levels[-1] == 0  # the most important come back first
    assert looks <= MOST_GIVEN_BACK


def test_what_is_reachable_is_a_share_of_little_too() -> None:
    """Milliseconds of a small model are below one."""
    analysis, scores = analysed(random_cnn(3))
    timed = replace(analysis.cost, timed=lambda removed: 0.4 - 0.1 * float(removed.mean()))
    with pytest.raises(TargetError, match=r"--target-latency 0\.1 \(reachable 0\.[0-9]+\)"):
        allocate(replace(analysis, cost=timed), scores, FREE, {"latency": 0.1})
