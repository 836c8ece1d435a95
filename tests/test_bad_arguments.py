"""Bad arguments: sizes, budgets, outputs and labelled data that cannot be."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import Builder
from refusals import HALF, MODEL, TARGET, USAGE, Run, refused, store

# --- sizes


@pytest.fixture
def free_size(tmp_path: Path) -> Path:
    """Height and width are symbolic, and nothing but 37 × 29 fits the last weight."""
    b = Builder(3)
    x = b.add("Flatten", b.add("Relu", b.conv("x", 3, 8, 1)))
    y = b.add("MatMul", x, b.weight(8 * 37 * 29, 5))
    return store(b.model({"x": ["n", 3, "h", "w"]}, {y: ["n", 5]}), tmp_path / "model.onnx")


def test_symbolic_shape_without_a_usable_value(run: Run, free_size: Path) -> None:
    refused(run, free_size, MODEL, "--input-shape", "x")


def test_symbolic_shape_with_its_value(run: Run, free_size: Path) -> None:
    assert run(free_size, *HALF, "--quiet", "--input-shape", "x:1,3,37,29").code == 0


def test_input_without_a_shape(run: Run, chain: onnx.ModelProto, tmp_path: Path) -> None:
    chain.graph.input[0].type.tensor_type.ClearField("shape")
    path = store(chain, tmp_path / "model.onnx")
    refused(run, path, MODEL, "'x'", "--input-shape")
    assert run(path, *HALF, "--quiet", "--input-shape", "x:1,3,8,8").code == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("z:1,3,8,8", ("'z'", "x")),
        ("x:1,3,8", ("x", "[1, 3, 8]")),
        ("x:1,4,8,8", ("x", "[1, 4, 8, 8]")),
        ("x:0,3,8,8", ("x", "[0, 3, 8, 8]")),
        ("x:-1,3,8,8", ("x", "[-1, 3, 8, 8]")),
        ("x:1,3,a,8", ("x:1,3,a,8",)),
        ("x", ("'x'",)),
        ("1,3,8,8", ("1,3,8,8",)),
    ],
)
def test_wrong_input_shape(run: Run, small: Path, text: str, words: tuple[str, ...]) -> None:
    refused(run, small, USAGE, *words, extra=(*HALF, "--input-shape", text))


# --- the budget


def test_impossible_budget(run: Run, small: Path) -> None:
    refused(run, small, TARGET, "reachable", extra=("--target-flops", "0.0001"))


# --- the output


def test_output_in_a_missing_folder(run: Run, small: Path) -> None:
    out = small.parent / "nowhere" / "out.onnx"
    refused(run, small, USAGE, "nowhere", extra=(*HALF, "-o", out))


def test_output_is_a_folder(run: Run, small: Path, tmp_path: Path) -> None:
    refused(run, small, USAGE, "folder", str(tmp_path), extra=(*HALF, "-o", tmp_path))


def test_output_is_the_input(run: Run, small: Path) -> None:
    refused(run, small, USAGE, "model.onnx", extra=(*HALF, "-o", small))
    link = small.with_name("link.onnx")
    link.symlink_to(small)
    refused(run, small, USAGE, "link.onnx", extra=(*HALF, "-o", link))
    refused(run, small, USAGE, "model.onnx", extra=(*HALF, "--plan-out", small))


def test_read_only_output_folder(run: Run, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write anywhere, so the refusal is played."""
    make = tempfile.mkdtemp

    def denied(suffix: Any = None, prefix: Any = None, dir: Any = None) -> str:
        if str(dir) == str(small.parent):
            raise PermissionError(errno.EACCES, "Permission denied", str(dir))
        return make(suffix, prefix, dir)

    monkeypatch.setattr(tempfile, "mkdtemp", denied)
    refused(run, small, USAGE, "Permission denied", "model.pruned.onnx")


def test_really_read_only_output_folder(run: Run, small: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    small.parent.chmod(0o555)
    try:
        refused(run, small, USAGE, "Permission denied", "model.pruned.onnx")
    finally:
        small.parent.chmod(0o755)


@pytest.mark.parametrize("at", ["write", "rename"])
def test_disk_full_on_save(run: Run, small: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    write = Path.write_bytes

    def full(path: Path, content: bytes) -> None:
        write(path, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    def full_rename(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if at == "write":
        monkeypatch.setattr(Path, "write_bytes", full)
    else:
        monkeypatch.setattr(os, "replace", full_rename)
    refused(run, small, USAGE, "No space left", "model.pruned.onnx")


def test_disk_full_between_model_and_data(
    run: Run, chain: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two files either both appear or none."""
    path = tmp_path / "model.onnx"
    onnx.save(chain, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    replace, calls = os.replace, []

    def full_at_last(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full_at_last)
    refused(run, path, USAGE, "No space left")


def test_an_earlier_result_survives_a_failed_save(
    run: Run, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.with_name("model.pruned.onnx").write_bytes(b"an earlier result")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    refused(run, small, USAGE, "No space left")


# --- labelled data


PICTURES = np.zeros((4, 3, 8, 8), np.float32)
LABELS = np.zeros(4, np.int64)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x": PICTURES}, ("labels",)),
        ({"labels": LABELS}, ("x",)),
        ({"image": PICTURES, "labels": LABELS}, ("image", "x")),
        ({"x": PICTURES, "labels": LABELS[:3]}, ("length",)),
        ({"x": PICTURES[:0], "labels": LABELS[:0]}, ("data.npz",)),
        ({"x": PICTURES[:, :2], "labels": LABELS}, ("data.npz",)),
        ({"x": np.array(["a", "b"]), "labels": LABELS[:2]}, ("data.npz",)),
        ({"x": PICTURES, "labels": np.array(["a", "b", "c", "d"])}, ("labels",)),
        ({"x": np.array([None, {}]), "labels": LABELS[:2]}, ("data.npz",)),
    ],
    ids="no-labels no-input other-name lengths none shape text text-labels objects".split(),
)
def test_wrong_labelled_data(
    run: Run, small: Path, arrays: dict[str, Any], words: tuple[str, ...]
) -> None:
    data = small.with_name("data.npz")
    np.savez(data, **arrays)
    refused(run, small, USAGE, *words, extra=(*HALF, "--eval", data))


@pytest.mark.parametrize("content", [None, b"", b"hello", b"PK\x03\x04broken"])
def test_labelled_data_that_is_no_npz(run: Run, small: Path, content: bytes | None) -> None:
    data = small.with_name("data.npz")
    if content is not None:
        data.write_bytes(content)
    refused(run, small, USAGE, "data.npz", extra=(*HALF, "--eval", data))


def test_damaged_labelled_data(run: Run, small: Path) -> None:
    data = small.with_name("data.npz")
    np.savez(data, x=PICTURES, labels=LABELS)
    content = bytearray(data.read_bytes())
    content[200:400] = bytes(200)
    content[300] = 1  # inside the first array: its checksum no longer fits
    data.write_bytes(bytes(content))
    refused(run, small, USAGE, "data.npz", extra=(*HALF, "--eval", data))
