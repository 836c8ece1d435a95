"""Optimal brain surgeon in float64: its identities, and the criteria that look at activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from graphs import Builder, random_cnn
from numpy.typing import NDArray

from graphprune import api
from graphprune.criteria import evidence, surgeon
from graphprune.criteria.evidence import gather
from graphprune.criteria.observed import OBSERVED, flap, variance, wanda
from graphprune.criteria.surgeon import Consumer, sweep

Matrix = NDArray[np.float64]


@pytest.fixture
def undamped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surgeon, "DAMPING", 0.0)


def inputs(columns: int, rows: int = 200, groups: int = 1, seed: int = 0) -> Matrix:
    """Correlated, centred inputs: [groups, rows, columns]."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((groups, rows, columns)) @ rng.standard_normal(
        (groups, columns, columns)
    )
    return np.asarray(x - x.mean(axis=1, keepdims=True))


def weights(outputs: int, columns: int, groups: int = 1, seed: int = 1) -> Matrix:
    return np.random.default_rng(seed).standard_normal((groups, outputs, columns))


def consumer(x: Matrix, w: Matrix, columns: Any = None, mean: Any = None) -> Consumer:
    """Each column a unit of its own, unless told otherwise."""
    groups, rows, d = x.shape
    if columns is None:
        columns = np.tile(np.arange(d)[:, None, None], (1, groups, 1))
    mean = np.zeros((groups, d)) if mean is None else mean
    return Consumer(w, x.transpose(0, 2, 1) @ x / rows, mean, np.asarray(columns))


def refitted(x: Matrix, w: Matrix, gone: Sequence[int]) -> tuple[float, Matrix]:
    """Relative squared error of least squares on what is kept, and its weights, zeros elsewhere."""
    y = x @ w.T
    kept = [i for i in range(x.shape[1]) if i not in set(gone)]
    found = np.zeros_like(w)
    if kept:
        found[:, kept] = np.linalg.lstsq(x[:, kept], y, rcond=None)[0].T
    return float(np.square(x @ found.T - y).sum() / np.square(y).sum()), found


# --- the identities of block OBS


def test_the_predicted_error_is_the_measured_one(undamped: None) -> None:
    x, w = inputs(8), weights(5, 8)
    single = consumer(x, w).errors(np.arange(8))
    for unit in range(8):
        assert single[unit] == pytest.approx(refitted(x[0], w[0], [unit])[0], rel=1e-8)
    for gone in ([2], [0, 5], [1, 3, 6, 7]):
        made = consumer(x, w)
        error, found = refitted(x[0], w[0], gone)
        assert made.remove(np.array(gone)) == pytest.approx(error, rel=1e-8)
        assert np.allclose(made.whole()[0], found, atol=1e-8)


def test_one_at_a_time_is_a_block_is_least_squares(undamped: None) -> None:
    x, w = inputs(10, seed=3), weights(4, 10)
    for order in ([7, 2, 9, 0], [0, 9, 2, 7], [2, 0, 7, 9]):
        one, block = consumer(x, w), consumer(x, w)
        total = sum(one.remove(np.array([unit])) for unit in order)
        error, found = refitted(x[0], w[0], order)
        assert total == pytest.approx(error, rel=1e-8)
        assert block.remove(np.array(order)) == pytest.approx(error, rel=1e-8)
        assert np.allclose(one.whole(), block.whole(), atol=1e-8)
        assert np.allclose(one.whole()[0], found, atol=1e-8)


def test_units_of_several_columns(undamped: None) -> None:
    """A channel of an unfolded convolution owns a run of columns; after a Flatten, a scatter."""
    x, w = inputs(12), weights(3, 12)
    for columns in (np.arange(12).reshape(4, 1, 3), np.arange(12).reshape(3, 4).T[:, None]):
        made = consumer(x, w, columns)
        single = made.errors(np.arange(4))
        for unit in range(4):
            error, _ = refitted(x[0], w[0], columns[unit, 0].tolist())
            assert single[unit] == pytest.approx(error, rel=1e-8)
        total = made.remove(np.array([3])) + made.remove(np.array([0]))
        error, found = refitted(x[0], w[0], columns[[0, 3], 0].reshape(-1).tolist())
        assert total == pytest.approx(error, rel=1e-8)
        assert np.allclose(made.whole()[0], found, atol=1e-8)


