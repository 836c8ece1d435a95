"""What outputs are compared on, and when a result is said to be another function."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from command_line import HALF, Run, read_json
from graphs import Builder
from numpy.typing import NDArray

from graphprune.likeness import Likeness, likeness
from graphprune.runtime import session
from graphprune.storage import load

ROWS = 40


def affine(scale: float, shift: float) -> onnx.ModelProto:
    """y = x @ (I * scale) + shift."""
    b = Builder()
    b.initializers += [
        onnx.numpy_helper.from_array((np.eye(4) * scale).astype(np.float32), "w"),
        onnx.numpy_helper.from_array(np.full(4, shift, np.float32), "b"),
    ]
    b.nodes.append(onnx.helper.make_node("Gemm", ["x", "w", "b"], ["y"]))
    return b.model({"x": ["n", 4]}, {"y": ["n", 4]})


def alike(scale: float, shift: float, rows: NDArray[np.float32]) -> Likeness:
    models = [load(model) for model in (affine(1, 0), affine(scale, shift))]
    runners = [session(model) for model in models]
    feeds = [{"x": part} for part in np.array_split(rows, 2)]
    return likeness(models[0], models[1], runners, feeds)


@pytest.fixture
def rows() -> NDArray[np.float32]:
    """Rows around 3 whose spread is small beside that."""
    drawn = np.random.default_rng(0).standard_normal((ROWS, 4)) / 10 + 3
    return drawn.astype(np.float32)


def test_the_same(rows: NDArray[np.float32]) -> None:
    found = alike(1, 0, rows)
    assert (found.difference, found.constant) == (0, ())
    assert found.unexplained == pytest.approx(0, abs=1e-9)


def test_the_best_constant_explains_nothing(rows: NDArray[np.float32]) -> None:
    found = alike(0, float(rows.mean()), rows)
    assert found.constant == ("y",)
    assert found.difference < 0.2  # which says nothing
    assert found.unexplained == pytest.approx(1, abs=0.1)


def test_half_of_the_spread(rows: NDArray[np.float32]) -> None:
    found = alike(0.5, float(rows.mean()) / 2, rows)
    assert found.constant == ()
    assert found.unexplained == pytest.approx(0.25, abs=0.05)


def test_one_row_says_nothing_of_spread(rows: NDArray[np.float32]) -> None:
    models = [load(model) for model in (affine(1, 0), affine(0, 3))]
    runners = [session(model) for model in models]
    found = likeness(models[0], models[1], runners, [{"x": rows[:1]}])
    assert (found.unexplained, found.constant) == (None, ())


# --- in the report


@pytest.fixture
def pixels(tmp_path: Path) -> tuple[Path, Path]:
    """A network that reads pixels (0..255), and samples of them."""
    b = Builder(1)
    x = b.add("Relu", b.conv("x", 3, 16))
    x = b.add("Relu", b.conv(x, 16, 16))
    y = b.add("MatMul", b.add("Flatten", b.add("GlobalAveragePool", x)), b.weight(16, 5))
    model, samples = tmp_path / "pixels.onnx", tmp_path / "calib.npz"
    onnx.save(b.model({"x": ["n", 3, 8, 8]}, {y: ["n", 5]}), model)
    drawn = np.random.default_rng(0).integers(0, 256, (ROWS, 3, 8, 8))
    np.savez(samples, x=drawn * np.linspace(0.1, 1, ROWS)[:, None, None, None])
    return model, samples


def test_outputs_are_compared_on_what_the_model_reads(run: Run, pixels: tuple[Path, Path]) -> None:
    model, samples = pixels
    seen = run(model, "--target-flops", "0.5", "--calib", samples)
    assert "on 40 of the calibration inputs" in seen.out
    document = read_json(run(model, "--target-flops", "0.5", "--calib", samples, "--json").out)
    assert document["compared_on"] == "40 of the calibration inputs"
    assert 0 < document["output_difference"] < 1
    assert "on 16 made-up pictures" in run(model, *HALF).out


def test_what_reads_no_pictures_is_compared_on_random_inputs(run: Run, tmp_path: Path) -> None:
    b = Builder()
    x = b.add("Relu", b.add("MatMul", "x", b.weight(6, 32)))
    path = tmp_path / "model.onnx"
    onnx.save(b.model({"x": ["n", 6]}, {b.add("MatMul", x, b.weight(32, 4)): ["n", 4]}), path)
    assert "on 8 random inputs" in run(path, *HALF).out


def test_noise_alone_is_no_reason_to_warn(run: Run, resnet: Path, tmp_path: Path) -> None:
    """The shipped model reads pixels: noise moves its outputs far, pictures do not."""
    fast = ("--target-flops", "0.5", "--fast", "--round-to", "1")
    ran = run(resnet, *fast, "-o", tmp_path / "out.onnx")
    assert "hardly resembles" not in ran.out


def test_a_constant_result_is_noted(run: Run, tmp_path: Path) -> None:
    """Behind shifts of -1000 nothing fires but channel 0, which l1 takes for the least."""
    b = Builder()
    weight = np.full((6, 8), 0.9, np.float32)
    weight[:, 0] = 1.2 * np.eye(6, dtype=np.float32)[0]
    shift = np.full(8, -1e3, np.float32)
    shift[0] = 0
    b.initializers += [
        onnx.numpy_helper.from_array(weight, "w"),
        onnx.numpy_helper.from_array(shift, "s"),
    ]
    x = b.add("Relu", b.add("Add", b.add("MatMul", "x", "w"), "s"))
    y = b.add("MatMul", x, b.weight(8, 3))
    path = tmp_path / "model.onnx"
    onnx.save(b.model({"x": ["n", 6]}, {y: ["n", 3]}), path)
    asked = ("--criterion", "l1", "--repair", "none", "--no-lossless", "--round-to", "1")
    ran = run(path, "--target-flops", "0.5", *asked, "--aggregate", "producers")
    said = " ".join(ran.out.split())
    assert ran.code == 0
    assert "is the same for all, as the original's is not: the result hardly resembles" in said
    assert "is the same for all" not in run(path, "--target-flops", "1", *asked).out
