"""Sweeps: the same plans as one by one, from one analysis; what fails is a row of its own."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import onnx
import pytest
from command_line import read_json
from latency_forms import BOARD, wide

from graphprune import api, carry_out, study
from graphprune.errors import TargetError, UsageError
from graphprune.report.sweep import _ticks, sweep_svg
from graphprune.result import Point, Summary, Sweep
from graphprune.sweep import OPTION, marked, sweep

Run = Callable[..., Any]
QUICK = ("--fast", "--no-measure", "--round-to", "1", "--min-channels", "1")
ORIGINAL = Summary(100.0, 10.0, 40, 2.0, None, 1.0)


def test_each_plan_is_that_of_a_pruning_alone(run: Run, small: Path, tmp_path: Path) -> None:
    """With calibration inputs, solved: to the byte."""
    given = ("--samples", 64, "--round-to", 1, "--no-measure", "--no-cache", "--quiet")
    folder = tmp_path / "sweep"
    assert run("sweep", small, "--targets", "0.5,0.7", *given, "-o", folder).code == 0
    alone = tmp_path / "alone.onnx"
    assert run(small, "--target-flops", 0.5, *given, "-o", alone).code == 0
    assert (folder / "model.pruned-0.5.onnx").read_bytes() == alone.read_bytes()
    assert (folder / "model.pruned-0.7.onnx").exists()


def test_analysis_inputs_and_evidence_are_made_once(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: dict[str, int] = {}

    def counted(module: Any, name: str) -> None:
        function = getattr(module, name)

        def call(*given: Any, **named: Any) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return function(*given, **named)

        monkeypatch.setattr(module, name, call)

    counted(api, "load")
    counted(api, "analyse")
    counted(study, "calibration")
    counted(study, "gather")
    counted(carry_out, "verify")
    sweep(small, [0.7, 0.5], samples=64, round_to=1, cache=False, measure=False)
    once = dict.fromkeys(("load", "analyse", "calibration", "gather"), 1)
    assert counts == once | {"verify": 2}


@pytest.mark.parametrize("by", [by for by in OPTION if by != "latency"])
def test_every_kind_of_budget(resnet: Path, by: str) -> None:
    made = sweep(resnet, [0.5, 0.8], by, fast=True, round_to=1, measure=False)
    kind = {"flops": "macs", "size": "bytes"}.get(by, by)
    assert [point.target for point in made.points] == [0.8, 0.5]
    for point in made.points:
        share = getattr(point.after, kind) / getattr(made.before, kind)
        assert point.target - 0.03 <= share <= point.target


def test_by_latency(tmp_path: Path) -> None:
    """On a device that takes a model's bytes for its microseconds; a thousandth is out of reach."""
    (tmp_path / "board.py").write_text(BOARD)
    target = tmp_path / "board.toml"
    target.write_text(f'latency_command = "{sys.executable} {tmp_path / "board.py"}"\n')
    made = sweep(
        wide(), [0.7, 0.5, 0.001], "latency", hardware=str(target), fast=True, repair="none",
        cache=False, rounds=5, output=tmp_path / "out",
    )  # fmt: skip
    onnx.save(wide(), tmp_path / "whole.onnx")
    whole = (tmp_path / "whole.onnx").stat().st_size
    for point in made.points[:2]:
        assert point.output is not None
        assert point.output.stat().st_size / whole == pytest.approx(point.target, rel=0.03)
    assert made.points[2].failure is not None
    assert made.exit_code == TargetError.exit_code


def test_the_command_offers_every_kind(run: Run) -> None:
    assert f"[{'|'.join(OPTION)}]" in run("sweep", "--help").out


def test_another_budget_holds_besides(resnet: Path) -> None:
    made = sweep(resnet, [0.8, 0.6], params=0.5, fast=True, round_to=1, measure=False)
    for point in made.points:
        assert point.after is not None
        assert point.after.params <= 0.5 * made.before.params


def test_models_table_and_plot_are_written(run: Run, small: Path) -> None:
    ran = run("sweep", small, "--targets", "0.6,0.8", *QUICK)
    assert ran.code == 0
    for name in ("model.pruned-0.6.onnx", "model.pruned-0.8.onnx"):
        onnx.checker.check_model(onnx.load(small.with_name(name)))
        assert name in ran.out
    rows = list(csv.DictReader(small.with_name("model.sweep.csv").open()))
    assert [row["target"] for row in rows] == ["", "0.8", "0.6"]
    assert float(rows[1]["macs"]) <= 0.8 * float(rows[0]["macs"])
    ElementTree.parse(small.with_name("model.sweep.svg"))
    assert not list(small.parent.glob(".*.part"))