@pytest.mark.parametrize("alike", [True, False])
def test_a_grouped_consumer(undamped: None, alike: bool) -> None:
    """A unit leaves every group; where it stands in each may differ."""
    x, w = inputs(6, groups=2), weights(3, 6, groups=2)
    first = np.arange(6)
    second = first if alike else np.array([3, 1, 4, 0, 5, 2])
    columns = np.stack([first, second], axis=1)[:, :, None]
    made = consumer(x, w, columns)
    energy = sum(float(np.square(x[g] @ w[g].T).sum()) for g in range(2))

    def expected(gone: Sequence[int]) -> float:
        parts = []
        for g in range(2):
            mine = columns[list(gone), g, 0].tolist()
            share, _ = refitted(x[g], w[g], mine)
            parts.append(share * float(np.square(x[g] @ w[g].T).sum()))
        return sum(parts) / energy

    single = made.errors(first)
    for unit in range(6):
        assert single[unit] == pytest.approx(expected([unit]), rel=1e-8)
    total = sum(made.remove(np.array(gone)) for gone in ([4], [0, 2]))
    assert total == pytest.approx(expected([0, 2, 4]), rel=1e-8)
    again = made.errors(np.array([1, 3, 5]))
    for unit, value in zip((1, 3, 5), again, strict=True):
        assert total + value == pytest.approx(expected([0, 2, 4, unit]), rel=1e-8)
    for g in range(2):
        gone = columns[[0, 2, 4], g, 0].tolist()
        assert np.allclose(made.whole()[g], refitted(x[g], w[g], gone)[1], atol=1e-8)


# --- sweeps


def test_a_given_order_gives_its_own_running_errors(undamped: None) -> None:
    """Of two consumers: what each has lost after so many units, refitted, and both added."""
    pairs = [(inputs(7, seed=s), weights(3 + s, 7, seed=s)) for s in (1, 2)]
    order = np.array([4, 0, 6, 1, 5, 3, 2])
    found = sweep([consumer(x, w) for x, w in pairs], 7, order)
    assert found.order.tolist() == order.tolist()
    assert found.curve.shape == (8,)
    for count in range(8):
        wanted = sum(refitted(x[0], w[0], order[:count].tolist())[0] for x, w in pairs)
        assert found.curve[count] == pytest.approx(wanted, rel=1e-8, abs=1e-12)
    assert found.curve[-1] == pytest.approx(2)  # nothing is left of either


def test_greedy_takes_the_cheapest_each_time(undamped: None) -> None:
    x, w = inputs(6, seed=5), weights(4, 6)
    found = sweep([consumer(x, w)], 6)
    gone: list[int] = []
    for unit in found.order:
        costs = {u: refitted(x[0], w[0], [*gone, u])[0] for u in range(6) if u not in gone}
        assert unit == min(costs, key=lambda u: costs[u])
        gone.append(int(unit))
        assert found.curve[len(gone)] == pytest.approx(costs[int(unit)], rel=1e-8)


def test_sweeps_leave_their_consumers_arrays_alone() -> None:
    x, w = inputs(6), weights(4, 6)
    before = w.copy()
    sweep([consumer(x, w)], 6)
    assert (w == before).all()


def test_stops_hold_the_weights_of_that_moment(undamped: None) -> None:
    x, w = inputs(8), weights(5, 8)
    found = sweep([consumer(x, w)], 8, stops=(2, 5, 8))
    assert [count for count, _ in found.stops] == [2, 5, 8]
    for count, (there,) in found.stops:
        wanted = refitted(x[0], w[0], found.order[:count].tolist())[1]
        assert np.allclose(there[0], wanted, atol=1e-8)


def test_wide_groups_leave_in_strides(undamped: None) -> None:
    """More than 48 units: several at once, and still each unit once and an exact total."""
    x, w = inputs(130, rows=400), weights(6, 130)
    found = sweep([consumer(x, w)], 130, stops=(32, 78))
    assert sorted(found.order.tolist()) == list(range(130))
    assert found.curve.shape == (131,)
    assert (np.diff(found.curve) >= 0).all()
    count = found.stops[0][0]
    wanted = refitted(x[0], w[0], found.order[:count].tolist())[0]
    assert found.curve[count] == pytest.approx(wanted, rel=1e-6)


# --- what is singular


def degenerate() -> dict[str, Matrix]:
    x = inputs(6, seed=2)
    dead, twins, poor = x.copy(), x.copy(), inputs(6, rows=3)
    dead[..., [1, 4]] = 0
    twins[..., 3] = twins[..., 0]
    twins[..., 5] = -2 * twins[..., 0]
    return {"dead": dead, "twins": twins, "few rows": poor, "silent": 0 * x, "tiny": 1e-12 * x}


@pytest.mark.parametrize("kind", ["dead", "twins", "few rows", "silent", "tiny"])
def test_never_nan(kind: str) -> None:
    made = consumer(degenerate()[kind], weights(4, 6))
    assert np.isfinite(made.errors(np.arange(6))).all()
    found = sweep([made], 6, stops=(1, 3))
    assert sorted(found.order.tolist()) == list(range(6))
    assert np.isfinite(found.curve).all()
    assert (np.diff(found.curve) >= 0).all()
    assert all(np.isfinite(w).all() for _, (w,) in found.stops)


