"""ONNX Runtime's own operators whose outputs have the shapes of an ONNX operator's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx
from onnx import defs, helper

NEWEST = 13  # the stand-ins' opset; since then lists have become inputs, and shapes are the same


@dataclass(frozen=True)
class StandIn:
    """``operator`` applied to ``inputs``; the element type is that of the first of ``like`` given.

    The inputs from ``every`` on are taken at that stride: (tensor, scale, zero point) triples.
    """

    operator: str
    inputs: tuple[int, ...]
    like: tuple[int, ...] = (0,)
    every: int = 0

    def positions(self, count: int) -> tuple[int, ...]:
        return tuple(range(self.inputs[0], count, self.every)) if self.every else self.inputs


TABLE = {
    "QuantizeLinear": StandIn("Identity", (0,), (2,)),
    "DequantizeLinear": StandIn("Identity", (0,), (1,)),
    "QLinearAdd": StandIn("Add", (0, 3)),
    "QLinearMul": StandIn("Mul", (0, 3)),
    "QLinearWhere": StandIn("Where", (0, 1, 4), (1,)),
    "QLinearConcat": StandIn("Concat", (2,), (2,), every=3),
    "QLinearSigmoid": StandIn("Sigmoid", (0,)),
    "QLinearLeakyRelu": StandIn("LeakyRelu", (0,)),
    "QLinearSoftmax": StandIn("Softmax", (0,)),
    "QLinearAveragePool": StandIn("AveragePool", (0,)),
    "QLinearGlobalAveragePool": StandIn("GlobalAveragePool", (0,)),
    "QGemm": StandIn("Gemm", (0, 3), (8, 1)),
    "MatMulIntegerToFloat": StandIn("MatMul", (0, 1), (2,)),
    "DynamicQuantizeMatMul": StandIn("MatMul", (0, 1), (2,)),
}


def stand_in(
    node: onnx.NodeProto, types: Mapping[str, onnx.TypeProto], opset: int
) -> tuple[onnx.NodeProto, defs.OpSchema, dict[str, onnx.TypeProto], int] | None:
    """A node of ONNX, its schema, its inputs' types (as floats), and the outputs' element type."""
    found = TABLE.get(node.op_type)
    if node.domain != "com.microsoft" or found is None or opset < 1:
        return None
    if any(a.name == "channels_last" and a.i for a in node.attribute):
        return None
    given = [name for name in (_at(node, i) for i in found.like) if name]
    names = [_at(node, i) for i in found.positions(len(node.input))]
    if not given or not all(_has_shape(types.get(name)) for name in names):
        return None
    schema = defs.get_schema(found.operator, min(NEWEST, opset), "")
    plain = helper.make_node(found.operator, names, [node.output[0]])
    plain.attribute.extend(a for a in node.attribute if a.name in schema.attributes)
    floats = {}
    for name in names:
        floats[name] = onnx.TypeProto()
        floats[name].CopyFrom(types[name])
        condition = found.operator == "Where" and name == names[0]
        kind = onnx.TensorProto.BOOL if condition else onnx.TensorProto.FLOAT
        floats[name].tensor_type.elem_type = kind
    return plain, schema, floats, types[given[0]].tensor_type.elem_type


def _at(node: onnx.NodeProto, index: int) -> str:
    return node.input[index] if index < len(node.input) else ""


def _has_shape(proto: onnx.TypeProto | None) -> bool:
    return proto is not None and proto.tensor_type.HasField("shape")