def test_measured_plans_are_marked(run: Run, small: Path) -> None:
    ran = run("sweep", small, "--targets", "0.5,0.9", "--fast", "--json")
    document = read_json(ran.out)
    assert document["schema"] == "graphprune.sweep/1"
    assert all(point["latency_ratio"] > 0 for point in document["points"])
    assert all(point["error"] > 0 for point in document["points"])
    assert any(point["best"] for point in document["points"])
    plot = ElementTree.parse(small.with_name("model.sweep.svg")).getroot()
    assert len(plot.findall(".//{*}circle")) == 2


def test_a_target_out_of_reach_is_a_row_and_the_others_are_made(run: Run, small: Path) -> None:
    ran = run("sweep", small, "--targets", "0.6,0.000001", *QUICK, "--json")
    assert ran.code == TargetError.exit_code
    met, missed = read_json(ran.out)["points"]
    assert Path(met["output"]).exists()
    assert missed["after"] is None
    assert missed["failure"]["exit_code"] == TargetError.exit_code
    assert "reachable" in missed["failure"]["message"]
    assert not small.with_name("model.pruned-1e-06.onnx").exists()
    said = run("sweep", small, "--targets", "0.6,0.000001", *QUICK)
    assert said.code == TargetError.exit_code
    assert "cannot be reached" in said.out


def test_a_gate_stops_its_own_plan_alone(run: Run, resnet: Path, labelled: Path) -> None:
    made = sweep(
        resnet, [0.9, 0.1], fast=True, round_to=1, measure=False, eval_data=labelled,
        max_accuracy_drop=20,
    )  # fmt: skip
    assert made.points[0].failure is None
    assert made.exit_code == 6


def test_nothing_reachable_is_an_error(run: Run, small: Path, pinned: Path) -> None:
    assert run("sweep", small, "--targets", "0.000001", *QUICK).code == 4
    assert run("sweep", pinned, "--targets", "0.5", *QUICK).code == 8
    assert not small.with_name("model.sweep.svg").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        ("--targets", "half"),
        ("--targets", "0"),
        ("--targets", "0.5,1.2"),
        ("--targets", "0.5,"),
        ("--targets", "0.5", "--by", "beauty"),
        ("--targets", "0.5", "--target-flops", "0.5"),
        ("--targets", "0.5", "-o", "no/such/folder"),
        (),
    ],
)
def test_wrong_usage(run: Run, small: Path, wrong: tuple[str, ...]) -> None:
    assert run("sweep", small, *wrong, *QUICK).code == 2
    assert [path.name for path in small.parent.iterdir()] == ["model.onnx"]


def test_wrong_usage_from_python(small: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs targets"):
        sweep(small, [])
    with pytest.raises(UsageError, match="no sweep by"):
        sweep(small, [0.5], "beauty")
    with pytest.raises(UsageError, match="max-drop"):
        sweep(small, [0.5], max_drop=0.1)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="folder"):
        sweep(small, [0.5], output=tmp_path / "file", fast=True)


def point(ratio: float | None, error: float | None, accuracy: float | None = None) -> Point:
    return Point(0.5, Summary(50.0, 5.0, 20, 1.0, accuracy, 1.0), ratio, error)


def bests(points: list[Point]) -> list[bool]:
    return [p.best for p in marked(ORIGINAL, points)]


def test_a_plan_is_marked_where_no_other_is_faster_and_nearer() -> None:
    """The third is slower than the second and no nearer; a failure counts for nothing."""
    points = [point(0.8, 0.1), point(0.5, 0.2), point(0.6, 0.2), point(0.4, 0.5)]
    assert bests([*points, Point(0.1)]) == [True, True, False, True, False]


def test_accuracy_goes_before_error() -> None:
    assert bests([point(0.8, 0.1, 0.9), point(0.5, 0.9, 0.9)]) == [False, True]


def test_equals_are_both_marked() -> None:
    assert bests([point(0.5, 0.1), point(0.5, 0.1)]) == [True, True]


def test_macs_stand_for_time_and_nothing_for_quality() -> None:
    assert bests([point(None, 0.1), point(None, None)]) == [True, False]


def test_ticks_hold_all_values() -> None:
    for values in ([0.0, 1.0], [0.0, 0.013], [-3.2, 41.0], [0.0, 0.0], [0.0, 123456.0]):
        ticks = _ticks(values)
        assert ticks[0] <= min(values)
        assert ticks[-1] >= max(values)
        assert 2 <= len(ticks) <= 11
        assert len(set(ticks)) == len(ticks)


def test_a_plot_of_one_plan_without_a_measure() -> None:
    """Nothing to place: axes alone, and a name that needs escaping."""
    made = Sweep("flops", ORIGINAL, (point(None, None),), "random inputs", {})
    root = ElementTree.fromstring(sweep_svg(made, "a<b & c"))
    assert root.findall(".//{*}circle") == []
    assert root.find("{*}title").text == "a<b & c"  # type: ignore[union-attr]


def test_error_is_against_the_original(resnet: Path) -> None:
    """A whole budget changes nothing."""
    made = sweep(resnet, [1.0], fast=True, rounds=5)
    assert made.points[0].error is not None
    assert made.points[0].error < 1e-5
