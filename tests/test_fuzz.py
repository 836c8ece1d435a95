"""Mutated models, each in a process of its own; `tools/fuzz.py` tries thousands."""

from __future__ import annotations

import sys

import pytest
from fence import run_mutated, warm

MODELS = 150
PARTS = 5


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
@pytest.mark.parametrize("part", range(PARTS))
def test_mutated_models(part: int) -> None:
    """None crashes, hangs, writes elsewhere or leaves half a file."""
    warm()
    outcomes = [run_mutated(seed) for seed in range(part, MODELS, PARTS)]
    faults = [f"seed {o.seed}: {o.fault} [{o.kinds}]\n{o.said}" for o in outcomes if o.fault]
    assert not faults, "\n".join(faults)
