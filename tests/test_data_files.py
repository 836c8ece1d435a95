"""What is wrong with a file of samples is said of the file, by name, with exit code 2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from command_line import HALF, Run
from graphs import Builder

BOTH = ["--calib", "--eval"]
SAMPLES = 40
WORDS = 11


@pytest.fixture
def reader(tmp_path: Path) -> Path:
    """A table of 11 words → MatMul → Relu → MatMul: ids [n, 6] → [n, 6, 5]."""
    b = Builder()
    x = b.add("Gather", b.weight(WORDS, 8), b.add("Cast", "ids", to=onnx.TensorProto.INT64))
    x = b.add("Relu", b.add("MatMul", x, b.weight(8, 32)))
    y = b.add("MatMul", x, b.weight(32, 5))
    model = b.model({"ids": ["n", 6]}, {y: ["n", 6, 5]})
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.INT64
    folder = tmp_path / "model"
    folder.mkdir()
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def ids(most: int = WORDS) -> Any:
    return np.random.default_rng(0).integers(0, most, (SAMPLES, 6))


def stored(folder: Path, array: Any, name: str = "ids") -> Path:
    path = folder / "data.npz"
    labels = np.zeros(len(array) if np.ndim(array) else 1, np.int64)
    np.savez(path, **{name: array}, labels=labels)
    return path


@pytest.mark.parametrize("option", BOTH)
@pytest.mark.parametrize(
    ("array", "words"),
    [
        (ids() + 0.5, "fractions, where the model asks for whole numbers (int64)"),
        (np.where(ids() > 5, np.nan, ids()), "NaN or infinite"),
        (ids()[..., None], "does not fit the declared [N, 6]"),
        (ids() + 3, "'ids' holds ids up to 13, and the table that they look up has 11 rows"),
        (ids() - 12, "does not run on these samples"),
        (ids().astype(float) * 1e30, "do not fit the input's type, int64"),
    ],
    ids=["fractions", "nan", "rank", "beyond the table", "negative", "huge"],
)
def test_the_file_is_blamed_and_not_the_model(
    run: Run, reader: Path, tmp_path: Path, option: str, array: Any, words: str
) -> None:
    ran = run(reader, "--target-flops", "0.5", option, stored(tmp_path, array), "--no-measure")
    assert (ran.code, ran.out) == (2, "")
    assert words in ran.err and "data.npz" in ran.err
    assert [path.name for path in reader.parent.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("option", BOTH)
def test_a_wrong_name_says_which_it_should_be(
    run: Run, reader: Path, tmp_path: Path, option: str
) -> None:
    path = stored(tmp_path, ids(), "tokens")
    ran = run(reader, "--target-flops", "0.5", option, path, "--no-measure")
    assert (ran.code, ran.out) == (2, "")
    assert "the file holds labels, tokens" in ran.err and "each of ids" in ran.err


def test_whole_floats_are_taken_with_a_note(run: Run, reader: Path, tmp_path: Path) -> None:
    path = stored(tmp_path, ids().astype(np.float32))
    ran = run(reader, "--target-flops", "0.5", "--calib", path, "--no-measure")
    assert ran.code == 0
    assert "'ids' of data.npz stores floats" in " ".join(ran.out.split())
    fast = run(reader, "--target-flops", "0.5", "--fast", "--eval", path, "--no-measure")
    assert fast.code == 0
    assert "'ids' of data.npz stores floats" in " ".join(fast.out.split())


@pytest.mark.parametrize(("rows", "said"), [(np.zeros((SAMPLES, 1), int), True), (0, False)])
def test_equal_rows_are_noted(
    run: Run, reader: Path, tmp_path: Path, rows: Any, said: bool
) -> None:
    array = ids()[:1] + rows if said else ids()
    ran = run(reader, "--target-flops", "0.5", "--calib", stored(tmp_path, array), "--no-measure")
    assert ("all 40 calibration inputs are equal" in " ".join(ran.out.split())) == said


def test_an_input_that_never_changes_is_noted_unless_it_is_a_mask(run: Run, tmp_path: Path) -> None:
    b = Builder()
    x = b.add("Mul", b.add("Add", "x", "z"), b.add("Cast", "mask", to=1))
    y = b.add("MatMul", b.add("Relu", b.add("MatMul", x, b.weight(8, 32))), b.weight(32, 5))
    sizes = {name: ["n", 8] for name in ("x", "z", "mask")}
    model = b.model(sizes, {y: ["n", 5]})
    model.graph.input[2].type.tensor_type.elem_type = onnx.TensorProto.INT64
    onnx.save(model, tmp_path / "model.onnx")
    ones = np.ones((SAMPLES, 8))
    moving = np.random.default_rng(0).random((SAMPLES, 8))
    np.savez(tmp_path / "calib.npz", x=moving, z=ones, mask=ones.astype(int))
    calib = ("--calib", tmp_path / "calib.npz")
    ran = run(tmp_path / "model.onnx", "--target-flops", "0.5", *calib, "--no-measure")
    assert ran.code == 0
    assert "the same in all 40 calibration inputs: 'z'\n" in ran.out


# --- said before the long work


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["--provider", "magic", "--no-measure"], "no execution provider 'magic'"),
        (["--calib", "nothing.npz"], "nothing.npz"),
        (["--calib", "nothing"], "there is no such file or folder"),
        (["--eval", "nothing.npz"], "there is no such file"),
        (["--preprocess", "mean=a"], "--preprocess mean"),
    ],
)
def test_early(
    run: Run, small: Path, monkeypatch: pytest.MonkeyPatch, wrong: list[str], words: str
) -> None:
    monkeypatch.setattr("graphprune.api.analyse", lambda *_, **__: pytest.fail("too late"))
    ran = run(small, "--target-flops", "0.5", *wrong)
    assert (ran.code, ran.out) == (2, "")
    assert words in ran.err


def test_preprocess_of_arrays_or_of_nothing_is_refused(
    run: Run, small: Path, tmp_path: Path
) -> None:
    np.savez(tmp_path / "c.npz", x=np.zeros((4, 3, 8, 8)))
    half, scale = ("--target-flops", "0.5"), ("--preprocess", "scale=1")
    arrays = run(small, *half, *scale, "--calib", tmp_path / "c.npz")
    assert arrays.code == 2 and "inputs already" in arrays.err
    weights = run(small, *HALF, *scale)
    assert weights.code == 2 and "looks at --preprocess" in weights.err
    assert run(small, *half, "--fast", *scale).code == 2
    assert run(small, *scale).code == 2


def test_a_plan_of_another_model_is_refused_before_calibration(
    run: Run, small: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = small.with_name("plan.json")
    half = ("--target-flops", "0.6", "--no-measure", "--samples", "40")
    assert run(small, *half, "--plan-out", plan).code == 0
    monkeypatch.setattr("graphprune.api.study", lambda *_: pytest.fail("too late"))
    ran = run("apply", path, plan)
    assert (ran.code, ran.out) == (2, "")
    assert "belongs to another model" in ran.err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mean=0.1,0.2", "--preprocess mean: 2 values for 3 channels"),
        ("size=9", "size=9x9 does not fit the declared [N, 3, 8, 8]"),
    ],
)
def test_preprocess_of_made_up_pictures_must_fit(
    run: Run, small: Path, text: str, words: str
) -> None:
    ran = run(small, "--target-flops", "0.5", "--preprocess", text, "--samples", "40")
    assert (ran.code, ran.out) == (2, "")
    assert words in ran.err and "--input-shape" not in ran.err


def test_preprocess_without_pictures_is_refused(run: Run, reader: Path) -> None:
    ran = run(reader, "--target-flops", "0.5", "--preprocess", "scale=1", "--samples", "40")
    assert (ran.code, ran.out) == (2, "")
    assert "takes no pictures" in ran.err
