"""Law 3 as a property of random networks, and the cost model against a fresh count."""

from __future__ import annotations

import numpy as np
from graphs import random_cnn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graphprune.analysis import Analysis, analyse
from graphprune.api import prepare
from graphprune.coupling import Mask
from graphprune.cut import cut
from graphprune.oracle import law_error
from graphprune.runtime import random_inputs
from graphprune.storage import load


def random_removal(analysis: Analysis, seed: int) -> Mask:
    """Any units, as long as no axis is emptied."""
    rng = np.random.default_rng(seed)
    coupling = analysis.coupling
    axes = [axis.slots for axis in coupling.relations.slots.axes if len(axis)]
    removed = np.zeros(coupling.n_units, dtype=bool)
    for unit in rng.permutation(coupling.n_units)[: rng.integers(0, coupling.n_units + 1)]:
        removed[unit] = True
        alive = coupling.alive(removed)
        if not all(alive[slots].any() for slots in axes):
            removed[unit] = False
    return removed


@settings(
    max_examples=500, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(st.integers(0, 2**32 - 1))
def test_cut_equals_zeroed(seed: int) -> None:
    analysis = prepare(random_cnn(seed)).analysis
    assert analysis.coupling.n_units
    removed = random_removal(analysis, seed)
    alive = analysis.coupling.alive(removed)
    result, _ = cut(analysis.model, analysis.shapes, analysis.coupling, alive)
    feeds = random_inputs(analysis.model, analysis.shapes, seed)
    error = law_error(analysis.model, result, analysis.shapes, analysis.coupling, alive, feeds)
    assert error <= 1e-4
    again = analyse(load(result.assemble()))
    predicted = analysis.cost.of(removed)
    counted = again.cost.of(again.nothing_removed)
    assert (predicted.macs, predicted.params) == (counted.macs, counted.params)
    assert predicted.memory == counted.memory
