"""When one of two plans for a budget counts as the better one."""

from __future__ import annotations

import numpy as np
import pytest

from graphprune.contest import Race, clearly_nearer, compared, share_left
from graphprune.distortion import divergence
from graphprune.search import Nearness


def near(rows: list[float], divergence: float = 0.0, agreement: float = 1.0) -> Nearness:
    errors = np.array(rows)
    return Nearness(float(errors.mean()), divergence, agreement, errors)


def test_what_is_better_in_every_row_is_nearer() -> None:
    assert clearly_nearer(near([0.5] * 20), near([1.0] * 20))
    assert not clearly_nearer(near([1.0] * 20), near([0.5] * 20))


def test_a_tenth_better_is_the_least() -> None:
    assert clearly_nearer(near([0.89] * 20), near([1.0] * 20))
    assert not clearly_nearer(near([0.91] * 20), near([1.0] * 20))


def test_what_single_rows_decide_is_chance() -> None:
    assert not clearly_nearer(near([1.0] * 20), near([9.0] + [0.95] * 19))


def test_predictions_must_be_no_further() -> None:
    usual = near([1.0] * 20, 0.5, 0.9)
    assert clearly_nearer(near([0.5] * 20, 0.4, 0.9), usual)
    assert not clearly_nearer(near([0.5] * 20, 0.52, 0.9), usual)
    assert not clearly_nearer(near([0.5] * 20, 0.4, 0.85), usual)


def test_of_two_the_nearer_in_both_measures_counts() -> None:
    usual = near([1.0] * 20, 0.5)
    first, second = near([0.8] * 20, 0.3), near([0.75] * 20, 0.4)
    assert share_left(first, usual) < share_left(second, usual)
    assert share_left(near([1.0]), near([2.0])) == pytest.approx(0.5)


def test_numbers_in_notes() -> None:
    assert compared(near([1.0]), near([2.0])).endswith("1.0000 against 2.0000")
    assert "of predictions 0.2500 against 0.5000" in compared(near([1.0], 0.25), near([2.0], 0.5))


def test_divergence_of_predictions() -> None:
    a, b = np.log(np.array([[0.5, 0.5], [0.9, 0.1]])), np.log(np.array([[0.25, 0.75], [0.9, 0.1]]))
    expected = (0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)) / 2
    assert divergence([a], [b]) == pytest.approx(expected)
    assert divergence([a + 7], [b - 3]) == pytest.approx(
        expected
    )  # logits mean what they differ by
    assert divergence([np.exp(a)], [np.exp(b)]) == pytest.approx(expected)
    assert divergence([a], [a]) == 0
    assert divergence([np.zeros((2, 3, 4))], [np.ones((2, 3, 4))]) == 0  # no predictions


def test_few_rows_say_nothing_of_chance() -> None:
    assert clearly_nearer(near([1.0] * 3), near([9.0, 0.95, 0.95]))


@pytest.mark.parametrize(
    ("other", "lost"), [(0.5, False), (1.0, False), (1.006, False), (1.01, True)]
)
def test_no_more_than_noise_slower(other: float, lost: bool) -> None:
    assert Race(2.0, 2.0 * other).lost == lost


def test_nobody_loses_a_race_that_was_not_run() -> None:
    race = Race(unknown="latency not compared: --no-measure")
    assert not race.lost
    assert str(race) == "latency not compared: --no-measure"
