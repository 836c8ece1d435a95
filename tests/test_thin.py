"""Few rows of many columns: the rows in the place of their Gram matrix give the same answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from graphprune import statistics
from graphprune.criteria.surgeon import Consumer, sweep
from graphprune.least_squares import best_ridge, error, solved
from graphprune.statistics import Moments, Sums
from graphprune.thin import Damped, Thin, thin

GROUPS, ROWS, COLUMNS, OUTPUTS, WIDTH = 2, 30, 96, 5, 4


def made(seed: int = 0, rows: int = ROWS) -> Sums:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((GROUPS, rows, COLUMNS)).astype(np.float32) + 3
    w = np.random.default_rng(9).standard_normal((GROUPS, COLUMNS, OUTPUTS)).astype(np.float32)
    sums = Sums.empty(x, x @ w)
    for part in np.array_split(np.arange(rows), 3):
        sums.add(x[:, part], x[:, part] @ w)
    return sums


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What counts as many columns is what these tests have."""
    monkeypatch.setattr(statistics, "thin", lambda rows, columns: rows <= columns / 2)
    yield


def dense(sums: Sums) -> Moments:
    """As it was: with sums of products in float32."""
    sums._settle()
    return sums.centred()


def exact(few: Moments) -> Moments:
    assert isinstance(few.xx, Thin)
    return replace(few, xx=few.xx.rows.transpose(0, 2, 1) @ few.xx.rows)


def test_which_stay_rows() -> None:
    assert thin(500, 10_000)
    assert not thin(8_000, 10_000)
    assert not thin(500, 1_000)


@pytest.mark.usefixtures("narrow")
def test_moments_are_the_same() -> None:
    few, many = made().centred(), dense(made())
    assert isinstance(few.xx, Thin)
    assert isinstance(many.xx, np.ndarray)
    gram = few.xx.rows.transpose(0, 2, 1) @ few.xx.rows
    assert np.allclose(gram, many.xx, atol=1e-5)
    for name in ("count", "mean_x", "mean_t", "tx", "tt"):
        assert np.allclose(getattr(few, name), getattr(many, name), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("narrow")
def test_two_together_are_the_same() -> None:
    rng = np.random.default_rng(1)
    other = made()
    x = rng.standard_normal((GROUPS, 10, COLUMNS)).astype(np.float32)
    w = rng.standard_normal((GROUPS, COLUMNS, OUTPUTS)).astype(np.float32)
    one, two = made(), Sums(**vars(made()._nothing()))
    two.add(x, x @ w)
    both = one.merged(two)
    other.add(x, x @ w)
    assert isinstance(both.centred().xx, Thin)
    assert np.allclose(both.centred().tx, other.centred().tx)
    assert both.centred().count == ROWS + 10


@pytest.mark.usefixtures("narrow")
def test_solutions_are_the_same() -> None:
    few = made().centred()
    many = exact(few)
    weights = np.random.default_rng(2).standard_normal((GROUPS, OUTPUTS, COLUMNS))
    for ridge in (0.3, 3e-3, 1e-6):
        (a, b), (c, d) = solved(few, weights, ridge), solved(many, weights, ridge)
        assert np.allclose(a, c, atol=1e-6)
        assert np.allclose(b, d, atol=1e-6)
        assert error(few, a, b) == pytest.approx(error(many, a, b), rel=1e-6, abs=1e-9)
    held = made(3).centred()
    assert best_ridge(few, held, weights) == best_ridge(many, exact(held), weights)


@pytest.mark.usefixtures("narrow")
def test_nothing_held_out() -> None:
    nothing = made()._nothing().centred()
    assert nothing.count == 0
    assert isinstance(nothing.xx, Thin)


@pytest.mark.usefixtures("narrow")
def test_the_sweep_is_the_same() -> None:
    few = made().centred()
    many = exact(few)
    weights = np.random.default_rng(4).standard_normal((GROUPS, OUTPUTS, COLUMNS))
    units = COLUMNS // WIDTH
    columns = np.tile(np.arange(COLUMNS).reshape(units, 1, WIDTH), (1, GROUPS, 1))
    found = [
        sweep([Consumer(weights, m.xx, m.mean_x, columns, m.count)], units, stops=(6, 14))
        for m in (few, many)
    ]
    assert found[0].order.tolist() == found[1].order.tolist()
    assert np.allclose(found[0].curve, found[1].curve, rtol=1e-8)
    for (_, (a,)), (_, (b,)) in zip(found[0].stops, found[1].stops, strict=True):
        assert np.allclose(a, b, atol=1e-8)


def test_rows_that_depend_on_each_other() -> None:
    """Without any damping to speak of a repeated row has no Cholesky factor."""
    rows = np.tile(np.random.default_rng(5).standard_normal((1, 40)) * 1e8, (6, 1))
    found = Damped(rows, 1e-300)
    assert np.isfinite(found.half).all()
