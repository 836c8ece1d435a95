"""Experts leave with their place in the router, as if their logits were very low."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from expert_forms import EXPERTS, LEAVE, STAY, TOKENS, WIDTH, added, top_two
from onnx import helper, numpy_helper

from graphprune import api
from graphprune.analysis import Scope, pinned_reasons
from graphprune.check import check_rule
from graphprune.errors import UsageError
from graphprune.rules import BUILTIN, relate
from graphprune.rules.op import Op, RefusedError
from graphprune.runtime import opened
from graphprune.shapes import infer
from graphprune.storage import load

OPTIONS: dict[str, Any] = {"units": ("experts",), "measure": False, "repair": "none"}
LOW = -1e30


@pytest.mark.parametrize("name", LEAVE)
def test_law(name: str) -> None:
    form, taken = LEAVE[name]
    checked = check_rule(form(), units=("experts",))
    assert checked.passed, checked.pinned
    analysis = api.prepare(form(), Scope(units=("experts",))).analysis
    assert [len(group) for group in analysis.coupling.groups] == [EXPERTS]
    assert list(analysis.coupling.fewest.values()) == [taken]


@pytest.mark.parametrize("name", LEAVE)
def test_removed_is_a_very_low_logit(name: str) -> None:
    """Against the original with the router's bias lowered for those that left."""
    form, taken = LEAVE[name]
    model = form()
    result = api.prune(model, params=0.01, allow_miss=True, criterion="l1", **OPTIONS)
    group = next(group for group in result.plan.groups)
    assert len(group.removed) == EXPERTS - taken
    masked = onnx.ModelProto()
    masked.CopyFrom(model)
    for tensor in masked.graph.initializer:
        if tensor.name == "c1":  # the router's bias
            bias = numpy_helper.to_array(tensor).copy()
            bias[list(group.removed)] = LOW
            tensor.CopyFrom(numpy_helper.from_array(bias, tensor.name))
    feeds = {"x": np.random.default_rng(0).standard_normal((TOKENS, WIDTH)).astype(np.float32)}
    wanted, got = (opened(load(m))(feeds)[0] for m in (masked, result.model))
    if name != "three, biased":  # whose Sigmoid ends the lowness: the law takes TopK's own input
        assert np.allclose(wanted, got, atol=1e-5)


@pytest.mark.parametrize("name", STAY)
def test_what_cannot_leave_says_why(name: str) -> None:
    form, reason = STAY[name]
    analysis = api.prepare(form(), Scope(units=("channels", "experts"))).analysis
    assert any(pin.reason == reason for pin in analysis.coupling.pins)
    assert not any(len(group) == EXPERTS for group in analysis.coupling.groups)


@pytest.mark.parametrize("name", LEAVE)
def test_they_stay_unless_asked_for(name: str) -> None:
    """By default channels inside experts leave, and experts are said to be held."""
    form, _ = LEAVE[name]
    prepared = api.prepare(form())
    groups = prepared.analysis.coupling.groups
    assert not any(len(group) == EXPERTS for group in groups)
    if name != "fused, 4 bits":  # whose bytes hold several positions each
        assert check_rule(form()).passed
    held = "\n".join(pin.reason for pin in pinned_reasons(prepared.analysis))
    assert "experts are not among the --units" in held or "takes statistics" in held


def test_channels_and_experts_in_one_plan() -> None:
    model = top_two()
    options = {**OPTIONS, "units": ("channels", "experts")}
    result = api.prune(model, params=0.4, criterion="l1", round_to=1, min_channels=1, **options)
    assert result.verdict.passed
    again = api.apply(model, result.plan)
    assert again.model.SerializeToString() == result.model.SerializeToString()
    assert sum(bool(group.removed) for group in result.plan.groups) == 2


