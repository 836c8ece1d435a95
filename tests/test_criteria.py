"""Criteria by hand: five units, and the arithmetic beside every expected number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import Builder

from graphprune import api
from graphprune.analysis import Analysis, Scope
from graphprune.criteria import AGGREGATE, REDUCE, Scoring, score
from graphprune.criteria.normalise import NORMALISE
from graphprune.errors import UsageError

# x [1, 2] @ ROWS [2, 5] → Relu → @ COLUMNS [5, 1]: unit j owns ROWS[:, j] and COLUMNS[j].
ROWS = [[3, 0, 1, -2, 0], [4, 1, -1, 0, -5]]
COLUMNS = [[1], [-2], [2], [1], [0.5]]


def floats(values: Any) -> Any:
    return np.array(values, np.float32)


def two_layers(rows: Any = ROWS, columns: Any = COLUMNS) -> onnx.ModelProto:
    b = Builder()
    a = b.add("MatMul", "x", b.constant(floats(rows), "a"))
    y = b.add("MatMul", b.add("Relu", a), b.constant(floats(columns), "b"))
    return b.model({"x": [1, len(rows)]}, {y: [1, len(columns[0])]})


def normalised(
    gamma: Sequence[float], variance: Sequence[float], rows: Any = ROWS, columns: Any = COLUMNS
) -> onnx.ModelProto:
    """The same two layers as 1 × 1 convolutions with a BatchNormalization between them."""
    b = Builder()
    a = b.constant(floats(rows).T[:, :, None, None], "a")
    zero = b.constant(np.zeros(5, np.float32), "zero")
    scale, var = b.constant(floats(gamma), "gamma"), b.constant(floats(variance), "variance")
    mean = b.constant(np.ones(5, np.float32), "mean")
    n = b.add("BatchNormalization", b.add("Conv", "x", a), scale, zero, mean, var)
    last = b.constant(floats(columns).T[:, :, None, None], "b")
    y = b.add("Conv", b.add("Relu", n), last)
    return b.model({"x": [1, 2, 1, 1]}, {y: [1, 1, 1, 1]})


def analysed(model: onnx.ModelProto) -> tuple[Analysis, Any]:
    prepared = api.prepare(model, Scope(lossless=False))  # units that do nothing are scored too
    return prepared.analysis, prepared.registry


def scores(model: onnx.ModelProto, criterion: str, **options: Any) -> list[float]:
    """Scores of the model's five units, not normalised unless asked for."""
    analysis, registry = analysed(model)
    (group,) = analysis.coupling.groups
    scoring = Scoring(**{"normalise": "none", **options})
    found = score(analysis.model, analysis.coupling, registry.criterion(criterion), scoring)
    return [float(value) for value in found[group.units]]


# --- the criteria


def test_l1() -> None:
    # rows: 3+4, 0+1, 1+1, 2+0, 0+5 = 7 1 2 2 5; columns: 1 2 2 1 0.5; their mean
    assert scores(two_layers(), "l1") == [4, 1.5, 2, 1.5, 2.75]


def test_l2() -> None:
    # rows: 9+16, 1, 1+1, 4, 25 = 25 1 2 4 25; columns: 1 4 4 1 0.25; their mean
    assert scores(two_layers(), "l2") == [13, 2.5, 3, 2.5, 12.625]


def test_fpgm() -> None:
    # filters on a line, 0 1 3 6 10: sum of distances to the others
    # 0: 1+3+6+10  1: 1+2+5+9  3: 3+2+3+7  6: 6+5+3+4  10: 10+9+7+4
    line = two_layers([[0, 1, 3, 6, 10]])
    assert scores(line, "fpgm") == pytest.approx([20, 17, 15, 18, 30])


def test_fpgm_is_euclidean() -> None:
    # the corners of a 3 by 4 box (diagonal 5) and the corner 0 again: 0+3+4+5 for the twins,
    # 3+3+5+4, 4+4+5+3 and 5+5+4+3 for the others
    box = two_layers([[0, 3, 0, 3, 0], [0, 0, 4, 4, 0]])
    assert scores(box, "fpgm") == pytest.approx([12, 15, 16, 17, 12], abs=1e-5)


