"""Reasons for what stays add up to no more than all MACs."""

from __future__ import annotations

import pytest
from graphs import Builder

from graphprune import api
from graphprune.analysis import Scope, pinned_reasons


@pytest.mark.parametrize("way", ["forward", "bidirectional"])
@pytest.mark.parametrize("kind", ["LSTM", "RNN"])
def test_a_node_of_two_weights_counts_once(kind: str, way: str) -> None:
    b = Builder(11)
    directions, gates = 1 + (way == "bidirectional"), {"LSTM": 4, "RNN": 1}[kind]
    w, r = b.weight(directions, gates * 8, 6), b.weight(directions, gates * 8, 8)
    h = b.add(kind, "x", w, r, hidden_size=8, direction=way)
    model = b.model({"x": [7, 2, 6]}, {h: [7, directions, 2, 8]})
    analysis = api.prepare(model, Scope(protect=("*",))).analysis
    assert sum(row.macs for row in pinned_reasons(analysis)) == pytest.approx(1)
