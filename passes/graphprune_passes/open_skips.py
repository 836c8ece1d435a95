"""Sums inside fused normalisations become nodes: so residual blocks are found, and may leave."""

from __future__ import annotations

from dataclasses import dataclass

import onnx
from onnx import helper

from graphprune.model import Model, label
from graphprune.pipeline import Change, Context, PassResult

FUSED = {  # what normalises a sum → what normalises, and the epsilon of an attribute left out
    "SkipLayerNormalization": ("LayerNormalization", 1e-12),
    "SkipSimplifiedLayerNormalization": ("SimplifiedLayerNormalization", 1e-5),
}
DOMAIN = "com.microsoft"
MARK = "graphprune.opened"  # metadata of the nodes that stand for a fused one: which that was
LINEAR = ("MatMul", "Gemm", "Conv", "MatMulNBits", "FusedMatMul")
X, SKIP, SCALE, SHIFT, BIAS = range(5)  # inputs; of a simplified one the bias comes one earlier
SUM = 3  # output


@dataclass(frozen=True)
class OpenSkips:
    """Where blocks may leave, and while the model is worked on:

        SkipLayerNormalization(x, skip, scale, shift, bias)
        →  LayerNormalization(Add(Add(x, bias), skip), scale, shift)

    1. The bias goes to the term that a linear operator writes: it is its own. To the sum, where
       neither is one.
    2. Left alone: nodes whose mean or deviation is read, or whose parameters are computed.
    """

    name: str = "open_skips"

    def run(self, model: Model, context: Context) -> PassResult:
        if "blocks" not in context.scope.units:
            return PassResult(model)
        nodes: list[onnx.NodeProto] = []
        changes = []
        for node in model.nodes:
            if not _opens(model, node):
                nodes.append(node)
                continue
            nodes += _opened(model, node)
            kind = FUSED[node.op_type][0]
            changes.append(Change(self.name, label(node), "sum", node.op_type, f"Add, {kind}", ""))
        if not changes:
            return PassResult(model)
        return PassResult(model.with_graph(nodes, model.initializers.values()), tuple(changes))


def opened_from(node: onnx.NodeProto) -> str:
    """The fused operator that this node is a part of; empty where there is none."""
    return next((entry.value for entry in node.metadata_props if entry.key == MARK), "")


def _opens(model: Model, node: onnx.NodeProto) -> bool:
    if node.op_type not in FUSED or node.domain != DOMAIN:
        return False
    statistics = [name for name in list(node.output)[1:SUM] if name]
    computed = [
        name for name in list(node.input)[SCALE:] if name and name not in model.initializers
    ]
    return bool(node.output[0]) and not statistics and not computed


def _opened(model: Model, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    kind, usual = FUSED[node.op_type]
    inputs = [*node.input, *[""] * (BIAS + 1 - len(node.input))]
    if kind != "LayerNormalization":  # which has no shift
        inputs.insert(SHIFT, "")
    x, skip, scale, shift, bias = inputs[: BIAS + 1]
    y = node.output[0]
    total = node.output[SUM] if len(node.output) > SUM and node.output[SUM] else f"{y}/sum"
    made: list[onnx.NodeProto] = []

    def add(a: str, b: str, result: str) -> str:
        made.append(helper.make_node("Add", [a, b], [result], result))
        return result

    if bias and _is_linear(model, x):
        x = add(x, bias, f"{x}/biased")
    elif bias and _is_linear(model, skip):
        skip = add(skip, bias, f"{skip}/biased")
    elif bias:
        x, skip = add(x, skip, f"{total}/bare"), bias
    add(x, skip, total)
    normal = helper.make_node(kind, [total, scale, *[shift] * bool(shift)], [y], node.name, axis=-1)
    epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), usual)
    normal.attribute.append(helper.make_attribute("epsilon", epsilon))
    normal.doc_string = node.doc_string
    normal.metadata_props.extend(node.metadata_props)
    made.append(normal)
    for one in made:
        entry = one.metadata_props.add()
        entry.key, entry.value = MARK, node.op_type
    return made


def _is_linear(model: Model, name: str) -> bool:
    """Whether a linear operator writes this, for this node alone."""
    index = model.producer.get(name)
    return index is not None and model.nodes[index].op_type in LINEAR and model.read_once(name)
