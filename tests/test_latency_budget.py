"""Latency budgets: what a board, a table or a simulator says decides."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import onnx
import pytest
from command_line import Run
from latency_forms import BOARD, ByWeights, analysed, wide

from graphprune import api
from graphprune.errors import UsageError
from graphprune.latency.device import Command
from graphprune.latency.micro import micro
from graphprune.latency.pieces import split
from graphprune.latency.predict import Latency
from graphprune.tables import Table
from graphprune.targets import Target, as_toml, choose


@pytest.fixture
def board(tmp_path: Path) -> Path:
    """A target whose command takes a model's bytes for its microseconds."""
    script = tmp_path / "board.py"
    script.write_text(BOARD)
    target = tmp_path / "board.toml"
    target.write_text(f"latency_command = {json.dumps(f'{sys.executable} {script}')}\n")
    return target


def test_a_command_decides(board: Path, tmp_path: Path) -> None:
    result = api.prune(
        wide(), latency=0.5, hardware=str(board), fast=True, repair="none", cache=False
    )
    path = tmp_path / "out.onnx"
    onnx.save(result.model, path)
    whole = tmp_path / "whole.onnx"
    onnx.save(wide(), whole)
    assert path.stat().st_size / whole.stat().st_size == pytest.approx(0.5, rel=0.03)
    assert any("of the original's latency" in note for note in result.notes)


def test_what_leaves_without_loss_may_be_enough(board: Path) -> None:
    """Half of the hidden channels are zero, so the command says a half of what it did."""
    model = wide()
    first = onnx.numpy_helper.to_array(model.graph.initializer[0]).copy()
    first[:, 10:42] = 0
    model.graph.initializer[0].CopyFrom(
        onnx.numpy_helper.from_array(first, model.graph.initializer[0].name)
    )
    result = api.prune(
        model, latency=0.8, hardware=str(board), fast=True, repair="none", cache=False
    )
    assert not any(group.removed for group in result.plan.groups)
    assert any("what was removed without loss makes it 0.5" in note for note in result.notes)


def test_milliseconds(board: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole.onnx"
    onnx.save(wide(), whole)
    asked = whole.stat().st_size / 1e3 * 0.6
    result = api.prune(
        whole, latency_ms=asked, hardware=str(board), fast=True, repair="none", cache=False
    )
    onnx.save(result.model, tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx").stat().st_size / 1e3 == pytest.approx(asked, rel=0.03)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("print('no')", "no JSON"),
        ("print('{}')", "answered"),
        ("print('{\"milliseconds\": [1, 2, 3]}')", "answered"),
        ("import sys; sys.exit('the board is away')", "the board is away"),
    ],
)
def test_a_command_that_fails(tmp_path: Path, answer: str, words: str) -> None:
    script = tmp_path / "board.py"
    script.write_text(answer)
    device = Command(f"{sys.executable} {script}")
    analysis = analysed(wide())
    piece = split(analysis)[0]
    alive = analysis.coupling.alive(analysis.nothing_removed)
    with pytest.raises(UsageError, match=words):
        device.piece(micro(analysis, piece, frozenset(), alive))
    with pytest.raises(UsageError, match="cannot be run"):
        Command("/no/such/command")._run("{}")


def test_what_cannot_be_reached(run: Run, tmp_path: Path) -> None:
    """Where nothing makes the model faster there is one clear error, and no file."""
    script = tmp_path / "board.py"
    script.write_text(BOARD.replace('os.path.getsize(model["path"]) / 1e3', "1.0"))
    target = tmp_path / "board.toml"
    target.write_text(f"latency_command = {json.dumps(f'{sys.executable} {script}')}\n")
    model = tmp_path / "model.onnx"
    onnx.save(wide(), model)
    ran = run(model, "--target-latency", 0.5, "--fast", "--target-hardware", target, "--no-cache")
    assert ran.code == 4
    assert "--target-latency" in ran.err
    assert "Traceback" not in ran.err
    assert not (tmp_path / "model.pruned.onnx").exists()


def test_a_table_decides_without_a_device(run: Run, tmp_path: Path) -> None:
    analysis = analysed(wide())
    latency = Latency(analysis, choose(api.registry().targets, "generic"), Table(), ByWeights())
    for i, form in enumerate(latency.forms):
        for count in range(8, 65, 8):
            latency.measured(i, (count,) * len(form.knobs))
    board = tmp_path / "board.toml"
    board.write_text(as_toml(Target("board", latency=latency.table.entries)))
    model = tmp_path / "model.onnx"
    onnx.save(wide(), model)
    arguments = (model, "--target-latency", 0.5, "--fast", "--target-hardware", board)
    plans = []
    for name in ("one", "two"):
        plan = tmp_path / f"{name}.json"
        ran = run(*arguments, "--plan-out", plan, "-o", tmp_path / f"{name}.onnx", "--json")
        assert ran.code == 0, ran.err
        plans.append(plan.read_bytes())
    assert plans[0] == plans[1]
    report = json.loads(ran.out)
    assert report["ratio"]["params"] == pytest.approx(0.5, abs=0.02)
    assert any("not measured here" in note for note in report["notes"])


def test_a_table_without_the_model_needs_rates(run: Run, tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    onnx.save(wide(), model)
    board = tmp_path / "board.toml"
    entries = {"Other{}()": {(1,): 1.0}}
    board.write_text(as_toml(Target("board", latency=entries)))
    arguments = (model, "--target-latency", 0.5, "--fast", "--target-hardware", board)
    ran = run(*arguments)
    assert ran.code == 4
    assert "targets measure" in ran.err
    board.write_text(as_toml(Target("board", latency=entries, rates={"MatMul": 1000.0})))
    ran = run(*arguments)
    assert ran.code == 0, ran.err
    assert "100% of the MACs" in " ".join(ran.out.split())


def test_measuring_a_device(run: Run, board: Path, tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    onnx.save(wide(), model)
    made = tmp_path / "made.toml"
    arguments = ("targets", "measure", model, "-o", made, "--target-hardware", board)
    ran = run(*arguments, "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["entries"] > 0
    assert choose({}, str(made)).rates["MatMul"] > 0
    ran = run(model, "--target-latency", 0.5, "--fast", "--target-hardware", made)
    assert ran.code == 0, ran.err
    assert run("targets", "measure", model, "-o", model).code == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ("--target-latency", "0.5", "--target-latency-ms", "3"),
        ("--target-latency", "0.5", "--no-measure"),
        ("--target-latency", "0"),
        ("--target-latency-ms", "-1"),
        ("--target-latency-ms", "100000", "--fast"),
    ],
)
def test_contradictions(run: Run, small: Path, arguments: tuple[str, ...]) -> None:
    ran = run(small, *arguments)
    assert ran.code == 2
    assert "Traceback" not in ran.err
