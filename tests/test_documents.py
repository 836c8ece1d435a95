"""JSON documents say what the reports say, and the documentation names their keys."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from command_line import HALF, QUICK, Run, read_json

from graphprune import clock
from graphprune.clock import OTHER, Clock
from graphprune.cost import whole

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


def keys_of(value: Any) -> set[str]:
    """Its own, and those of the first row of each list of rows in it."""
    rows = [each[0] for each in value.values() if isinstance(each, list) and each]
    return {*value, *(key for row in rows if isinstance(row, dict) for key in row)}


COMMANDS = {
    "inspect": "inspect MODEL",
    "explain": "explain MODEL c0:0",
    "compare": "compare MODEL MODEL",
    "bench": "bench MODEL --rounds 5",
    "sweep": "sweep MODEL --targets 0.6 --fast --no-measure",
    "blocks": "blocks MODEL --samples 40 --no-measure",
    "targets": "targets",
    "any that fails": "inspect nothing",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_document_has_its_row(run: Run, small: Path, command: str) -> None:
    words = [str(small) if word == "MODEL" else word for word in COMMANDS[command].split()]
    document = read_json(run(*words, "--json").out)
    (row,) = [
        r
        for r in USAGE.read_text().splitlines()
        if r.startswith(("| `", "| any")) and command in r.split("|")[1]
    ]
    said = set(re.findall(r"`(\w+)`", row.split("|")[2]))
    own = keys_of(document) - {"schema", "graphprune"}
    if command == "targets":
        own = set(document) - {"schema", "graphprune"}
    assert own <= said
    nested = {key for part in document.values() if isinstance(part, dict) for key in part}
    assert command in ("blocks", "targets") or said <= own | nested | {"prunable"}


def counts(value: Any, keys: set[str]) -> Iterator[object]:
    """What stands under ``keys``, however deep."""
    for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
        if key in keys and not isinstance(entry, dict):
            yield entry
        elif isinstance(entry, dict | list):
            yield from counts(entry, keys)


@pytest.mark.parametrize("command", ["prune", "inspect", "compare", "sweep"])
def test_counts_are_integers(run: Run, small: Path, command: str) -> None:
    others = {"prune": HALF, "compare": [small], "sweep": ["--targets", "0.6", *QUICK]}
    document = read_json(run(command, small, *others.get(command, []), "--json").out)
    shares = {"ratio", "pinned", "options"}
    document = {key: document[key] for key in document.keys() - shares}
    found = list(counts(document, {"macs", "params", "bytes", "memory", "samples", "units"}))
    assert len(found) >= 6
    assert {type(value) for value in found} == {int}


def test_a_fraction_stays_one() -> None:
    assert (whole(3.0), whole(3 * (1 / 3)), whole(2.5)) == (3, 1, 2.5)
    assert type(whole(7.000000000001)) is int


def test_what_was_replaced_is_said(run: Run, small: Path) -> None:
    first, second = (run(small, *HALF, "--no-measure", "--json") for _ in range(2))
    assert [read_json(ran.out)["replaced"] for ran in (first, second)] == [False, True]
    assert not first.err.endswith("(replaced)\n")
    assert second.err.endswith("model.pruned.onnx (replaced)\n")
    sweep = ("sweep", small, "--targets", "0.6", "--fast", "--no-measure")
    assert "(replaced)" not in run(*sweep).out
    assert "(replaced)" in run(*sweep).out


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
