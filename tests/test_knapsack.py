"""Allocation: the knapsack against an exhaustive search of small instances."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
import scipy.optimize

from graphprune import knapsack as under_test
from graphprune.knapsack import Levels, Values, solve

Costs = Callable[[Levels], Mapping[str, float]]


def separable(tables: Mapping[str, Sequence[Values]]) -> Costs:
    """Costs that are sums over groups."""
    return lambda levels: {
        kind: float(sum(t[k] for t, k in zip(table, levels, strict=True)))
        for kind, table in tables.items()
    }


def falling(rng: np.random.Generator, levels: int) -> Values:
    return np.sort(rng.random(levels))[::-1] * 10


def rising(rng: np.random.Generator, levels: int) -> Values:
    return np.concatenate([[0], np.cumsum(rng.random(levels - 1) ** 2)])


def total(distortions: Sequence[Values], levels: Sequence[int]) -> float:
    return float(sum(d[k] for d, k in zip(distortions, levels, strict=True)))


def fits(costs: Costs, limits: Mapping[str, float], levels: Sequence[int]) -> bool:
    found = costs(np.array(levels, np.int64))
    return all(found[kind] <= limit * (1 + 1e-12) for kind, limit in limits.items())


def exhaustive(distortions: Sequence[Values], costs: Costs, limits: Mapping[str, float]) -> float:
    """The least distortion of all choices that fit."""
    choices = product(*(range(len(d)) for d in distortions))
    return min(total(distortions, c) for c in choices if fits(costs, limits, c))


def last(distortions: Sequence[Values]) -> Levels:
    return np.array([len(d) - 1 for d in distortions], np.int64)


@pytest.mark.parametrize("seed", range(12))
def test_the_optimum_of_separable_costs(seed: int) -> None:
    """Five groups of two to six levels, one to three budgets at once."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 7, 5)
    distortions = [rising(rng, n) for n in sizes]
    kinds = ["macs", "params", "bytes"][: 1 + seed % 3]
    costs = separable({kind: [falling(rng, n) for n in sizes] for kind in kinds})
    whole, least = costs(np.zeros(5, np.int64)), costs(last(distortions))
    limits = {k: least[k] + rng.uniform(0.2, 0.8) * (whole[k] - least[k]) for k in kinds}
    found = solve(distortions, costs, limits, last(distortions))
    assert fits(costs, limits, found.tolist())
    best = exhaustive(distortions, costs, limits)
    assert total(distortions, found.tolist()) == pytest.approx(best, rel=2e-4)


@pytest.mark.parametrize("seed", range(6))
def test_products_of_sizes_end_near_the_optimum(seed: int) -> None:
    """Layers in a chain: a layer costs what it reads times what it makes. The start is, as that of
    a ranking is, near what fits."""
    rng = np.random.default_rng(seed)
    steps = np.sort(rng.random((4, 5)) * rng.random((4, 1)))
    distortions = [np.concatenate([[0], np.cumsum(row)]) for row in steps]
    widths = rng.integers(2, 9, 4) * 6

    def costs(levels: Levels) -> Mapping[str, float]:
        kept = np.concatenate([[8], widths * (1 - levels / 6), [10]])
        return {"macs": float((kept[1:] * kept[:-1]).sum())}

    limits = {"macs": 0.5 * costs(np.zeros(4, np.int64))["macs"]}
    start = next(np.full(4, k) for k in range(6) if fits(costs, limits, [k] * 4))
    found = solve(distortions, costs, limits, start)
    assert fits(costs, limits, found.tolist())
    best = exhaustive(distortions, costs, limits)
    assert total(distortions, found.tolist()) <= 1.15 * best


def test_more_levels_than_are_probed() -> None:
    """Between the levels at which costs are evaluated they are near a line."""
    rng = np.random.default_rng(0)
    distortions = [rising(rng, 40) for _ in range(3)]
    tables = [np.linspace(10, 0, 40) ** 1.2 for _ in range(3)]
    costs = separable({"macs": tables})
    limits = {"macs": 20.0}
    found = solve(distortions, costs, limits, last(distortions))
    assert fits(costs, limits, found.tolist())
    choices = product(*(range(40) for _ in range(3)))
    table = np.array(
        [
            [total(distortions, c), sum(t[k] for t, k in zip(tables, c, strict=True))]
            for c in choices
        ]
    )
    best = table[table[:, 1] <= 20, 0].min()
    assert total(distortions, found.tolist()) <= 1.1 * best + 1e-9


def test_nothing_leaves_where_everything_fits() -> None:
    rng = np.random.default_rng(0)
    distortions = [rising(rng, 5) for _ in range(3)]
    costs = separable({"macs": [falling(rng, 5) for _ in range(3)]})
    limits = {"macs": costs(np.zeros(3, np.int64))["macs"]}
    assert solve(distortions, costs, limits, last(distortions)).tolist() == [0, 0, 0]


def test_monotone_in_the_budget() -> None:
    rng = np.random.default_rng(1)
    distortions = [rising(rng, 7) for _ in range(5)]
    costs = separable({"macs": [falling(rng, 7) for _ in range(5)]})
    whole, least = costs(np.zeros(5, np.int64))["macs"], costs(last(distortions))["macs"]
    found = []
    for share in (0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 1.0):
        limits = {"macs": least + share * (whole - least)}
        levels = solve(distortions, costs, limits, last(distortions))
        assert fits(costs, limits, levels.tolist())
        found.append(total(distortions, levels.tolist()))
    assert all(b <= a * (1 + 1e-3) for a, b in pairwise(found))
    assert found[-1] == 0


