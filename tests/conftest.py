"""What several test files share: the program in-process, the shipped model, small networks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import pytest
from calibrate_forms import Opened, classifier
from graphs import Builder
from study_forms import draw, network

from graphprune import cli as program

ROOT = Path(__file__).parents[1]


class Ran(NamedTuple):
    """How a run of the program ended, and what it said."""

    code: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """The program in this process: ``run("inspect", path)`` → exit code, stdout, stderr."""

    def start(*arguments: object) -> Ran:
        monkeypatch.setattr("sys.argv", ["graphprune", *map(str, arguments)])
        capsys.readouterr()
        try:
            program.main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        out, err = capsys.readouterr()
        return Ran(code, out, err)

    return start


@pytest.fixture(scope="session")
def resnet() -> Path:
    """The shipped residual network."""
    return ROOT / "models" / "fashion_resnet.onnx"


@pytest.fixture(scope="session")
def labelled() -> Path:
    """The shipped labelled pictures."""
    return ROOT / "models" / "fashion_test.npz"


@pytest.fixture
def chain() -> onnx.ModelProto:
    """Conv (16) → Relu → Conv (16) → Relu → pool → MatMul: two groups, batch free."""
    b = Builder(3)
    x = b.add("Relu", b.conv("x", 3, 16))
    x = b.add("Relu", b.conv(x, 16, 16))
    y = b.add("MatMul", b.add("Flatten", b.add("GlobalAveragePool", x)), b.weight(16, 5))
    return b.model({"x": ["n", 3, 8, 8]}, {y: ["n", 5]})


@pytest.fixture
def small(chain: onnx.ModelProto, tmp_path: Path) -> Path:
    """``chain`` as a file, alone in its folder."""
    folder = tmp_path / "small"
    folder.mkdir()
    path = folder / "model.onnx"
    onnx.save(chain, path)
    return path


@pytest.fixture
def pinned(tmp_path: Path) -> Path:
    """One MatMul between an input and an output: nothing can leave."""
    b = Builder()
    y = b.add("MatMul", "x", b.weight(6, 5))
    path = tmp_path / "pinned.onnx"
    onnx.save(b.model({"x": [1, 6]}, {y: [1, 5]}), path)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The network of `study_forms` as a file, alone in its folder."""
    folder = tmp_path / "alone"
    folder.mkdir()
    onnx.save(network(), folder / "model.onnx")
    return folder / "model.onnx"


@pytest.fixture
def calib(tmp_path: Path) -> Path:
    """Thirty samples for it."""
    np.savez(tmp_path / "calib.npz", x=draw(30, 3, 6, 6))
    return tmp_path / "calib.npz"


@pytest.fixture
def colour() -> Opened:
    """A classifier of pictures [n, 3, 16, 16]."""
    return classifier("n", 3, 16, 16, axes=(0, 1, 2, 3))
