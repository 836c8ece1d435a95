"""A result is a model like any other: what was copied for one run has other names in the next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from graphprune import api
from graphprune.comparison import compare
from graphprune.runtime import run_session, session
from graphprune.storage import load

# A bias is read by two layers of one residual stream and, between them, by another one.
SHARED = """<ir_version: 8, opset_import: ["": 17]> g (float[2,8] x) => (float[2,4] y) {
  a = MatMul(x, A) a1 = Add(a, bias) a2 = Relu(a1)
  b = MatMul(x, B) b1 = Add(b, bias) b2 = Relu(b1)
  c = MatMul(x, C) c1 = Add(c, bias) c2 = Add(a2, c1)
  e = MatMul(c2, E) f = MatMul(b2, F) y = Add(e, f)
}"""
SIZES = {"A": (8, 32), "B": (8, 32), "C": (8, 32), "bias": (32,), "E": (32, 4), "F": (32, 4)}


@pytest.mark.parametrize("share", [0.8, 0.9])
def test_a_result_is_pruned_again(share: float, tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(SHARED)
    rng = np.random.default_rng(0)
    for name, shape in SIZES.items():
        array = rng.normal(size=shape).astype("f4")
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    told: dict[str, Any] = {"criterion": "l1", "repair": "none", "measure": False, "round_to": 1}
    path, model = tmp_path / "given.onnx", proto
    onnx.save(proto, path)
    for turn in range(3):
        result = api.prune(model, share, **told)
        model = result.model
        names = [tensor.name for tensor in model.graph.initializer]
        assert len(set(names)) == len(names)
        assert api.prepare(model).analysis.shapes.shape.keys() >= set(names) - {""}
        now = tmp_path / f"{turn}.onnx"
        onnx.save(model, now)
        _, document = compare(path, now)
        assert document["b"]["macs"] == result.after.macs
        x = rng.normal(size=(2, 8)).astype("f4")
        assert run_session(session(load(model)), {"x": x})[0].shape == (2, 4)
