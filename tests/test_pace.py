"""Latency budgets: of two measured plans that are as fast the one that gives up less wins."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from latency_forms import repeated, weights_in

from graphprune import api
from graphprune.analysis import analyse
from graphprune.errors import TargetError
from graphprune.latency.micro import Micro
from graphprune.latency.predict import Latency
from graphprune.options import Options
from graphprune.pace import NEAR_ENOUGH, WITHIN, paced
from graphprune.planning import damage, decide, judge
from graphprune.prepared import Prepared
from graphprune.study import study
from graphprune.tables import Table
from graphprune.targets import Target

SHARE = 0.6


class Moody:
    """A device whose pieces alone say little about the whole, which takes as long as its MACs."""

    key = "moody"

    def piece(self, micro: Micro) -> float:
        size = weights_in(micro.model)
        return size * float(np.random.default_rng(int(size) // 128).uniform(0.7, 1.3))

    def pair(self, first: Any, second: Any, feeds: Any) -> tuple[float, float]:
        before, after = (_macs(model) for model in (first, second))
        return before / 1e6, after / before


def _macs(model: Any) -> float:
    analysis = analyse(model)
    return analysis.cost.of(analysis.nothing_removed).macs


def timed_by(device: Any, prepared: Prepared) -> Prepared:
    latency = Latency(prepared.analysis, Target("free"), Table({}), device)
    cost = replace(prepared.analysis.cost, timed=latency)
    return replace(prepared, analysis=replace(prepared.analysis, cost=cost), latency=latency)


def test_a_plan_for_macs_wins_where_predictions_mislead() -> None:
    options = Options.of(latency=SHARE, samples=32, cache=False, round_to=1)
    prepared = timed_by(Moody(), api.prepare(repeated()))
    judged = judge(study(prepared, options), options)
    found = paced(prepared, judged, options)
    assert found.decision is not None
    assert found.ratio is not None
    assert abs(found.ratio / SHARE - 1) <= NEAR_ENOUGH
    by_macs = decide(prepared, judged, replace(options, latency=None, flops=SHARE))
    usual = damage(prepared, judged, by_macs.removed)
    assert damage(prepared, judged, found.decision.removed) <= usual * 1.01


class Gloomy(Moody):
    """A device whose pieces hardly get faster alone, while the whole does."""

    def piece(self, micro: Micro) -> float:
        return 100.0 + 0.001 * weights_in(micro.model)


def test_a_plan_is_measured_before_it_is_called_out_of_reach() -> None:
    options = Options.of(latency=SHARE, fast=True, cache=False, round_to=1)
    prepared = timed_by(Gloomy(), api.prepare(repeated()))
    found = paced(prepared, judge(study(prepared, options), options), options)
    assert found.decision is not None
    assert found.ratio is not None
    assert abs(found.ratio / SHARE - 1) <= WITHIN
    assert not found.decision.notes  # of a model that takes less than a millisecond too


def test_what_is_measured_to_miss_too_is_said_so() -> None:
    options = Options.of(latency=1e-4, fast=True, cache=False)
    prepared = timed_by(Gloomy(), api.prepare(repeated()))
    with pytest.raises(TargetError, match="measured with all that may leave removed"):
        paced(prepared, judge(study(prepared, options), options), options)
