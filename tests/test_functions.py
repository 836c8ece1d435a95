"""Local functions: inlined in bodies too, and converted where their opset differs."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from body_forms import feeds_for, outputs_of
from onnx import parser

from graphprune.check import check_rule
from graphprune.errors import ModelError
from graphprune.storage import load

FUNCTIONS = """<ir_version: 8, opset_import: ["": 17, "loc": 1]>
g (bool c, float[2,6] x, float[6,8] w, float[8,8] a, float[8,5] v) => (float[2,5] y) {
  h = MatMul(x, w) k = loc.outer<slope = 0.3>(c, h, a) y = MatMul(k, v)
}
<domain: "loc", opset_import: ["": 17, "loc": 1]>
inner<alpha>(z, w) => (o) { t = MatMul(z, w) o = LeakyRelu<alpha: float = @alpha>(t) }
<domain: "loc", opset_import: ["": 17, "loc": 1]>
outer<slope>(c, z, w) => (o) {
  o = If(c)
    <then_branch = t () => (float[2,8] p)
       { q = loc.inner<alpha: float = @slope>(z, w) p = Neg(q) },
     else_branch = e () => (float[2,8] p)
       { q = MatMul(z, w) p = loc.inner<alpha: float = @slope>(q, w) }>
}"""


@pytest.mark.parametrize("condition", [True, False])
def test_functions_are_inlined(condition: bool) -> None:
    """In bodies, with attributes, one calling another, with control flow of their own."""
    model = parser.parse_model(FUNCTIONS)
    feeds = feeds_for(model, condition)
    inlined = load(model)
    assert not inlined.skeleton.functions
    for a, b in zip(outputs_of(model, feeds), outputs_of(inlined.assemble(), feeds), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    assert check_rule(model, feeds).passed


def function_of(opset: int, body: str) -> onnx.ModelProto:
    return parser.parse_model(f"""<ir_version: 8, opset_import: ["": 17, "loc": 1]>
        g (float[2,6] x) => (float[2,6] y) {{ y = loc.f(x) }}
        <domain: "loc", opset_import: ["": {opset}, "loc": 1]> f(z) => (o) {{ {body} }}""")


def test_functions_of_another_opset_are_converted() -> None:
    model = load(function_of(11, "o = Softmax<axis=1>(z)"))
    assert [node.op_type for node in model.nodes] == ["Softmax"]


def test_functions_that_state_another_version_of_their_own_domain() -> None:
    """As jax2onnx writes them: the domain's version there is that of ONNX."""
    model = function_of(17, "o = Relu(z)")
    model.functions[0].opset_import[1].version = 17
    assert [node.op_type for node in load(model).nodes] == ["Relu"]


def test_recursive_functions_are_refused() -> None:
    with pytest.raises(ModelError, match="functions are invalid"):
        load(function_of(17, "o = loc.f(z)"))
