"""Heads fall out of the ties of every form of decomposed attention, leave, and are verified."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from attention_forms import FORMS, HEADS, SIZE, WIDTH, einsum_weights, net
from grouped_forms import GROUPED, KV, ONE_KV_HEAD, cached
from onnx import numpy_helper

from graphprune.analysis import Scope, pinned_reasons
from graphprune.api import prepare, prune
from graphprune.coupling import USUAL_UNITS


@pytest.mark.parametrize("name", [*FORMS, *ONE_KV_HEAD])
def test_half_of_the_heads_leave(name: str) -> None:
    source = net({**FORMS, **ONE_KV_HEAD}[name])
    groups = prepare(source).analysis.coupling.groups
    assert [len(group) for group in groups if len(group) != WIDTH] == [HEADS]
    result = prune(source, flops=0.6, round_to=1, fast=True, measure=False)
    assert result.verdict.passed


@pytest.mark.parametrize("name", GROUPED)
def test_a_kv_head_leaves_with_its_query_heads(name: str) -> None:
    source = net(GROUPED[name])
    assert [len(group) for group in prepare(source).analysis.coupling.groups] == [KV]
    result = prune(source, flops=0.6, round_to=1, min_channels=1, fast=True, measure=False)
    assert result.verdict.passed


@pytest.mark.parametrize(
    ("units", "sizes"), [(USUAL_UNITS, [HEADS]), (("channels", "head-dims"), [SIZE, SIZE])]
)
def test_weights_of_three_axes_lose_heads_or_positions(
    units: tuple[str, ...], sizes: list[int]
) -> None:
    source = net(einsum_weights)
    groups = prepare(source, Scope(units=units)).analysis.coupling.groups
    assert [len(group) for group in groups] == sizes
    told: dict[str, Any] = {
        "round_to": 1,
        "min_channels": 1,
        "fast": True,
        "measure": False,
        "units": units,
    }
    assert prune(source, flops=0.5, **told).verdict.passed


def test_a_cache_of_the_interface_leaves_query_heads() -> None:
    """KV heads are pinned; of their query heads the same positions leave everywhere."""
    source = net(cached)
    analysis = prepare(source).analysis
    assert [len(group) for group in analysis.coupling.groups] == [HEADS // KV]
    assert any("graph input 'past_k'" in row.reason for row in pinned_reasons(analysis))
    assert prune(source, flops=0.8, round_to=1, fast=True, measure=False).verdict.passed


LINEAR = """<ir_version: 8, opset_import: ["": 17]> g (float[1,8,4,4] x) => (float[1,5,4,4] y)
<int64[4] heads = {1, 4, 12, 16}, int64[3] three = {4, 4, 4}, int64[4] back = {1, 16, 4, 4}> {
    qkv = Conv(x, W)
    near = Conv<group=6>(qkv, U)
    both = Concat<axis=1>(qkv, near)
    parts = Reshape(both, heads)
    q, k, v = Split<axis=2>(parts, three)
    t = Transpose<perm=[0, 1, 3, 2]>(k)
    kv = MatMul(v, t)
    z = MatMul(kv, q)
    joined = Reshape(z, back)
    y = Conv(joined, V)
}"""


def test_grouped_convolutions_leave_in_the_groups_that_heads_are_made_of() -> None:
    """Linear attention on several scales: a head takes along three groups and another scale's head;
    the same positions of every group would take all heads at once."""
    model = onnx.parser.parse_model(LINEAR)
    rng = np.random.default_rng(0)
    for name, shape in {"W": (24, 8, 1, 1), "U": (24, 4, 1, 1), "V": (5, 16, 1, 1)}.items():
        weight = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(weight, name))
    assert [len(group) for group in prepare(model).analysis.coupling.groups] == [2]
    result = prune(model, flops=0.5, round_to=1, min_channels=1, fast=True, measure=False)
    assert result.verdict.passed
    assert result.after.macs <= 0.5 * result.before.macs
