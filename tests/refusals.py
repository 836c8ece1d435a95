"""A refusal as every one must be: one message, its exit code, no file written or changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
from onnx import numpy_helper

Run = Callable[..., Any]
HALF = ("--target-flops", "0.5", "--round-to", "1", "--min-channels", "1", "--no-cache")
USAGE, MODEL, TARGET = 2, 3, 4
STARTS = ("graphprune: error:", "Error:")  # ours, and click's for an option it cannot read


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(run: Run, path: Path, code: int, *words: str, extra: tuple[object, ...] = HALF) -> str:
    """Run the program on ``path``; it must end with ``code``, say ``words``, and write nothing."""
    before = contents(path.parent)
    ran = run(path, *extra)
    assert ran.code == code, ran.err
    assert ran.out == ""
    assert "Traceback" not in ran.err
    heads = [line for line in ran.err.splitlines() if line.startswith(STARTS)]
    assert len(heads) == 1, ran.err
    missing = [word for word in words if word not in ran.err]
    assert not missing, f"{missing} not in {ran.err!r}"
    assert contents(path.parent) == before
    return str(ran.err)


def store(model: onnx.ModelProto, path: Path) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def weights(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    """The filters of the convolutions."""
    return [tensor for tensor in model.graph.initializer if len(tensor.dims) == 4]


def spoil(tensor: onnx.TensorProto, value: float) -> None:
    """One element of the weight becomes ``value``."""
    array = numpy_helper.to_array(tensor).copy()
    array.flat[0] = value
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
