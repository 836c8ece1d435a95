"""Models of other forms are not run against each other."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from command_line import Run
from onnx import TensorProto, helper


def identity(kind: int, *shape: int) -> onnx.ModelProto:
    ends = [helper.make_tensor_value_info(name, kind, shape) for name in ("x", "y")]
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    graph = helper.make_graph(nodes, "g", [ends[0]], [ends[1]])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize(
    "other", [identity(TensorProto.FLOAT, 2, 3, 4), identity(TensorProto.INT64, 2, 3)]
)
def test_other_ranks_or_types_are_the_users_error(
    run: Run, tmp_path: Path, other: onnx.ModelProto
) -> None:
    paths = [tmp_path / "a.onnx", tmp_path / "b.onnx"]
    for path, model in zip(paths, (identity(TensorProto.FLOAT, 2, 3), other), strict=True):
        onnx.save(model, path)
    ran = run("compare", *paths)
    assert ran.code == 2
    assert "other inputs or outputs" in ran.err