def test_fpgm_ignores_consumers() -> None:
    loud = [[100 * v[0]] for v in COLUMNS]
    assert scores(two_layers(), "fpgm") == scores(two_layers(columns=loud), "fpgm")


def test_lamp() -> None:
    # squared norms of rows and columns together: 25+1, 1+4, 2+4, 4+1.44, 25+0.25
    #   u: 26, 5, 6, 5.44, 25.25; ascending 5 5.44 6 25.25 26
    #   sums from there on: 67.69 62.69 57.25 51.25 26
    columns = [[1], [-2], [2], [1.2], [0.5]]
    expected = [26 / 26, 5 / 67.69, 6 / 57.25, 5.44 / 62.69, 25.25 / 51.25]
    found = scores(two_layers(columns=columns), "lamp", normalise=None)
    assert found == pytest.approx(expected, rel=1e-6)


GAMMA = [1, -2, 3, 0, 0.5]
VARIANCE = [1, 4, 9, 1, 0.25]  # deviations 1 2 3 1 0.5


def test_bn_scale() -> None:
    # |gamma|
    assert scores(normalised(GAMMA, VARIANCE), "bn-scale") == [1, 2, 3, 0, 0.5]


def test_bn_scale_of_a_folded_model_is_the_rows() -> None:
    # no normalisation left: the filters' L1, 7 1 2 2 5
    assert scores(two_layers(), "bn-scale") == [7, 1, 2, 2, 5]


def test_dfpc() -> None:
    # |gamma / sigma| = 1 1 1 0 1; rows 7 1 2 2 5; columns 1 2 2 1 0.5; their product
    found = scores(normalised(GAMMA, VARIANCE), "dfpc")
    assert found == pytest.approx([7, 2, 4, 0, 2.5], rel=1e-4)  # epsilon under the root


def test_dfpc_of_a_folded_model() -> None:
    # rows 7 1 2 2 5 times columns 1 2 2 1 0.5
    assert scores(two_layers(), "dfpc") == [7, 2, 4, 2, 2.5]


def test_dfpc_divides_by_the_deviation() -> None:
    # four times the variance, half the score
    once = scores(normalised(GAMMA, VARIANCE), "dfpc")
    wide = scores(normalised(GAMMA, [4 * v for v in VARIANCE]), "dfpc")
    assert wide == pytest.approx([value / 2 for value in once], rel=1e-4)


def test_random_is_seeded() -> None:
    first, again, other = (scores(two_layers(), "random", seed=s) for s in (1, 1, 2))
    assert first == again != other
    assert len(set(first)) == 5
    assert all(0 <= value < 1 for value in first)


def test_random_looks_at_no_weight() -> None:
    zeros = two_layers(np.zeros((2, 5)), np.zeros((5, 1)))
    assert scores(two_layers(), "random") == scores(zeros, "random")


# --- RED, AGG


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("sum", [7, 1, 2, 2, 5]),  # 3+4, 0+1, 1+1, 2+0, 0+5
        ("mean", [3.5, 0.5, 1, 1, 2.5]),  # halves: two elements each
        ("l1", [7, 1, 2, 2, 5]),  # elements are magnitudes already
        ("l2", [5, 1, 2**0.5, 2, 5]),  # √(9+16), √1, √(1+1), √4, √25
    ],
)
def test_reductions(how: str, expected: list[float]) -> None:
    found = scores(two_layers(), "l1", reduce=how, aggregate="producers")
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("how", "expected"),
    [  # rows 7 1 2 2 5, columns 1 2 2 1 0.5
        ("sum", [8, 3, 4, 3, 5.5]),
        ("mean", [4, 1.5, 2, 1.5, 2.75]),
        ("max", [7, 2, 2, 2, 5]),
        ("prod", [7, 2, 4, 2, 2.5]),
        ("producers", [7, 1, 2, 2, 5]),
        ("consumers", [1, 2, 2, 1, 0.5]),
    ],
)
def test_aggregations(how: str, expected: list[float]) -> None:
    assert scores(two_layers(), "l1", aggregate=how) == expected