def test_dead_columns_and_twins_leave_first_and_cost_nothing() -> None:
    dead = sweep([consumer(degenerate()["dead"], weights(4, 6))], 6)
    assert set(dead.order[:2].tolist()) == {1, 4}
    assert dead.curve[2] < 0.01  # the damping's share, no more
    twins = sweep([consumer(degenerate()["twins"], weights(4, 6))], 6)
    assert set(twins.order[:2].tolist()) < {0, 3, 5}
    assert twins.curve[2] < 0.05


def test_dead_columns_leave_first_whatever_is_written_beside_them() -> None:
    """A channel that never fires costs nothing, however large the weights that read it are."""
    loud = weights(4, 6)
    loud[..., [1, 4]] *= 100
    found = sweep([consumer(degenerate()["dead"], loud)], 6)
    assert set(found.order[:2].tolist()) == {1, 4}
    assert found.curve[2] < 0.01


def test_nothing_is_lost_where_nothing_varies() -> None:
    """Inputs that are constant: a bias holds all that they gave, so the curve stays at zero."""
    silent_one = consumer(degenerate()["silent"], 100 * weights(4, 6))
    assert silent_one.errors(np.arange(6)).max() < 1e-6
    assert sweep([silent_one], 6).curve[-1] < 1e-6


def test_a_consumer_with_zero_weights_costs_nothing() -> None:
    x, w = inputs(6), weights(4, 6)
    alone, both = sweep([consumer(x, w)], 6), sweep([consumer(x, w), consumer(x, 0 * w)], 6)
    assert both.order.tolist() == alone.order.tolist()
    assert both.curve == pytest.approx(alone.curve)


def test_errors_do_not_depend_on_the_scale_of_inputs_or_weights() -> None:
    x, w = inputs(6), weights(4, 6)
    wanted = consumer(x, w).errors(np.arange(6))
    for a, b in ((1e-6, 1), (1e6, 1), (1, 1e-6), (1, 1e6)):
        assert consumer(a * x, b * w).errors(np.arange(6)) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("seed", [215, 219])
def test_evidence_of_groups_of_one_unit(seed: int) -> None:
    """Channels that a shuffle or a grouped convolution ties all together."""
    prepared = api.prepare(random_cnn(seed))
    sizes = [len(group) for group in prepared.analysis.coupling.groups]
    assert 1 in sizes
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.standard_normal((4, 3, 4, 4), dtype=np.float32)} for _ in range(3)]
    original = prepared.folded(prepared.analysis.model)
    found = gather(prepared.analysis, original, feeds, lambda group, consumers: None)
    assert {len(e.order) for e in found.values()} == set(sizes)
    for e in found.values():
        assert len(e.curve) == len(e.order) + 1
        assert np.isfinite(e.curve).all()
        assert (np.diff(e.curve) >= 0).all()


def chain(depth: int) -> Any:
    """Products and rectifiers in turn: each width is a group of its own."""
    b = Builder()
    y = b.add("MatMul", "x", b.weight(4, 6))
    for _ in range(depth):
        y = b.add("MatMul", b.add("Relu", y), b.weight(6, 6))
    y = b.add("MatMul", b.add("Relu", y), b.weight(6, 3))
    return b.model({"x": ["N", 4]}, {y: ["N", 3]})


def test_of_very_many_groups_every_second_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = api.prepare(chain(9))
    original = prepared.folded(prepared.analysis.model)
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.standard_normal((8, 4), dtype=np.float32)} for _ in range(5)]
    measured: list[float] = []
    effect = evidence.Effect.of

    def counted(self: Any, changes: Any) -> float:
        measured.append(effect(self, changes))
        return measured[-1]

    monkeypatch.setattr(evidence.Effect, "of", counted)
    for most, wanted in ((4096, 10), (40, 5)):
        measured.clear()
        monkeypatch.setattr(evidence, "EVALUATIONS", most)
        found = gather(prepared.analysis, original, feeds, lambda group, consumers: None)
        assert len(found) == 10
        assert len(measured) == wanted * len(evidence.STOPS)
        assert all((np.diff(e.curve) >= 0).all() and e.curve[-1] > 0 for e in found.values())


def test_few_samples_are_taken_of_a_large_chunk() -> None:
    model = api.prepare(chain(1)).analysis.model
    feeds = [{"x": np.full((8, 4), i, np.float32)} for i in range(3)]
    assert [len(feed["x"]) for feed in evidence.few(model, feeds, 3)] == [3]
    assert [len(feed["x"]) for feed in evidence.few(model, feeds, 17)] == [8, 8]


# --- the criteria by hand: five units, one column each, two outputs

