"""One head over several levels: what reads its inputs leaves together, and the report says that
its weights stay as they were cut."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from graphprune.api import prune

LEVELS = """<ir_version: 8, opset_import: ["": 17]> g (float[n,12] x) => (float[n,5] y)
{
    a = MatMul(x, A)
    p = Relu(a)
    b = MatMul(x, B)
    q = Relu(b)
    u = MatMul(p, HEAD)
    v = MatMul(q, HEAD)
    w = Tanh(u)
    y = Add(w, v)
}"""


@pytest.mark.parametrize("repair", ["obs", "moments", "none"])
def test_a_shared_head_is_said_not_to_be_repaired(repair: str) -> None:
    model = onnx.parser.parse_model(LEVELS)
    rng = np.random.default_rng(0)
    for name, shape in {"A": (12, 16), "B": (12, 16), "HEAD": (16, 5)}.items():
        weight = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(weight, name))
    options = {"round_to": 1, "samples": 32, "measure": False, "cache": False}
    result = prune(model, flops=0.5, criterion="l1", repair=repair, **options)
    assert result.verdict.passed
    said = [note for note in result.notes if "whose weights others read" in note]
    assert len(said) == (repair != "none")
