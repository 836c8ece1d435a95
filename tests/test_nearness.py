"""Allocation: to come near a budget is worth little beside what is lost for it."""

from __future__ import annotations

import numpy as np
import onnx.numpy_helper
import onnx.parser
import pytest

from graphprune import api
from graphprune.budget import allocate
from graphprune.targets import Target

HALVES = Target("halves", multiple={"default": 32}, strict=True)


def two_layers() -> onnx.ModelProto:
    """Half of the first hidden layer is 46 % of the MACs, half of the second 27 %."""
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[1,64] x) => (float[1,10] y) '
        "{ a = MatMul(x, v) b = Relu(a) c = MatMul(b, w) d = Relu(c) y = MatMul(d, u) }"
    )
    rng = np.random.default_rng(0)
    for name, shape in (("v", (64, 64)), ("w", (64, 64)), ("u", (64, 10))):
        array = rng.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return proto


@pytest.mark.parametrize(
    ("second", "left"), [(0.0105, 0.732), (0.5, 0.536)], ids=["hardly more", "much more"]
)
def test_nearer_only_where_that_loses_hardly_more(second: float, left: float) -> None:
    analysis = api.prepare(two_layers()).analysis
    scores = np.ones(analysis.coupling.n_units)
    of = {group.signature[0][0]: group.index for group in analysis.coupling.groups}
    curves = {
        of["v"]: np.linspace(0, 2 * 0.01, 65),
        of["w"]: np.linspace(0, 2 * second, 65),
    }
    decision = allocate(analysis, scores, HALVES, {"macs": 0.8}, curves=curves)
    before, after = (analysis.cost.of(m) for m in (analysis.nothing_removed, decision.removed))
    assert after.macs / before.macs == pytest.approx(left, abs=1e-3)
    assert any("nothing nearer was found that loses no more" in note for note in decision.notes)
