"""When one of two plans for a budget counts as the better one."""

from __future__ import annotations

import numpy as np
import pytest

from graphprune.contest import Race, clearly_nearer
from graphprune.search import Nearness


def near(rows: list[float]) -> Nearness:
    errors = np.array(rows)
    return Nearness(float(errors.mean()), 1.0, errors)


def test_what_is_better_in_every_row_is_nearer() -> None:
    assert clearly_nearer(near([0.5] * 20), near([1.0] * 20))
    assert not clearly_nearer(near([1.0] * 20), near([0.5] * 20))


def test_a_tenth_better_is_the_least() -> None:
    assert clearly_nearer(near([0.89] * 20), near([1.0] * 20))
    assert not clearly_nearer(near([0.91] * 20), near([1.0] * 20))


def test_what_single_rows_decide_is_chance() -> None:
    assert not clearly_nearer(near([1.0] * 20), near([9.0] + [0.95] * 19))


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
