"""Shapes of ONNX Runtime's own quantised operators: those of the float operator they stand for."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
from onnx import defs, helper

from graphprune.readings import MICROSOFT, channels_last, reading_of

NEWEST = 13  # opset of the float operators: later ones take lists as inputs, with equal shapes
Types = Mapping[str, onnx.TypeProto]


def stand_in(
    node: onnx.NodeProto, types: Types, opset: int
) -> tuple[onnx.NodeProto, defs.OpSchema, dict[str, onnx.TypeProto], int] | None:
    """A node of ONNX, its schema, its inputs' types (as floats), and the outputs' element type."""
    if node.domain != MICROSOFT or opset < 1 or not node.output or channels_last(node):
        return None
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        operator, names = "Identity", [_at(node, 0)]
        like = _at(node, 2 if node.op_type == "QuantizeLinear" else 1)
    elif (reading := reading_of(node)) is not None:
        shown = [q for q in reading.shown(node) if not q.bias]
        operator, names = reading.operator, [_at(node, q.data) for q in shown]
        coded = reading.result and _at(node, reading.result[0])
        like = _at(node, shown[-1].data if coded else shown[-1].scale) if shown else ""
    else:
        return None
    if not names or not like or not all(_has_shape(types.get(name)) for name in names):
        return None
    schema = defs.get_schema(operator, min(NEWEST, opset), "")
    plain = helper.make_node(operator, names, [node.output[0]])
    plain.attribute.extend(a for a in node.attribute if a.name in schema.attributes)
    floats = {}
    for name in names:
        floats[name] = onnx.TypeProto()
        floats[name].CopyFrom(types[name])
        condition = operator == "Where" and name == names[0]
        kind = onnx.TensorProto.BOOL if condition else onnx.TensorProto.FLOAT
        floats[name].tensor_type.elem_type = kind
    return plain, schema, floats, types[like].tensor_type.elem_type


def _at(node: onnx.NodeProto, index: int | None) -> str:
    return node.input[index] if index is not None and index < len(node.input) else ""


def _has_shape(proto: onnx.TypeProto | None) -> bool:
    return proto is not None and proto.tensor_type.HasField("shape")
