"""Hardware targets: the built-in data files, the machine's own, and a user's file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from graphprune.errors import UsageError
from graphprune.targets import as_toml, builtin, choose, detect

Run = Callable[..., Any]


@pytest.mark.parametrize("name", sorted(builtin()))
def test_builtin(name: str) -> None:
    target = builtin()[name]
    assert target.name == name
    assert target.description
    assert target.minimum >= 1
    assert all(multiple >= 1 for multiple in target.multiple.values())
    assert name in str(target)
    assert choose(builtin(), name) == target


def test_measured_grids() -> None:
    """design.md: convolutions step every 16 channels on AVX-512, every 8 on AVX2."""
    assert builtin()["cpu-avx512"].multiple_of("Conv") == 16
    assert builtin()["cpu-avx2"].multiple_of("Conv") == 8
    assert builtin()["generic"].multiple_of("Conv") == 1


def test_auto_is_one_of_them() -> None:
    assert detect() in builtin()
    assert choose(builtin(), "auto") == builtin()[detect()]


def test_overrides() -> None:
    target = choose(builtin(), "npu-32", round_to=6, minimum=3)
    assert {target.multiple_of(op) for op in ("Conv", "MatMul", "Gemm")} == {6}
    assert target.minimum == 3


def test_default_multiple(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[multiple]\ndefault = 4\nConv = 12\n")
    target = choose(builtin(), str(path))
    assert target.name == "mine"
    assert (target.multiple_of("Conv"), target.multiple_of("MatMul")) == (12, 4)
    path.write_text("")
    assert choose(builtin(), str(path)).multiple_of("Conv") == 1


def test_a_users_file_on_the_command_line(run: Run, resnet: Path, tmp_path: Path) -> None:
    path, out = tmp_path / "mine.toml", tmp_path / "out.onnx"
    path.write_text('name = "mine"\nminimum = 20\n[multiple]\ndefault = 20\n')
    ran = run(
        resnet, "--fast", "--repair", "none", "--target-flops", 0.5, "--target-hardware", path,
         "--no-measure", "-o", out,
        "--quiet",
    )  # fmt: skip
    assert ran.code == 0
    before = {t.name: t.dims[0] for t in onnx.load(resnet).graph.initializer if len(t.dims) == 4}
    after = {t.name: t.dims[0] for t in onnx.load(out).graph.initializer if len(t.dims) == 4}
    assert all(n % 20 == 0 or n == before[name] for name, n in after.items())
    assert after != before


BAD = {
    "not TOML": "nonsense",
    "not text": "\xff\xfe",
    "unknown key": "speed = 3",
    "zero": "[multiple]\nConv = 0",
    "negative": "minimum = -1",
    "text": '[multiple]\nConv = "x"',
    "fraction": "[multiple]\nConv = 8.5",
    "truth": "minimum = true",
    "no table": "multiple = 8",
    "list": "multiple = [8]",
    "zero block": "block = 0",
    "no list of operators": 'whole = "Concat"',
    "no names": "whole = [3]",
    "nested": "[multiple.Conv]\nfloat16 = 8",
    "deep": "minimum = " + "[" * 100_000,
    "digits": "minimum = " + "9" * 5000,
}


@pytest.mark.parametrize("text", BAD.values(), ids=BAD.keys())
def test_bad_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError) as caught:
        choose(builtin(), str(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["nowhere.toml", "."])
def test_missing_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError):
        choose(builtin(), str(tmp_path / name))


@pytest.mark.parametrize("name", sorted(builtin()))
def test_a_written_target_reads_as_it_was(name: str, tmp_path: Path) -> None:
    path = tmp_path / "written.toml"
    path.write_text(as_toml(builtin()[name]))
    assert choose(builtin(), str(path)) == builtin()[name]


def test_a_folder_called_toml(tmp_path: Path) -> None:
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(UsageError, match=r"folder\.toml"):
        choose(builtin(), str(tmp_path / "folder.toml"))


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match="cpu-avx2"):
        choose(builtin(), "magic")