def test_a_plan_or_masks_that_leave_less_than_is_taken(tmp_path: Path) -> None:
    model = top_two()
    mask = np.ones((EXPERTS, WIDTH))
    mask[1:] = 0
    np.savez(tmp_path / "masks.npz", c0=mask)
    with pytest.raises(UsageError, match="an operator takes more"):
        api.prune(model, masks=tmp_path / "masks.npz", **OPTIONS)
    mask[4] = 1
    np.savez(tmp_path / "masks.npz", c0=mask)
    result = api.prune(model, masks=tmp_path / "masks.npz", **OPTIONS)
    assert [group.removed for group in result.plan.groups] == [(1, 2, 3, 5)]


def test_an_unknown_number_of_taken_experts_pins() -> None:
    model = top_two()
    value = helper.make_tensor_value_info("k", onnx.TensorProto.INT64, [1])
    model.graph.input.append(value)
    node = next(node for node in model.graph.node if node.op_type == "TopK")
    node.input[1] = "k"
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    analysis = api.prepare(model, Scope(units=("experts",))).analysis
    assert not analysis.coupling.groups
    reasons = [pin.reason for pin in analysis.coupling.pins]
    assert "TopK: how many are taken is not known before run time" in reasons


@pytest.mark.parametrize("name", LEAVE)
def test_who_is_seldom_taken_leaves_first(name: str) -> None:
    """On calibration inputs: two experts have next to no share, and weights as large as all."""
    model = LEAVE[name][0]()
    for tensor in model.graph.initializer:
        if tensor.name == "c1":
            bias = numpy_helper.to_array(tensor).copy()
            bias[[1, 4]] -= 8
            tensor.CopyFrom(numpy_helper.from_array(bias, tensor.name))
    options = {**OPTIONS, "samples": 64, "cache": False}
    result = api.prune(model, params=0.76, **options)
    group = next(group for group in result.plan.groups)
    kept = [score for i, score in enumerate(group.scores) if i not in group.removed]
    assert max(group.scores[1], group.scores[4]) < 1e-3 * sum(group.scores)
    assert max(group.scores[i] for i in group.removed) <= min(kept)


@pytest.mark.parametrize("name", [name for name in LEAVE if name.startswith("apart")])
def test_branches_leave_with_all_their_weights(name: str) -> None:
    """Repaired, beside channels; the plan makes the same model again."""
    model = LEAVE[name][0]()
    options = {"units": ("channels", "experts"), "round_to": 1, "min_channels": 1, "cache": False}
    result = api.prune(model, params=0.4, samples=32, measure=False, **options)
    gone = max(len(group.removed) for group in result.plan.groups if len(group.scores) == EXPERTS)
    products = [node for node in result.model.graph.node if node.op_type == "MatMul"]
    assert gone
    assert len(products) == 2 * (EXPERTS - gone)
    assert 0.3 < result.after.params / result.before.params <= 0.4
    stored = sum(
        numpy_helper.to_array(t).size for t in result.model.graph.initializer if t.data_type == 1
    )
    assert result.after.params == stored
    again = api.apply(model, result.plan)
    assert again.model.SerializeToString() == result.model.SerializeToString()


def test_branches_are_blocks_and_experts_at_once() -> None:
    options = {"units": ("channels", "experts", "blocks"), "cache": False, "measure": False}
    result = api.prune(added(residual=True), params=0.3, samples=32, **options, allow_miss=True)
    assert result.verdict.passed


def test_calibrated_and_repaired() -> None:
    """The whole program, with inputs."""
    result = api.prune(top_two(), params=0.7, units=("experts",), measure=False, samples=16)
    assert result.verdict.passed
    assert any(group.removed for group in result.plan.groups)


def test_who_is_refused_has_looked_nothing_up() -> None:
    """The other readers of the numbers still have."""

    def half_way(op: Op) -> None:
        BUILTIN["", "Gather"](op)
        raise RefusedError("after it has spoken")

    model = load(top_two())
    shapes = infer(model)
    sound = relate(model, shapes)
    refused = relate(model, shapes, {**BUILTIN, ("", "Gather"): half_way})
    gathers = {i for i, node in enumerate(model.nodes) if node.op_type == "Gather"}
    assert sound.looked_up - refused.looked_up == {(i, 1) for i in gathers}
    assert refused.looked_up
    assert any("read as numbers" in pin.reason for pin in refused.pins)
