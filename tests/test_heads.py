"""Heads fall out of the ties of every form of decomposed attention, leave, and are verified."""

from __future__ import annotations

import pytest
from attention_forms import FORMS, HEADS, SIZE, WIDTH, einsum_weights, net
from grouped_forms import GROUPED, KV, ONE_KV_HEAD, cached

from graphprune.analysis import pinned_reasons
from graphprune.api import prepare, prune


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


def test_weights_of_three_axes_lose_heads_and_positions() -> None:
    source = net(einsum_weights)
    groups = prepare(source).analysis.coupling.groups
    assert [len(group) for group in groups] == [HEADS, SIZE, SIZE]
    result = prune(source, flops=0.5, round_to=1, min_channels=1, fast=True, measure=False)
    assert result.verdict.passed


def test_a_cache_of_the_interface_leaves_query_heads() -> None:
    """KV heads are pinned; of their query heads the same positions leave everywhere."""
    source = net(cached)
    analysis = prepare(source).analysis
    assert [len(group) for group in analysis.coupling.groups] == [HEADS // KV]
    assert any("graph input 'past_k'" in row.reason for row in pinned_reasons(analysis))
    assert prune(source, flops=0.8, round_to=1, fast=True, measure=False).verdict.passed