def test_scales_take_part() -> None:
    # rows 7 1 2 2 5 + columns 1 2 2 1 0.5 + |gamma| 1 2 3 0 0.5; running means do not
    found = scores(normalised(GAMMA, VARIANCE), "l1", aggregate="sum")
    assert found == [9, 5, 7, 3, 6]


def test_every_choice_is_tested_here() -> None:
    assert set(REDUCE) == {"sum", "mean", "l1", "l2"}
    assert set(AGGREGATE) == {"sum", "mean", "max", "prod", "producers", "consumers"}
    assert set(NORMALISE) == {"none", "sum", "mean", "max", "standardise", "lamp"}


def test_a_unit_of_several_slots_adds_them() -> None:
    """Flatten after a 2 × 2 map: a channel owns four columns of the next weight."""
    b = Builder()
    weight = b.constant(floats([1, 2, 3, 4, 5]).reshape(5, 1, 1, 1), "w")
    x = b.add("Flatten", b.add("Conv", "x", weight))
    last = floats([[1, 1, 1, 1], [0, 0, 0, 2], [-1, 1, -1, 1], [0, 0, 0, 0], [3, 0, 0, 3]])
    y = b.add("MatMul", x, b.constant(last.reshape(20, 1), "v"))
    model = b.model({"x": [1, 1, 2, 2]}, {y: [1, 1]})
    # columns: 4, 2, 4, 0, 3+3; and their means over four elements
    assert scores(model, "l1", aggregate="consumers") == [4, 2, 4, 0, 6]
    assert scores(model, "l1", aggregate="consumers", reduce="mean") == [1, 0.5, 1, 0, 1.5]
    # squares: 4, 4, 4, 0, 18
    assert scores(model, "l2", aggregate="consumers") == [4, 4, 4, 0, 18]


def test_a_grouped_consumer_is_tiled_over_its_groups() -> None:
    """Six channels, two groups of three: column i of the weight belongs to channels i and 3 + i."""
    b = Builder()
    rows = b.constant(floats([1, 2, 3, 4, 5, 6]).reshape(6, 1, 1, 1), "w")
    x = b.add("Conv", "x", rows)
    # two filters per group; L1 of column 0, 1, 2 over group one: 1+4, 2+5, 3+6; two: 7+1, 8+1, 9+1
    filters = floats([[1, 2, 3], [4, 5, 6], [7, 8, 9], [1, 1, 1]]).reshape(4, 3, 1, 1)
    y = b.add("Conv", x, b.constant(filters, "g"), group=2)
    model = b.model({"x": [1, 1, 1, 1]}, {y: [1, 4, 1, 1]})
    # channels leave in pairs (i, 3 + i), so a unit's consumers are both: 5+8, 7+9, 9+10
    assert scores(model, "l1", aggregate="consumers") == [13, 16, 19]
    # and its rows are both: 1+4, 2+5, 3+6
    assert scores(model, "l1", aggregate="producers") == [5, 7, 9]


# --- NORM


@pytest.mark.parametrize(
    ("how", "expected"),
    [  # of 8 2 10 6 4: sum 30, mean 6, largest 10, variance (4+16+16+0+4)/5 = 8
        ("none", [8, 2, 10, 6, 4]),
        ("sum", [8 / 30, 2 / 30, 10 / 30, 6 / 30, 4 / 30]),
        ("mean", [8 / 6, 2 / 6, 10 / 6, 1, 4 / 6]),
        ("max", [0.8, 0.2, 1, 0.6, 0.4]),
        ("standardise", [2 / 8**0.5, -4 / 8**0.5, 4 / 8**0.5, 0, -2 / 8**0.5]),
        # ascending 2 4 6 8 10, sums from there on 30 28 24 18 10
        ("lamp", [8 / 18, 2 / 30, 10 / 10, 6 / 24, 4 / 28]),
    ],
)
def test_normalisations(how: str, expected: list[float]) -> None:
    found = NORMALISE[how](np.array([8.0, 2, 10, 6, 4]))
    assert found.tolist() == pytest.approx(expected)


