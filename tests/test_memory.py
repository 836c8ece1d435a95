"""Peak activation memory: lifetimes worked by hand, exact under removal, and a budget on it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from graphs import Builder
from hypothesis import given
from hypothesis import strategies as st

from graphprune import api
from graphprune.analysis import Analysis
from graphprune.budget import Decision, allocate
from graphprune.criteria import Scoring, score
from graphprune.errors import TargetError, UsageError
from graphprune.liveness import Buffers
from graphprune.runtime import random_inputs
from graphprune.targets import Target

Run = Callable[..., Any]
FREE = Target("free")
KIB = 1024  # [1, 4, 8, 8] of float32; the models here count in these


def analysed(model: onnx.ModelProto) -> Analysis:
    return api.prepare(model).analysis


def live(model: onnx.ModelProto) -> list[float]:
    """KiB in use before the first node and at each node."""
    analysis = analysed(model)
    return [value / KIB for value in analysis.cost.live(analysis.nothing_removed)]


def pictures(b: Builder, y: str, channels: int = 4) -> onnx.ModelProto:
    """[1, 4, 8, 8] → [1, channels, 8, 8]."""
    return b.model({"x": [1, 4, 8, 8]}, {y: [1, channels, 8, 8]})


def test_a_chain() -> None:
    """The input (1) is always there; each Conv holds what it reads and what it writes."""
    b = Builder()
    y = b.conv(b.conv(b.conv("x", 4, 8), 8, 12), 12, 4)
    assert live(pictures(b, y)) == [1, 1 + 2, 1 + 2 + 3, 1 + 3 + 1]


def test_pointwise_operators_write_over_what_ends_there() -> None:
    b = Builder()
    x = b.add("Sigmoid", b.add("Relu", b.conv("x", 4, 8)))
    x = b.add("Add", x, b.weight(8, 1, 1))
    y = b.conv(b.norm(x, 8), 8, 4)
    assert live(pictures(b, y)) == [1, 3, 3, 3, 3, 3, 1 + 2 + 1]


def test_a_skip_is_held_and_then_written_over() -> None:
    """The first operand of Add ends there; the second one's memory is free afterwards."""
    b = Builder()
    a = b.conv("x", 4, 8)
    other = b.add("GlobalMaxPool", b.add("MaxPool", a, kernel_shape=[1, 1]))
    a = b.add("MaxPool", a, kernel_shape=[1, 1])
    y = b.conv(b.add("Add", a, other), 8, 4)
    small = 8 * 4 / KIB
    assert live(pictures(b, y)) == [1, 3, 5, 5 + small, 5 + small, 3 + small, 1 + 2 + 1]


def test_a_convolution_adds_in_place() -> None:
    """To what is there and ends with the sum, through a BatchNormalization too."""
    b = Builder()
    a = b.add("Relu", b.conv("x", 4, 8))
    a = b.add("Add", a, b.norm(b.conv(b.conv(a, 8, 4), 4, 8), 8))
    y = b.conv(a, 8, 4)
    assert live(pictures(b, y)) == [1, 3, 3, 4, 4, 3, 3, 4]


def test_a_convolution_does_not_add_to_what_is_read_elsewhere() -> None:
    b = Builder()
    a = b.conv("x", 4, 8)
    other = b.conv(a, 8, 8)
    y = b.conv(b.add("Mul", a, b.add("Add", a, other)), 8, 4)
    assert live(pictures(b, y)) == [1, 3, 5, 5, 5, 4]


def test_what_is_read_again_is_not_written_over() -> None:
    """x·sigmoid(x): the Sigmoid needs memory of its own, the Mul does not."""
    b = Builder()
    x = b.conv("x", 4, 8)
    x = b.add("Mul", x, b.add("Sigmoid", x))
    y = b.conv(x, 8, 4)
    assert live(pictures(b, y)) == [1, 3, 5, 5, 4]


def test_the_callers_memory_is_not_written_over() -> None:
    """Relu of the graph input, and into the graph output."""
    b = Builder()
    y = b.add("Relu", b.add("Sigmoid", b.add("Relu", "x")))
    assert live(pictures(b, y)) == [1, 2, 2, 3]


def test_an_operand_that_stretches_is_not_written_over() -> None:
    b = Builder()
    x = b.conv("x", 4, 8)
    pooled = b.add("GlobalAveragePool", x)
    x = b.add("Mul", b.add("Sigmoid", pooled), x)
    y = b.conv(x, 8, 4)
    small = 8 * 4 / KIB
    assert live(pictures(b, y)) == [1, 3, 3 + small, 3 + small, 3 + small, 4]


