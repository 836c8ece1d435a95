"""Sequences of tensors whose length is known are opened; others are left alone."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from graphprune.api import prepare, prune

RNG = np.random.default_rng(0)
CALLS = "SplitToSequence SequenceConstruct SequenceEmpty SequenceInsert SequenceErase SequenceAt"
LISTS = {*CALLS.split(), "ConcatFromSequence", "SequenceLength"}
NUMBERS = "int64 zero = {0}, int64 one = {1}, int64 last = {-1}, int64 eight = {8}"
SIZES = "int64[2] halves = {8, 8}, int64[2] uneven = {4, 12}"
APPENDED = "e = SequenceEmpty() d = SequenceInsert(e, a) s = SequenceInsert(d, b, zero)"
FORMS = {
    "chunks of one size": "p = SplitToSequence<axis=1>(h, eight) a = SequenceAt(p, zero) "
    "b = SequenceAt(p, last) c = Mul(a, b)",
    "sizes": "p = SplitToSequence<axis=-1>(h, uneven) a = SequenceAt(p, zero) "
    "b = SequenceAt(p, one) t = Tanh(b) c = Concat<axis=1>(a, t)",
    "a list appended to": f"a = Relu(h) b = Tanh(h) {APPENDED} c = ConcatFromSequence<axis=1>(s)",
    "stacked": f"a = Relu(h) b = Tanh(h) {APPENDED} t = ConcatFromSequence<axis=0, new_axis=1>(s) "
    "c = ReduceSum(t, first)",
    "erased": "a = Relu(h) b = Tanh(h) s = SequenceConstruct(a, b, h) u = SequenceErase(s, one) "
    "c = ConcatFromSequence<axis=1>(u)",
    "a split of a split": "p = SplitToSequence<axis=1>(h, halves) a = SequenceAt(p, one) "
    "q = SplitToSequence<axis=1>(a, four) b = SequenceAt(q, zero) d = SequenceAt(q, one) "
    "c = Add(b, d)",
    "how many there are": "p = SplitToSequence<axis=1>(h, halves) a = SequenceAt(p, one) "
    "n = SequenceLength(p) f = Cast<to=1>(n) c = Mul(a, f)",
}
SMALL = {"chunks of one size": 8, "a list appended to": 32, "erased": 32, "a split of a split": 4}
SMALL["how many there are"] = 8


def model(body: str, width: int = 16, batch: str = "n", opset: int = 17) -> onnx.ModelProto:
    text = (
        f'<ir_version: 8, opset_import: ["": {opset}]> g (float[{batch},6] x) => (float[m,5] y) '
        f"<{NUMBERS}, {SIZES}, int64[1] first = {{0}}, int64 four = {{4}}> "
        f"{{ h = MatMul(x, W) {body} y = MatMul(c, V) }}"
    )
    made = onnx.parser.parse_model(text)
    for name, shape in (("W", (6, 16)), ("V", (width, 5))):
        weight = RNG.standard_normal(shape).astype(np.float32)
        made.graph.initializer.append(numpy_helper.from_array(weight, name))
    return made


def kinds(made: onnx.ModelProto) -> set[str]:
    return {node.op_type for node in made.graph.node}


@pytest.mark.parametrize("opset", [11, 17, 21])
@pytest.mark.parametrize("form", FORMS)
def test_what_is_known_is_opened(form: str, opset: int) -> None:
    body = FORMS[form]
    if opset == 11:
        body = body.replace("ReduceSum(t, first)", "ReduceSum<axes=[0]>(t)")
    made = model(
        body.replace("c = ReduceSum(t", "c = ReduceSum<keepdims=0>(t"), SMALL.get(form, 16)
    )
    if opset == 11 and form == "stacked":
        made = model(body.replace("<axes=[0]>", "<axes=[0], keepdims=0>"))
    del made.opset_import[:]
    made.opset_import.append(onnx.helper.make_opsetid("", opset))
    assert kinds(made) & LISTS
    options = {"criterion": "l1", "repair": "none", "measure": False, "cache": False}
    result = prune(made, flops=0.5, round_to=1, min_channels=1, **options)
    assert result.verdict.passed
    assert result.after.macs <= 0.5 * result.before.macs
    assert not kinds(result.model) & LISTS


LEFT = {
    "as many as there are rows": "p = SplitToSequence<axis=0>(h, one) c = SequenceAt(p, zero)",
    "a position given at run time": "p = SplitToSequence<axis=1>(h, halves) f = ReduceMax(x) "
    "g = Mul(f, nothing) i = Cast<to=7>(g) c = SequenceAt(p, i)",
}


@pytest.mark.parametrize("form", LEFT)
def test_what_is_not_is_left_alone(form: str) -> None:
    width = 16 if "rows" in form else 8
    made = model(LEFT[form], width)
    made.graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.float32), "nothing"))
    assert kinds(prepare(made).analysis.model.assemble()) & LISTS


def test_parts_of_what_is_padded_to_a_multiple_are_not_known() -> None:
    """As many at 32 and at 65 rows, but not at 200."""
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[1,T,8] x) => (float[1,P,6] y)
      <int64[1] one={1}, int64[1] two={2}, int64[1] w={128}, int64 ws={128}, int64[1] zero={0}> {
      s = Shape(x) t = Slice(s, one, two, zero)
      a = Mod(t, w) b = Sub(w, a) r = Mod(b, w)
      front = Constant<value_ints=[0,0,0,0]>() back = Constant<value_ints=[0]>()
      pads = Concat<axis=0>(front, r, back) p = Pad(x, pads)
      q = SplitToSequence<axis=1>(p, ws) y = ConcatFromSequence<axis=1>(q) }"""
    made = onnx.parser.parse_model(text)
    assert kinds(prepare(made).analysis.model.assemble()) & LISTS


def test_a_constant_that_is_a_sequence() -> None:
    """Weights in a sequence are weights: its length is known, or the report names the operator."""
    body = "p = SplitToSequence<axis=0>(U, sixteen) a = SequenceAt(p, one) c = MatMul(h, a)"
    made = model(body, 4)
    weight = RNG.standard_normal((32, 4)).astype(np.float32)
    made.graph.initializer.append(numpy_helper.from_array(weight, "U"))
    made.graph.initializer.append(numpy_helper.from_array(np.int64(16), "sixteen"))
    assert not kinds(prepare(made).analysis.model.assemble()) & LISTS
    made.graph.node[1].output[0] = "rest"
    made.graph.node[2].input[0] = "rest"
    made.graph.output.append(onnx.ValueInfoProto(name="rest"))
    kind = onnx.helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, None)
    made.graph.output[1].type.CopyFrom(onnx.helper.make_sequence_type_proto(kind))
    assert kinds(prepare(made).analysis.model.assemble()) & LISTS