def test_lamp_keeps_the_order_it_was_given() -> None:
    """The trap: sums are of the sorted scores, the result must be unsorted again."""
    given = np.array([9.0, 1, 25, 4, 16])
    # ascending 1 4 9 16 25, sums from there on 55 54 50 41 25
    found = NORMALISE["lamp"](given)
    assert found.tolist() == pytest.approx([9 / 50, 1 / 55, 25 / 25, 4 / 54, 16 / 41])
    assert np.argsort(found).tolist() == np.argsort(given).tolist()
    for order in ([4, 3, 2, 1, 0], [1, 3, 0, 4, 2]):
        assert NORMALISE["lamp"](given[order]).tolist() == found[order].tolist()


def test_lamp_of_equals_is_equal() -> None:
    """w² >= w² holds both ways: each of two equals counts the other (2+2+5, 2+2+5, 5)."""
    found = NORMALISE["lamp"](np.array([2.0, 2, 5]))
    assert found.tolist() == pytest.approx([2 / 9, 2 / 9, 1])


@pytest.mark.parametrize("how", sorted(NORMALISE))
def test_normalising_nothing_stays_finite(how: str) -> None:
    for given in (np.zeros(5), np.ones(1), np.full(5, 1e-30), np.full(3, 7.0)):
        assert np.isfinite(NORMALISE[how](given)).all()


@pytest.mark.parametrize("how", sorted(set(NORMALISE) - {"none"}))
def test_scale_of_a_group_does_not_matter(how: str) -> None:
    """A group of large weights is no more important than one of small weights."""
    given = np.array([8.0, 2, 10, 6, 4])
    assert NORMALISE[how](1000 * given).tolist() == pytest.approx(NORMALISE[how](given).tolist())


def test_normalising_is_within_groups(chain: onnx.ModelProto) -> None:
    analysis, registry = analysed(chain)
    found = score(analysis.model, analysis.coupling, registry.criterion("l1"), Scoring())
    for group in analysis.coupling.groups:  # the default divides by the group's mean
        assert found[group.units].mean() == pytest.approx(1)


@pytest.mark.parametrize("name", ["random", "l1", "l2", "fpgm", "lamp", "bn-scale", "dfpc"])
def test_every_criterion_prunes(chain: onnx.ModelProto, name: str) -> None:
    result = api.prune(chain, flops=0.5, criterion=name, repair="none", measure=False)
    assert result.after.macs <= 0.5 * result.before.macs
    assert result.plan.options["criterion"] == name


@pytest.mark.parametrize("name", ["l1", "l2", "fpgm", "lamp", "bn-scale", "dfpc"])
def test_the_silent_unit_leaves_first(name: str) -> None:
    """Unit 2 computes nothing, and nobody listens to it."""
    rows = [[3, 1, 0, -2, 9], [4, 1, 0, 1, -5]]
    columns = [[1], [-2], [0], [1], [0.5]]
    model = normalised([1, 1, 0, 1, 1], [1] * 5, rows, columns)
    found = scores(model, name, normalise=None)
    if name != "fpgm":  # that one looks for the filter in the middle of all
        assert int(np.argmin(found)) == 2
    assert np.isfinite(found).all()


def test_unknown_names_are_refused() -> None:
    for options in ({"reduce": "magic"}, {"aggregate": "magic"}, {"normalise": "magic"}):
        with pytest.raises(UsageError, match="magic"):
            Scoring(**options)
    with pytest.raises(UsageError, match="dfpc"):
        api.registry().criterion("magic")
