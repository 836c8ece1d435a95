"""JSON documents say what the reports say, and the documentation names their keys."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
from command_line import QUICK, Run, read_json

from graphprune import clock
from graphprune.clock import OTHER, Clock

USAGE = Path(__file__).parents[1] / "docs" / "usage.md"


def test_every_key_is_documented(run: Run, small: Path) -> None:
    document = read_json(run(small, "--target-flops", "0.6", *QUICK, "--json").out)
    said = USAGE.read_text()
    nested = [*document["before"], *document["ratio"], *document["verified"]]
    missing = [key for key in (*document, *nested) if f"`{key}`" not in said]
    assert not missing
    for side in ("before", "after"):
        assert document[side]["memory"] > 0
    assert document["lossless"]["dead"] == 0


def test_seconds_add_up(run: Run, small: Path) -> None:
    document = read_json(run(small, "--target-flops", "0.6", *QUICK, "--json").out)
    stages = document["seconds_by_stage"]
    assert OTHER in stages
    checks = stages["verify"] + stages.get("measure", 0.0)
    assert document["seconds"] == pytest.approx(sum(stages.values()) - checks)


def test_what_is_no_stage_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made at 0; two stages from 1 to 2 and from 3 to 4; asked at 5."""
    ticks: Iterator[int] = count()
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(ticks))
    mine = Clock(None)
    mine("load", lambda _: None)
    mine("load", lambda _: None)
    assert mine.spent() == {"load": 2, OTHER: 3}
    assert mine.spent(besides=3) == {"load": 2, OTHER: 1}  # asked at 6


def test_a_sweep_says_what_its_plans_share_and_what_holds_each_back(run: Run, small: Path) -> None:
    ran = run("sweep", small, "--targets", "0.6,0.8", "--fast", "--no-measure", "--json")
    document = read_json(ran.out)
    assert document["lossless"]["groups"] == []
    assert [point["held_back"] for point in document["points"]] == [None, None]
    assert OTHER in document["seconds_by_stage"]
    assert all(OTHER in point["seconds_by_stage"] for point in document["points"])