def test_a_fit_is_returned_where_the_linear_view_sees_none() -> None:
    """Each group alone saves almost nothing; only all of them together do."""
    distortions = [np.array([0.0, 1.0])] * 3

    def costs(levels: Levels) -> Mapping[str, float]:
        return {"macs": 0.0 if levels.sum() == 3 else 10.0 - 0.01 * float(levels.sum())}

    start = np.ones(3, np.int64)
    found = solve(distortions, costs, {"macs": 5.0}, start)
    assert fits(costs, {"macs": 5.0}, found.tolist())


def test_costs_that_mislead_still_end_in_a_fit() -> None:
    """Together two groups save less than each says alone."""
    distortions = [np.array([0.0, 1, 2, 3])] * 3

    def costs(levels: Levels) -> Mapping[str, float]:
        saved = np.sort(levels.astype(float))[::-1]
        return {"macs": 9.0 - float(saved @ [1.0, 0.4, 0.2])}

    for limit in (8.0, 6.5, 5.0, 4.2):
        found = solve(distortions, costs, {"macs": limit}, np.full(3, 3))
        assert fits(costs, {"macs": limit}, found.tolist()), limit


def test_never_worse_than_the_start() -> None:
    """The start fits already; what is returned distorts no more than it."""
    for seed in range(30):
        rng = np.random.default_rng(seed)
        distortions = [rising(rng, 5) for _ in range(4)]
        widths = rng.integers(2, 9, 4) * 4.0
        mixing = rng.random((4, 4))

        def costs(
            levels: Levels, widths: Values = widths, mixing: Values = mixing
        ) -> dict[str, float]:
            kept = widths * (1 - levels / 5) ** 2
            return {"macs": float(kept @ mixing @ kept)}

        limits = {"macs": 0.3 * costs(np.zeros(4, np.int64))["macs"]}
        options = [c for c in product(range(5), repeat=4) if fits(costs, limits, c)]
        start = np.array(min(options, key=lambda c: total(distortions, c)))
        found = solve(distortions, costs, limits, start)
        assert fits(costs, limits, found.tolist())
        assert total(distortions, found.tolist()) <= total(distortions, start.tolist()) + 1e-9, seed


def test_flat_curves_and_a_lone_group() -> None:
    flat = [np.zeros(4), np.zeros(4)]
    costs = separable({"macs": [np.array([3.0, 2, 1, 0])] * 2})
    assert fits(costs, {"macs": 3.0}, solve(flat, costs, {"macs": 3.0}, np.full(2, 3)).tolist())
    one = [np.array([0.0, 1, 5, 9])]
    lone = separable({"macs": [np.array([3.0, 2, 1, 0])]})
    assert solve(one, lone, {"macs": 1.5}, np.array([3])).tolist() == [2]


def test_a_group_that_cannot_lose_anything() -> None:
    distortions = [np.zeros(1), np.array([0.0, 1, 2])]
    costs = separable({"macs": [np.array([5.0]), np.array([4.0, 2, 0])]})
    assert solve(distortions, costs, {"macs": 7.0}, np.array([0, 2])).tolist() == [0, 1]


def test_the_same_twice() -> None:
    rng = np.random.default_rng(4)
    distortions = [rising(rng, 6) for _ in range(5)]
    costs = separable({"macs": [falling(rng, 6) for _ in range(5)]})
    limits = {"macs": 0.4 * costs(np.zeros(5, np.int64))["macs"]}
    first, again = (solve(distortions, costs, limits, last(distortions)) for _ in range(2))
    assert first.tolist() == again.tolist()


def test_what_the_solver_prints_is_not_heard(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Native code writes past Python's stdout, and later than one would think."""
    real = under_test.milp

    def talkative(*given: Any, **options: Any) -> Any:
        ctypes.CDLL(None).puts(b"solving")
        return real(*given, **options)

    monkeypatch.setattr(under_test, "milp", talkative)
    curve = np.array([0.0, 1.0, 3.0])
    solve([curve], lambda levels: {"macs": 3.0 - levels[0]}, {"macs": 2.0}, np.array([2]))
    ctypes.CDLL(None).fflush(None)
    print("kept")
    assert capfd.readouterr().out == "kept\n"


@pytest.mark.parametrize("kind", ["macs", "latency"])
def test_no_clock_ends_a_search(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the same model could have another plan on a slower machine."""
    given: list[dict[str, float]] = []

    def noted(*arguments: Any, options: dict[str, float], **named: Any) -> Any:
        given.append(dict(options))
        return scipy.optimize.milp(*arguments, options=options, **named)

    monkeypatch.setattr(under_test, "milp", noted)
    curve = np.array([0.0, 1.0, 3.0])
    start = np.array([2, 2])
    solve([curve, curve], lambda levels: {kind: 4.0 - levels.sum()}, {kind: 2.0}, start)
    assert given
    assert all(options.keys() == {"mip_rel_gap", "node_limit"} for options in given)


def test_many_levels_are_thinned_and_the_current_one_stays() -> None:
    found = under_test._picked(1000, 16, 123)
    assert {0, 123, 999} <= set(found.tolist())
    assert len(found) <= 17
    assert under_test._picked(16, 16, 3).tolist() == list(range(16))
    curves = [np.linspace(0, 1 + i % 3, 3000) ** 2 for i in range(60)]
    start = np.full(60, 2999)
    limits = {"macs": 0.5 * 60 * 2999}
    levels = solve(curves, lambda at: {"macs": float((2999 - at).sum())}, limits, start)
    assert 0.49 * 60 * 2999 < (2999 - levels).sum() <= limits["macs"]
