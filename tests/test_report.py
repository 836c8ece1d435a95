"""What the report says of the numbers in its table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from command_line import HALF, Run

from graphprune import api
from graphprune.report.terminal import as_text
from graphprune.result import Result
from graphprune.validate import Verdict

FOOTNOTE = "the median of ratios, run by run"


@pytest.fixture
def result(small: Path) -> Result:
    return api.prune(small, flops=0.5, fast=True, measure=False)


@pytest.mark.parametrize(("ratio", "said"), [(0.5, False), (0.505, False), (0.6, True)])
def test_a_ratio_unlike_the_quotient_has_a_footnote(
    result: Result, ratio: float, said: bool
) -> None:
    verdict = Verdict(latency=(2.0, 1.0), latency_ratio=(ratio, ratio, ratio))
    text = as_text(replace(result, verdict=verdict))
    assert (FOOTNOTE in text) == said
    assert not said or ("1.67x is the median" in text and "medians is 2.00x" in text)


def test_what_is_proved_is_the_cut(run: Run, small: Path) -> None:
    ran = run(small, *HALF)
    assert "cut verified in ONNX Runtime" in ran.out
    assert "MACs touched" in ran.out


def test_another_function_is_noted(
    run: Run, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = run(small, "--target-flops", 0.5, "--samples", 40)
    assert "hardly resembles" not in quiet.out
    monkeypatch.setattr("graphprune.summing.STRANGE", 1e-9)
    monkeypatch.setattr("graphprune.summing.LOST", 1e-9)
    weights = " ".join(run(small, *HALF).out.split())
    assert "the cut is verified, but" in weights
    assert "not --fast" in weights and "keeps BatchNormalization" in weights
    assert "--refine" not in weights
    seen = " ".join(run(small, "--target-flops", 0.5, "--samples", 40).out.split())
    assert "own (--calib)" in seen and "--refine" not in seen  # which --calib brings with it
    np.savez(tmp_path / "calib.npz", x=np.random.default_rng(0).random((40, 3, 8, 8)))
    own = ("--target-flops", 0.5, "--calib", tmp_path / "calib.npz", "--refine", 0)
    given = " ".join(run(small, *own).out.split())
    assert "--refine 80" in given and "--calib" not in given
    assert "hardly resembles" not in run(small).out  # nothing left
