"""A calibrated plan carried out again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from study_forms import QUICK, content, draw, network

from graphprune import api
from graphprune.calibrate import choose
from graphprune.errors import GraphPruneError, UsageError
from graphprune.options import Options
from graphprune.plan import Plan
from graphprune.result import Result


def applied(path: Path, plan: Plan, **options: Any) -> Result:
    return api.apply(path, plan, options=Options(measure=False, cache=False, **options))


@pytest.mark.parametrize("repair", ["obs", "bias", "none"])
def test_apply_gives_the_same_model(path: Path, calib: Path, repair: str) -> None:
    given = None if repair == "bias" else calib
    result = api.prune(path, calib=given, repair=repair, cache=False, **QUICK)
    assert content(applied(path, result.plan, calib=given)) == content(result)


def test_apply_of_a_plan_on_matched_inputs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer pictures are matched than would be made up: the plan must find them again."""
    monkeypatch.setattr(choose, "MATCHING_WORK", 1e6)
    monkeypatch.setattr(choose, "FEWEST_STEPS", 2)
    monkeypatch.setattr(choose, "LEAST", 12)
    monkeypatch.setattr(choose, "MOST", 20)
    onnx.save(network(norm=True, side=8), path)
    options = {**QUICK, "samples": None}
    result = api.prune(path, cache=False, **options)
    assert result.plan.options["calibration"]["samples"] == 20
    assert content(applied(path, result.plan)) == content(result)
    assert [
        note for note in result.notes if note.startswith("12 made-up inputs matched in 2 steps")
    ]


def test_matching_that_is_not_cut_short_says_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "STEPS", 2)
    onnx.save(network(norm=True, side=8), path)
    result = api.prune(path, cache=False, **QUICK)
    assert "matched" in (result.calibration or "")
    assert not [note for note in result.notes if "matched" in note]


def test_a_plan_that_needs_no_inputs_asks_for_none(path: Path, calib: Path) -> None:
    """The cut alone: what decided it need not be given again."""
    made = api.prune(path, calib=calib, repair="none", cache=False, **QUICK)
    assert content(applied(path, made.plan)) == content(made)


def test_a_plan_for_other_inputs_is_refused(path: Path, calib: Path, tmp_path: Path) -> None:
    mine = api.prune(path, calib=calib, cache=False, **QUICK).plan
    made_up = api.prune(path, cache=False, **QUICK).plan
    np.savez(tmp_path / "other.npz", x=draw(30, 3, 6, 6, seed=1))
    with pytest.raises(UsageError, match=r"calib\.npz"):
        applied(path, mine)
    with pytest.raises(UsageError, match="not those of the plan"):
        applied(path, mine, calib=tmp_path / "other.npz")
    with pytest.raises(UsageError, match="not those of the plan"):
        applied(path, made_up, calib=calib)


def test_a_plan_with_a_spoilt_calibration_is_refused_in_words(path: Path, calib: Path) -> None:
    made = api.prune(path, calib=calib, cache=False, **QUICK).plan
    for spoilt in ({}, {"samples": "many"}, [1], "x"):
        options = {**made.options, "calibration": spoilt}
        try:
            applied(path, replace(made, options=options), calib=calib)
        except GraphPruneError:
            continue


def test_the_plan_says_what_it_was_made_with(path: Path, calib: Path) -> None:
    options = api.prune(path, calib=calib, cache=False, **QUICK).plan.options
    assert options["repair"] == "obs"
    assert options["criterion"] == "obspa"
    assert options["calibration"]["synthesised"] is False
    assert options["calibration"]["samples"] == 16
    assert "calib.npz" in options["calibration"]["source"]
    json.dumps(dict(options))
