"""Quantised operators that hold a whole layer: LSTM, attention, embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import Builder
from onnx import TensorProto, helper
from onnxruntime import quantization

from graphprune.api import prepare, prune
from graphprune.check import LawBrokenError, check_rule
from graphprune.lookups import index_bounds
from graphprune.rules import BUILTIN, relate
from graphprune.rules.op import Op
from graphprune.runtime import random_inputs, run_session, session
from graphprune.shapes import infer
from graphprune.storage import load
from graphprune.unrounded import rounds, unrounded

MICROSOFT = "com.microsoft"
KINDS = {"signed": np.int8, "unsigned": np.uint8}


class Quantising(Builder):
    """Appends quantised weights: integers, scales and zero points."""

    def quantised(self, shape: tuple[int, ...], per: tuple[int, ...], kind: str) -> list[str]:
        """Names; scales and zero points are of the shape ``per``."""
        dtype, low = KINDS[kind], 0 if kind == "unsigned" else -128
        integers = self.rng.integers(low, low + 256, shape).astype(dtype)
        scale = (self.rng.random(per) * 0.01 + 0.005).astype(np.float32)
        zero = np.zeros(per, dtype)
        if kind == "unsigned":
            zero = np.full(per, self.rng.integers(100, 150), dtype)  # equal ones: ONNX Runtime's
        return [self.constant(integers), self.constant(scale), self.constant(zero)]


# --- LSTM


def lstm(
    way: str = "forward",
    per_row: bool = False,
    kind: str = "signed",
    everything: bool = False,
    **given: Any,
) -> onnx.ModelProto:
    """x: [7, 1, 5]; 12 hidden units; Relu features before, a product behind."""
    b = Quantising(2)
    directions, hidden, inside = 1 + (way == "bidirectional"), 12, 10
    h = b.add("Relu", b.add("MatMul", "x", b.weight(5, inside)))
    per = (directions, 4 * hidden) if per_row else (directions,)
    w, ws, wz = b.quantised((directions, inside, 4 * hidden), per, kind)
    r, rs, rz = b.quantised((directions, hidden, 4 * hidden), per, kind)
    more = [""] * 5
    if everything:
        lengths = b.constant(np.array([6], np.int32))
        shapes = [(directions, 1, hidden)] * 2 + [(directions, 3 * hidden)]
        more = [b.weight(directions, 8 * hidden), lengths, *(b.weight(*s) for s in shapes)]
    h = b.add(
        "DynamicQuantizeLSTM", h, w, r, *more, ws, wz, rs, rz, domain=MICROSOFT,
        hidden_size=hidden, direction=way, **given,
    )  # fmt: skip
    h = b.add("Reshape", b.add("Transpose", h, perm=[0, 2, 1, 3]), b.ints(0, 0, -1))
    y = b.add("MatMul", h, b.weight(directions * hidden, 3))
    return b.model({"x": [7, 1, 5]}, {y: [7, 1, 3]})


LAYERS = {
    "forward": {},
    "reverse": {"way": "reverse", "kind": "unsigned"},
    "bidirectional": {"way": "bidirectional"},
    "a scale for each row": {"way": "bidirectional", "per_row": True},
    "a zero point for each row": {"way": "bidirectional", "per_row": True, "kind": "unsigned"},
    "with everything": {"way": "bidirectional", "everything": True},
    "peepholes and a clip": {"everything": True, "kind": "unsigned", "clip": 0.4},
}


@pytest.mark.parametrize("name", LAYERS)
def test_hidden_units_leave(name: str) -> None:
    """A unit is one position of every gate, in both directions; the proof needs no tolerance."""
    source = lstm(**LAYERS[name])  # type: ignore[arg-type]
    assert check_rule(source).passed
    groups = prepare(source).analysis.coupling.groups
    assert sorted(len(group) for group in groups) == [10, 12]
    result = prune(source, flops=0.5, round_to=1, measure=False, cache=False)
    assert result.verdict.passed
    node = next(n for n in result.model.graph.node if n.op_type == "DynamicQuantizeLSTM")
    assert next(a.i for a in node.attribute if a.name == "hidden_size") < 12


def test_states_that_are_not_zeroed_are_caught() -> None:
    """Units that still run in the original change the scale that the others are rounded with."""

    def forgetful(op: Op) -> None:
        BUILTIN[MICROSOFT, "DynamicQuantizeLSTM"](op)
        found = op.relations.contractions
        found[:] = [c for c in found if c.node != op.index or (c.input, c.axis) == (2, 1)]

    with pytest.raises(LawBrokenError):
        check_rule(lstm(), rules={**BUILTIN, (MICROSOFT, "DynamicQuantizeLSTM"): forgetful})


@pytest.mark.parametrize("name", LAYERS)
def test_reads_as_a_lstm_in_floats(name: str) -> None:
    same_without_rounding(lstm(**LAYERS[name]), "LSTM", 0.05)  # type: ignore[arg-type]


def same_without_rounding(source: onnx.ModelProto, operator: str, near: float) -> None:
    """The model in floats, which holds ``operator``, computes nearly the same."""
    model = load(source)
    plain = unrounded(model)
    assert rounds(model)
    assert operator in {node.op_type for node in plain.nodes}
    feeds = random_inputs(model, infer(model))
    expected, actual = (run_session(session(m, 1), feeds)[0] for m in (model, plain))
    assert np.abs(expected - actual).max() < near * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["QInt8", "QUInt8"])
def test_as_the_quantiser_makes_it(kind: str, tmp_path: Path) -> None:
    """Two layers in both directions, by ``quantize_dynamic``, by default options."""
    b = Builder(4)
    h, width = b.add("Relu", b.add("MatMul", "x", b.weight(6, 16))), 16
    for _ in range(2):
        weights = [b.weight(2, 48, width), b.weight(2, 48, 12), b.weight(2, 96)]
        h = b.add("LSTM", h, *weights, hidden_size=12, direction="bidirectional")
        h, width = b.add("Reshape", b.add("Transpose", h, perm=[0, 2, 1, 3]), b.ints(0, 0, -1)), 24
    y = b.add("MatMul", h, b.weight(24, 4))
    source, target = tmp_path / "float.onnx", tmp_path / "quantised.onnx"
    onnx.save(b.model({"x": [9, 1, 6]}, {y: [9, 1, 4]}), source)
    quantization.quantize_dynamic(source, target, weight_type=quantization.QuantType[kind])
    model = onnx.load(target)
    assert sum(node.op_type == "DynamicQuantizeLSTM" for node in model.graph.node) == 2
    result = prune(target, flops=0.5, samples=16, measure=False, cache=False)
    assert result.verdict.passed
    assert result.after.macs <= 0.5 * result.before.macs
    kinds = [{t.data_type for t in m.graph.initializer} for m in (model, result.model)]
    assert kinds[0] == kinds[1]


# --- attention


def attention(
    per_column: bool = False, kind: str = "signed", past: bool = False
) -> onnx.ModelProto:
    """x: [2, 5, 12]; four heads of 6; a product behind."""
    b = Quantising(3)
    width = 24
    x, scale, zero = b.add("DynamicQuantizeLinear", "x", outputs=3)
    w, ws, wz = b.quantised((12, 3 * width), (3 * width,) if per_column else (), kind)
    inputs = [x, w, b.weight(3 * width), scale, ws, "", zero, wz]
    inputs += ["past"] if past else []
    names = {"x": [2, 5, 12]} | ({"past": [2, 2, 4, 3, 6]} if past else {})
    h = b.add("QAttention", *inputs, outputs=1 + past, domain=MICROSOFT, num_heads=4)
    h, present = h if past else (h, None)
    y = b.add("MatMul", h, b.weight(width, 12))
    outputs = {y: [2, 5, 12]} | ({present: [2, 2, 4, 8, 6]} if present else {})
    return b.model(names, outputs)


PROJECTIONS = {
    "one scale": {},
    "a scale for each column": {"per_column": True},
    "zero points": {"per_column": True, "kind": "unsigned"},
    "past": {"past": True},
}


@pytest.mark.parametrize("units", [("channels", "heads"), ("channels", "head-dims")], ids=str)
@pytest.mark.parametrize("name", PROJECTIONS)
def test_heads_leave(name: str, units: tuple[str, ...]) -> None:
    """Whole heads, or positions of all: queries, keys and values have one width."""
    assert check_rule(attention(**PROJECTIONS[name]), units=units).passed  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["one scale", "zero points"])
@pytest.mark.parametrize("units", ["heads", "head-dims"])
def test_a_network_loses_heads(name: str, units: str) -> None:
    source = attention(**PROJECTIONS[name])  # type: ignore[arg-type]
    result = prune(
        source, flops=0.6, units=(units,), round_to=1, min_channels=1, measure=False, cache=False
    )
    assert result.verdict.passed
    node = next(n for n in result.model.graph.node if n.op_type == "QAttention")
    number = next(a.i for a in node.attribute if a.name == "num_heads")
    assert number < 4 if units == "heads" else number == 4


def test_past_keys_hold_the_heads() -> None:
    """The cache is in the interface."""
    assert not prepare(attention(past=True)).analysis.coupling.groups


@pytest.mark.parametrize("name", ["one scale", "zero points"])
def test_reads_as_an_attention_in_floats(name: str) -> None:
    same_without_rounding(attention(**PROJECTIONS[name]), "Attention", 0.05)  # type: ignore[arg-type]


@pytest.mark.parametrize("symmetric", [True, False])
def test_fused_attention_as_the_quantiser_makes_it(symmetric: bool, tmp_path: Path) -> None:
    b = Builder(4)
    names = b.weight(16, 96), b.weight(96)
    h = b.add("Attention", "x", *names, domain=MICROSOFT, num_heads=4)
    h = b.add("Add", "x", b.add("MatMul", h, b.weight(32, 16)))
    y = b.add("MatMul", b.add("Relu", b.add("MatMul", h, b.weight(16, 48))), b.weight(48, 16))
    source, target = tmp_path / "float.onnx", tmp_path / "quantised.onnx"
    onnx.save(b.model({"x": [1, 6, 16]}, {y: [1, 6, 16]}), source)
    given = {"WeightSymmetric": symmetric, "DefaultTensorType": TensorProto.FLOAT}
    quantization.quantize_dynamic(source, target, per_channel=True, extra_options=given)
    assert "QAttention" in {node.op_type for node in onnx.load(target).graph.node}
    result = prune(target, flops=0.5, samples=16, measure=False, cache=False)
    assert result.verdict.passed
    assert result.after.macs <= 0.5 * result.before.macs


# --- embeddings


def embeddings() -> onnx.ModelProto:
    """Ids and segments: [2, 3]; tables of width 6; a product behind."""
    b = Quantising(5)
    shapes = [(9, 6), (5, 6), (2, 6), (6,), (6,)]
    parts = [b.quantised(shape, (), "unsigned") for shape in shapes]
    columns = [list(names) for names in zip(*parts, strict=True)]
    mask = b.constant(np.ones((2, 3), np.int32))
    inputs = ["i", "s", *columns[0], mask, *columns[1], *columns[2]]
    h, _ = b.add("QEmbedLayerNormalization", *inputs, outputs=2, domain=MICROSOFT)
    y = b.add("MatMul", h, b.weight(6, 4))
    ends = [helper.make_tensor_value_info(n, TensorProto.INT32, [2, 3]) for n in ("i", "s")]
    out = helper.make_tensor_value_info(y, TensorProto.FLOAT, [2, 3, 4])
    graph = helper.make_graph(b.nodes, "g", ends, [out], b.initializers)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def test_embeddings_are_normalised_over_what_could_leave() -> None:
    model = load(embeddings())
    shapes = infer(model)
    assert index_bounds(model, shapes, "i") == [9]
    assert index_bounds(model, shapes, "s") == [2]
    relations = relate(model, shapes)
    assert [len(shift.slots) for shift in relations.shifts] == [6]
    assert not prepare(embeddings()).analysis.coupling.groups
