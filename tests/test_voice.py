"""Who hears what while a command works: a line for each stage off a terminal."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from command_line import QUICK, Run, program, read_json
from study_forms import draw

from graphprune.clock import DOING

SOURCES = Path(__file__).parents[1] / "graphprune"
LINE = re.compile(r"graphprune: .+ …")


def test_a_line_for_each_stage_as_it_begins(small: Path) -> None:
    ran = program(small, "--target-flops", "0.5", "--samples", 40, "--no-measure")
    lines = ran.stderr.splitlines()
    assert all(LINE.fullmatch(line) for line in lines)
    assert all(line != after for line, after in pairwise(lines))
    assert "graphprune: calibrating on 40 made-up pictures …" in lines
    assert lines.index("graphprune: cutting …") < lines.index("graphprune: repairing …")


def test_given_inputs_are_named(run: Run, path: Path, calib: Path) -> None:
    ran = run(path, "--target-flops", "0.5", "--calib", calib, "--no-measure")
    assert "graphprune: calibrating on calib.npz …" in ran.err


def test_weights_alone_calibrate_nothing(run: Run, small: Path) -> None:
    ran = run(small, "--target-flops", "0.5", "--fast", "--no-measure", "--json")
    assert "calibrating" not in ran.err
    assert "calibrate" not in read_json(ran.out)["seconds_by_stage"]


def test_a_sweep_says_which_target(run: Run, small: Path) -> None:
    ran = run("sweep", small, "--targets", "0.6,0.8", "--fast", "--no-measure", "--json")
    read_json(ran.out)
    assert "graphprune: 0.8: repairing …" in ran.err.splitlines()
    assert "graphprune: 0.6: repairing …" in ran.err.splitlines()


@pytest.mark.parametrize("json", [(), ("--json",)])
def test_quiet_has_no_lines(run: Run, small: Path, json: tuple[str, ...]) -> None:
    assert run("sweep", small, "--targets", "0.6", *QUICK, *json).err == ""


def test_a_log_that_nobody_reads_stops_nothing(
    run: Run, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object, **__: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("graphprune.voice.click.echo", gone)
    assert run(small, "--target-flops", "0.5", "--fast", "--no-measure").code == 0
    assert small.with_name("model.pruned.onnx").exists()


def test_every_stage_has_words_for_people() -> None:
    found = re.findall(r'clock\(\s*"(\w+)"', "".join(p.read_text() for p in SOURCES.rglob("*.py")))
    assert set(found) == DOING.keys()


@pytest.mark.parametrize(("rows", "few"), [(31, True), (32, False)])
def test_few_samples_are_noted(run: Run, path: Path, tmp_path: Path, rows: int, few: bool) -> None:
    np.savez(tmp_path / "rows.npz", x=draw(rows, 3, 6, 6))
    ran = run(path, "--target-flops", "0.5", "--calib", tmp_path / "rows.npz", "--no-measure")
    assert (f"{rows} calibration inputs are few" in ran.out) == few
    assert ("200 to 500" in ran.out) == few
