"""Models with bodies from ONNX text, their inputs and what they give."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, parser

WEIGHTS: dict[str, Any] = {"criterion": "l1", "repair": "none", "measure": False}
HEAD = '<ir_version: 8, opset_import: ["": {opset}]> g ({inputs}) => ({outputs})'
RNG = np.random.default_rng(0)


def parsed(inputs: str, outputs: str, body: str, opset: int = 17) -> onnx.ModelProto:
    head = HEAD.format(opset=opset, inputs=inputs, outputs=outputs)
    return parser.parse_model(head + " {" + body + "}")


def feeds_for(model: onnx.ModelProto, condition: bool) -> dict[str, Any]:
    feeds: dict[str, Any] = {}
    for value in model.graph.input:
        shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
        is_bool = value.type.tensor_type.elem_type == TensorProto.BOOL
        feeds[value.name] = (
            np.full(shape, condition) if is_bool else RNG.standard_normal(shape).astype(np.float32)
        )
    return feeds


def outputs_of(model: onnx.ModelProto, feeds: dict[str, Any]) -> list[Any]:
    return list(ort.InferenceSession(model.SerializeToString()).run(None, feeds))


# name: inputs, outputs, body. Bool inputs are tried true and false.
LAW = {
    "If": ("bool c, float[1,3,5,5] x, float[6,3,3,3] w, float[5,6,1,1] a, float[6,5,1,1] b, "
           "float[6,6,1,1] d, float[4,6,1,1] v", "float[1,4,3,3] y",
        """h = Conv(x, w) r = Relu(h)
           z = If(c) <then_branch = t () => (float[1,6,3,3] p)
                        { q = Conv(r, a) s = Relu(q) p = Conv(s, b) },
                      else_branch = e () => (float[1,6,3,3] p) { q = Conv(r, d) p = Sigmoid(q) }>
           y = Conv(z, v)"""),
    "If inside If": ("bool c, bool d, float[2,6] x, float[6,8] w, float[8,7] a, float[8,7] b, "
                     "float[7,5] v", "float[2,5] y",
        """h = MatMul(x, w)
           z = If(c) <then_branch = t () => (float[2,7] p) {
                 m = Tanh(h)
                 p = If(d)
                   <then_branch = tt () => (float[2,7] q) { q = MatMul(m, a) },
                    else_branch = te () => (float[2,7] q) { k = Neg(m) q = MatMul(k, b) }> },
               else_branch = e () => (float[2,7] p) { p = MatMul(h, a) }>
           y = MatMul(z, v)"""),
    "Loop": ("bool c, float[2,6] x, float[6,6] w, float[6,5] v, float[6,3] u",
             "float[2,5] y, float[3,2,3] all",
        """n = Constant<value = int64 {3}>()
           f, all = Loop(n, c, x) <body = b (int64 i, bool go, float[2,6] s)
                 => (bool on, float[2,6] o, float[2,3] each)
                 { on = Identity(go) k = MatMul(s, w) o = Tanh(k) each = MatMul(o, u) }>
           y = MatMul(f, v)"""),
    "If inside Loop": ("bool c, float[2,6] x, float[6,6] w, float[6,6] u, float[6,5] v",
                       "float[2,5] y",
        """n = Constant<value = int64 {2}>() zero = Constant<value = int64 {0}>()
           f = Loop(n, , x) <body = b (int64 i, bool go, float[2,6] s) => (bool on, float[2,6] o)
                 { first = Equal(i, zero) on = Identity(go)
                   k = If(first) <then_branch = t () => (float[2,6] p) { p = MatMul(s, w) },
                                  else_branch = e () => (float[2,6] p) { p = MatMul(s, u) }>
                   o = Add(k, s) }>
           y = MatMul(f, v)"""),
    "Scan": ("float[2,6] h, float[4,2,3] x, float[3,6] w, float[6,6] u, float[6,5] v",
             "float[2,5] y, float[2,4,6] all",
        """f, all = Scan<num_scan_inputs = 1, scan_output_axes = [1], body = b
                 (float[2,6] s, float[2,3] one) => (float[2,6] o, float[2,6] each)
                 { k = MatMul(s, u) j = MatMul(one, w) m = Add(k, j)
                   o = Tanh(m) each = Neg(o) }>(h, x)
           y = MatMul(f, v)"""),
    "Loop captures": ("float[2,6] x, float[6,8] w, float[8,6] u, float[6,5] v", "float[2,5] y",
        """n = Constant<value = int64 {2}>() h = MatMul(x, w) g = Tanh(h)
           f = Loop(n, , x) <body = b (int64 i, bool go, float[2,6] s) => (bool on, float[2,6] o)
                 { on = Identity(go) k = MatMul(g, u) o = Add(k, s) }>
           y = MatMul(f, v)"""),
    "branch gives a captured value": ("bool c, float[2,6] x, float[6,8] w, float[8,5] v",
                                      "float[2,5] y",
        """h = MatMul(x, w)
           z = If(c) <then_branch = t () => (float[2,8] p) { p = Relu(h) },
                      else_branch = e () => (float[2,8] p) { p = Identity(h) }>
           y = MatMul(z, v)"""),
}  # fmt: skip
