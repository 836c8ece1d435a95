"""Quantised operators as float ones: which operator each stands for, and where its inputs are.

The one table of it: shapes, rules and the proof without rounding all read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx

MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Q:
    """Where an input stands, and those that hold its scale and zero point if it is quantised.

    Vectors of them run along ``axis``. A ``bias`` counts in products of the first two scales. With
    ``swapped`` the float operator has the last two axes the other way round.
    """

    data: int
    scale: int | None = None
    zero: int | None = None
    axis: int = 0
    bias: bool = False
    swapped: bool = False


@dataclass(frozen=True)
class Reading:
    """``operator`` of ``domain`` applied to ``inputs``, quantised with the scale and zero point at
    ``result``.

    ``every``: the first input and its like, at that stride up to the node's last input.
    ``added``: the place of a float bias that the operator has no input for.
    """

    operator: str
    inputs: tuple[Q, ...]
    result: tuple[int, ...] = ()
    every: int = 0
    added: int | None = None
    domain: str = ""

    def shown(self, node: onnx.NodeProto) -> tuple[Q, ...]:
        """The inputs, for a node of so many; a weight that is transposed has its columns first."""
        if self.every:
            first = self.inputs[0].data
            return tuple(Q(i, i + 1, i + 2) for i in range(first, len(node.input), self.every))
        if self.operator == "Gemm" and any(a.name == "transB" and a.i for a in node.attribute):
            a, b, *rest = self.inputs
            return (a, Q(b.data, b.scale, b.zero, 0), *rest)
        return self.inputs


READINGS: Mapping[tuple[str, str], Reading] = {
    ("", "QLinearConv"): Reading("Conv", (Q(0, 1, 2), Q(3, 4, 5), Q(8, bias=True)), (6, 7)),
    ("", "ConvInteger"): Reading("Conv", (Q(0, None, 2), Q(1, None, 3))),
    ("", "QLinearMatMul"): Reading("MatMul", (Q(0, 1, 2, -2), Q(3, 4, 5, -1)), (6, 7)),
    ("", "MatMulInteger"): Reading("MatMul", (Q(0, None, 2, -2), Q(1, None, 3, -1))),
    (MICROSOFT, "MatMulIntegerToFloat"): Reading(
        "MatMul", (Q(0, 2, 4, -2), Q(1, 3, 5, -1)), added=6
    ),
    (MICROSOFT, "DynamicQuantizeMatMul"): Reading("MatMul", (Q(0), Q(1, 2, 3, -1)), added=4),
    (MICROSOFT, "QGemm"): Reading("Gemm", (Q(0, 1, 2), Q(3, 4, 5, 1), Q(6, bias=True)), (7, 8)),
    (MICROSOFT, "DynamicQuantizeLSTM"): Reading(
        "LSTM",
        (Q(0), Q(1, 8, 9, swapped=True), Q(2, 10, 11, swapped=True), *(Q(i) for i in range(3, 8))),
    ),
    (MICROSOFT, "QAttention"): Reading(
        "Attention", (Q(0, 3, 6), Q(1, 4, 7, -1), Q(2), Q(5), Q(8)), domain=MICROSOFT
    ),
    (MICROSOFT, "QEmbedLayerNormalization"): Reading(
        "EmbedLayerNormalization",
        (Q(0), Q(1), *(Q(i, i + 6, i + 11) for i in range(2, 7)), Q(7)),
        domain=MICROSOFT,
    ),
    (MICROSOFT, "QLinearAdd"): Reading("Add", (Q(0, 1, 2), Q(3, 4, 5)), (6, 7)),
    (MICROSOFT, "QLinearMul"): Reading("Mul", (Q(0, 1, 2), Q(3, 4, 5)), (6, 7)),
    (MICROSOFT, "QLinearWhere"): Reading("Where", (Q(0), Q(1, 2, 3), Q(4, 5, 6)), (7, 8)),
    (MICROSOFT, "QLinearConcat"): Reading("Concat", (Q(2, 3, 4),), (0, 1), every=3),
    (MICROSOFT, "QLinearSigmoid"): Reading("Sigmoid", (Q(0, 1, 2),), (3, 4)),
    (MICROSOFT, "QLinearLeakyRelu"): Reading("LeakyRelu", (Q(0, 1, 2),), (3, 4)),
    (MICROSOFT, "QLinearSoftmax"): Reading("Softmax", (Q(0, 1, 2),), (3, 4)),
    (MICROSOFT, "QLinearAveragePool"): Reading("AveragePool", (Q(0, 1, 2),), (3, 4)),
    (MICROSOFT, "QLinearGlobalAveragePool"): Reading("GlobalAveragePool", (Q(0, 1, 2),), (3, 4)),
}


def reading_of(node: onnx.NodeProto) -> Reading | None:
    """What a quantised operator stands for; ``None`` for any other."""
    domain = "" if node.domain == "ai.onnx" else node.domain
    return READINGS.get((domain, node.op_type))


def channels_last(node: onnx.NodeProto) -> bool:
    """Whether a pool of ONNX Runtime's own has its channels in an order that ONNX's cannot have."""
    return any(a.name == "channels_last" and a.i for a in node.attribute)