def test_views_share_memory() -> None:
    """Reshape, Unsqueeze, Squeeze, Identity and Flatten cost nothing; Transpose does."""
    b = Builder()
    x = b.conv("x", 4, 8)
    x = b.add("Reshape", x, b.ints(1, 8, 64))
    x = b.add("Squeeze", b.add("Unsqueeze", x, b.ints(0)), b.ints(0))
    x = b.add("Identity", x)
    x = b.add("Transpose", x, perm=[0, 2, 1])
    y = b.add("MatMul", b.add("Flatten", x), b.weight(512, 64))
    model = b.model({"x": [1, 4, 8, 8]}, {y: [1, 64]})
    assert live(model) == [1, 3, 3, 3, 3, 3, 5, 3, 3 + 0.25]


def test_a_view_keeps_its_source_in_use() -> None:
    """The Relu may not write over the Conv's output while the reshaped name is still to be read."""
    b = Builder()
    x = b.conv("x", 4, 8)
    flat = b.add("Reshape", x, b.ints(1, 8, 64))
    x = b.conv(b.add("Relu", x), 8, 4)
    y = b.add("Add", b.add("Reshape", x, b.ints(1, 4, 64)), b.add("ReduceMax", flat, axes=[1]))
    model = b.model({"x": [1, 4, 8, 8]}, {y: [1, 4, 64]})
    row = 64 * 4 / KIB
    assert live(model) == [1, 3, 3, 5, 6, 4, 4 + row, 1 + 1 + row + 1]


def test_element_types_count() -> None:
    """A cast to half the width cannot stay where it was."""
    b = Builder()
    x = b.add("Cast", b.conv("x", 4, 8), to=onnx.TensorProto.FLOAT16)
    x = b.add("Cast", b.add("Relu", x), to=onnx.TensorProto.FLOAT)
    y = b.conv(x, 8, 4)
    assert live(pictures(b, y)) == [1, 3, 4, 2, 4, 4]


def test_weights_do_not_count() -> None:
    """Nor does what is computed from weights alone."""
    b = Builder()
    weight = b.add("Transpose", b.weight(8, 3, 3, 4), perm=[0, 3, 1, 2])
    y = b.add("Conv", b.add("Conv", "x", weight, pads=[1] * 4), b.weight(4, 8, 1, 1))
    assert live(pictures(b, y)) == [1, 1, 3, 4]


def test_a_body_counts() -> None:
    """Of an If each branch's result is there beside the If's own, which is the graph output."""
    text = """<ir_version: 8, opset_import: ["": 17]>
    g (float[1,4,8,8] x, bool c) => (float[1,4,8,8] y) {
        y = If (c) <then_branch = t () => (float[1,4,8,8] a) { a = Relu(x) },
                    else_branch = e () => (float[1,4,8,8] b) { b = Exp(x) }>
    }"""
    assert max(live(onnx.parser.parse_model(text))) == 4 + 1 / KIB


def two_stages() -> onnx.ModelProto:
    """Two wide activations of the same size, one after the other: each is the peak."""
    b = Builder(3)
    x = b.conv("x", 4, 32)
    x = b.conv(b.add("Relu", x), 32, 4)
    x = b.conv(x, 4, 32)
    x = b.conv(b.add("Relu", x), 32, 4)
    y = b.conv(b.add("Relu", b.conv(x, 4, 8)), 8, 4)
    return pictures(b, y)


def test_marginal_and_reach_are_those_of_the_peak() -> None:
    """Only the first wide group (32 of 1 + 8 + 1 KiB) is in use where the peak first is."""
    b = Builder()
    x = b.conv(b.add("Relu", b.conv("x", 4, 32)), 32, 8)
    y = b.conv(x, 8, 4)
    analysis = analysed(pictures(b, y))
    wide, narrow = analysis.coupling.groups
    saved = analysis.cost.marginal("memory")
    assert saved[wide.units] == pytest.approx(256)  # a channel's 8 · 8 floats
    assert saved[narrow.units] == pytest.approx(256)
    assert analysis.cost.in_reach("memory") == pytest.approx(10 / 11)
    assert analysis.cost.of(analysis.nothing_removed).memory == 11 * KIB


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12))
def test_the_fullest_steps_hold_every_maximum(spans: list[tuple[int, int]]) -> None:
    """Whatever the sizes are, also where only one buffer has any."""
    first, last = np.array([sorted(span) for span in spans]).T
    made = Buffers(("t",) * len(spans), np.ones(len(spans)), first, last, 10)
    rng = np.random.default_rng(len(spans))
    for sizes in (*np.eye(len(spans)), *rng.random((20, len(spans)))):
        live = made.live(sizes)
        assert live[made.fullest].max() == live.max()
    sets = [frozenset(np.flatnonzero((first <= s) & (s <= last))) for s in made.fullest]
    assert not any(a <= b for a in sets for b in sets if a is not b)


def test_units_in_use_above_a_limit() -> None:
    analysis = analysed(two_stages())
    groups = analysis.coupling.groups
    used = analysis.cost.in_use_above(0.5 * 10 * KIB)
    assert [bool(used[g.units].all()) for g in groups] == [True, True, True, True, False]