#   W = 3 0 1 -2 0    |W| summed 7 1 2 2 5    W^2 summed 25 1 2 4 25
#       4 1 -1 0 -5
W = np.array([[[3.0, 0, 1, -2, 0], [4, 1, -1, 0, -5]]])
VARIANCE = np.array([1.0, 4, 9, 0, 16])
MEAN = np.array([[0.0, 0, 4, 3, 3]])  # second moments 1 4 25 9 25, their roots 1 2 5 3 5


def by_hand() -> Consumer:
    columns = np.arange(5)[:, None, None]
    return Consumer(W, np.diag(VARIANCE)[None], MEAN, columns)


def test_wanda() -> None:
    # 7·1, 1·2, 2·5, 2·3, 5·5 = 7 2 10 6 25, of 50
    assert wanda(by_hand()) == pytest.approx(np.array([7, 2, 10, 6, 25]) / 50)


def test_flap() -> None:
    # 1·25, 4·1, 9·2, 0·4, 16·25 = 25 4 18 0 400; ||W X||^2 of uncorrelated inputs is their sum
    assert flap(by_hand()) == pytest.approx(np.array([25, 4, 18, 0, 400]) / 447)


def test_variance() -> None:
    # 1 4 9 0 16, of 30
    assert variance(by_hand()) == pytest.approx(VARIANCE / 30)


def test_obspa_of_uncorrelated_inputs_is_flap(undamped: None) -> None:
    assert by_hand().errors(np.arange(5)) == pytest.approx(flap(by_hand()), abs=1e-12)


def test_a_unit_of_several_columns_adds_them() -> None:
    # columns (0, 3), (1, 4): wanda 7+6, 2+25 of 40; flap 25+0, 4+400; variance 1+0, 4+16 of 21
    columns = np.array([[[0, 3]], [[1, 4]]])
    made = Consumer(W, np.diag(VARIANCE)[None], MEAN, columns)
    assert wanda(made) == pytest.approx(np.array([13, 27]) / 40)
    assert flap(made) == pytest.approx(np.array([25, 404]) / 447)
    assert variance(made) == pytest.approx(np.array([1, 20]) / 21)


def test_a_unit_of_a_grouped_consumer_adds_its_groups() -> None:
    # two groups: W above, and ones (|W| 2 each, W^2 2 each) on inputs of variance 1, mean 0
    double = np.concatenate([W, np.ones((1, 2, 5))])
    covariance = np.stack([np.diag(VARIANCE), np.eye(5)])
    columns = np.tile(np.arange(5)[:, None, None], (1, 2, 1))
    made = Consumer(double, covariance, np.concatenate([MEAN, 0 * MEAN]), columns)
    assert wanda(made) == pytest.approx(np.array([9, 4, 12, 8, 27]) / 60)
    assert flap(made) == pytest.approx(np.array([27, 6, 20, 2, 402]) / 457)
    assert variance(made) == pytest.approx(np.array([2, 5, 10, 1, 17]) / 35)


@pytest.mark.parametrize("criterion", [c for c in OBSERVED if c.observed], ids=lambda c: c.name)
def test_silent_inputs_stay_finite(criterion: Any) -> None:
    columns = np.arange(5)[:, None, None]
    nothing = Consumer(W, np.zeros((1, 5, 5)), np.zeros((1, 5)), columns)
    assert np.isfinite(criterion.observed(nothing)).all()


def test_flap_on_a_model(undamped: None) -> None:
    """x [n, 5] → five 1-wide units → [n, 2]: variances and weights of the criterion's example."""
    scale = np.sqrt(np.array([1.0, 4, 9, 1e-12, 16]))
    b = Builder()
    first = b.constant(np.diag(scale).astype(np.float32), "a")
    last = b.constant(W[0].T.astype(np.float32), "b")
    y = b.add("MatMul", b.add("Identity", b.add("MatMul", "x", first)), last)
    prepared = api.prepare(b.model({"x": ["n", 5]}, {y: ["n", 2]}))
    signs = np.array([[1 if i >> k & 1 else -1 for k in range(5)] for i in range(32)], np.float32)
    seen = []

    def order(group: Any, consumers: list[Consumer]) -> None:
        seen.extend((flap(c), variance(c), wanda(c)) for c in consumers)

    gather(prepared.analysis, prepared.analysis.model, [{"x": signs}], order)
    ((by_flap, by_variance, by_wanda),) = seen
    assert by_flap == pytest.approx(np.array([25, 4, 18, 0, 400]) / 447, abs=1e-6)
    assert by_variance == pytest.approx(np.array([1, 4, 9, 0, 16]) / 30, abs=1e-6)
    # without a mean: 7·1, 1·2, 2·3, 2·0, 5·4 = 7 2 6 0 20, of 35
    assert by_wanda == pytest.approx(np.array([7, 2, 6, 0, 20]) / 35, abs=1e-6)