def decided(share: float, curves: bool, target: Target = FREE, **more: float) -> tuple[Any, ...]:
    analysis = analysed(two_stages())
    criterion = api.registry().criterion("l1")
    scores = score(analysis.model, analysis.coupling, criterion, Scoring())
    lines = {g.index: np.linspace(0, 1, len(g) + 1) ** 2 for g in analysis.coupling.groups}
    budgets = {"memory": share} | more
    decision = allocate(analysis, scores, target, budgets, curves=lines if curves else None)
    return analysis, decision


def left(analysis: Analysis, decision: Decision) -> list[int]:
    return [int((~decision.removed[g.units]).sum()) for g in analysis.coupling.groups]


@pytest.mark.parametrize("curves", [False, True])
@pytest.mark.parametrize("share", [0.9, 0.6, 0.4])
def test_a_budget_is_met_and_nothing_is_removed_in_vain(share: float, curves: bool) -> None:
    analysis, decision = decided(share, curves)
    before = analysis.cost.of(analysis.nothing_removed).memory
    after = analysis.cost.of(decision.removed).memory
    assert share - 0.05 <= after / before <= share  # a channel is 0.025 of it
    assert left(analysis, decision)[-1] == 8  # never near the peak


def test_every_step_above_the_budget_is_its_own_constraint() -> None:
    """No group alone lowers the maximum of two equal peaks; the solved plan still lowers both, and
    by widths alone: the narrow groups beside them hold less and cost more."""
    analysis, decision = decided(0.5, curves=True)
    first, second, third, fourth, last = left(analysis, decision)
    assert first == third < 32
    assert (second, fourth, last) == (4, 4, 8)


@pytest.mark.parametrize("curves", [False, True])
def test_together_with_other_budgets(curves: bool) -> None:
    analysis, decision = decided(0.6, curves, macs=0.5, params=0.7)
    before = analysis.cost.of(analysis.nothing_removed)
    after = analysis.cost.of(decision.removed)
    for kind, share in {"memory": 0.6, "macs": 0.5, "params": 0.7}.items():
        assert after.of(kind) <= share * before.of(kind)


def test_a_whole_budget_removes_nothing() -> None:
    for curves in (False, True):
        assert not decided(1.0, curves)[1].removed.any()


def test_out_of_reach() -> None:
    """Input, output and a channel between them stay."""
    with pytest.raises(TargetError, match=r"--target-memory 0\.1 \(reachable 0\.2"):
        decided(0.1, curves=False)


def test_on_the_command_line(run: Run, resnet: Path, tmp_path: Path) -> None:
    from command_line import read_json

    ran = run(
        resnet, "--target-memory", 0.6, "--fast", "--round-to", 1, "--no-measure", "--json",
        "-o", tmp_path / "out.onnx",
    )  # fmt: skip
    assert ran.code == 0
    document = read_json(ran.out)
    assert document["after"]["memory"] / document["before"]["memory"] <= 0.6
    assert document["ratio"]["memory"] == pytest.approx(0.6, abs=0.02)
    assert document["options"]["budgets"] == {"memory": 0.6}
    assert "activations at once" in ran.err
    again = analysed(onnx.load(tmp_path / "out.onnx"))
    assert again.cost.of(again.nothing_removed).memory == document["after"]["memory"]


def test_python_door(resnet: Path) -> None:
    result = api.prune(resnet, peak_memory=0.7, fast=True, round_to=1, measure=False)
    assert 0.66 <= result.after.memory / result.before.memory <= 0.7
    with pytest.raises(UsageError, match="memory budget"):
        api.prune(resnet, peak_memory=1.5, fast=True)


def runtime_peak(model: onnx.ModelProto, folder: Path) -> float:
    """Bytes that ONNX Runtime asks for at most in one inference, by its profiler, and the inputs'.

    Without a memory pattern, which would take all at once.
    """
    options = ort.SessionOptions()
    options.enable_profiling, options.enable_mem_pattern = True, False
    options.intra_op_num_threads = 1
    options.profile_file_prefix = str(folder / "profile")
    runner = ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    prepared = api.prepare(model)
    feeds = random_inputs(prepared.original, prepared.analysis.shapes)
    runner.run(None, feeds)
    events = json.loads(Path(runner.end_profiling()).read_text())
    steps = [e["args"] for e in events if "mem_bytes_requested_in_use" in e.get("args", {})]
    used = [int(step["mem_bytes_requested_in_use"]) for step in steps]
    before = used[0] - int(steps[0]["mem_requested_in_use_delta"])
    return max(used) - before + sum(array.nbytes for array in feeds.values())


@pytest.mark.parametrize("share", [1.0, 0.6])
def test_as_onnx_runtime_asks_for_it(resnet: Path, tmp_path: Path, share: float) -> None:
    """A residual network: to a hundredth, before and after (here to the byte)."""
    result = api.prune(
        resnet, peak_memory=share, fast=True, repair="none", measure=False, round_to=16
    )
    assert runtime_peak(result.model, tmp_path) == pytest.approx(result.after.memory, rel=0.01)
