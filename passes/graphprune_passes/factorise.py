"""Replace a linear layer by two, at full rank: what is between them is an axis like any other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx
from onnx import helper

from graphprune.linear import INNER, Linear, Matrix, linears
from graphprune.model import Array, Model, label, set_initializer
from graphprune.pipeline import Change, Context, PassResult

SHAPED = ("kernel_shape", "strides", "dilations", "pads", "auto_pad", "group")


@dataclass(frozen=True)
class Factorise:
    """1. A MatMul or Gemm of the named weight becomes two: the first gives a position for every
       direction, the second keeps the node's name, the weight's name, and the bias.
    2. A Conv becomes one of the same window, which gives the directions, and one of 1 x 1.

    ``factors``: weight → (left [out, rank], right [rank, in]) with left @ right the weight, Gemm's
    alpha multiplied in.
    """

    factors: Mapping[str, tuple[Matrix, Matrix]] = field(default_factory=dict)
    name: str = "factorise"

    def run(self, model: Model, context: Context) -> PassResult:
        chosen = {k.node: k for k in linears(model) if k.weight in self.factors}
        tensors = dict(model.initializers)
        nodes: list[onnx.NodeProto] = []
        changes = []
        for i, node in enumerate(model.nodes):
            if i not in chosen:
                nodes.append(node)
                continue
            linear = chosen[i]
            left, right = self.factors[linear.weight]
            made = _two(node, linear)
            nodes += made
            inner = f"{linear.weight}/{INNER}"
            old = model.initializers[linear.weight]
            for name, value in (
                (inner, _as_first(linear, right, tuple(old.dims))),
                (linear.weight, _as_second(linear, left, len(old.dims))),
            ):
                tensors[name] = set_initializer(name, value.astype(model.array(old.name).dtype))
                tensors[name].doc_string = old.doc_string
            text = f"{list(tensors[linear.weight].dims)} and {list(tensors[inner].dims)}"
            why = "a layer of lower rank"
            changes.append(Change(self.name, label(node), "weight", str(list(old.dims)), text, why))
        if not changes:
            return PassResult(model)
        return PassResult(model.with_graph(nodes, tensors.values()), tuple(changes))


def _two(node: onnx.NodeProto, linear: Linear) -> list[onnx.NodeProto]:
    """The node that gives the directions, and the one that reads them."""
    between = f"{node.output[0]}/{INNER}"
    first, second = onnx.NodeProto(), onnx.NodeProto()
    first.CopyFrom(node)
    second.CopyFrom(node)
    first.name = f"{label(node)}/{INNER}"
    del first.input[2:]
    first.input[1] = f"{linear.weight}/{INNER}"
    first.output[0] = between
    second.input[0] = between
    if linear.kind == "Gemm":  # alpha and beta belong to the second
        _drop(first, ("alpha", "beta"))
    if linear.kind == "Conv":
        _drop(second, SHAPED)
        second.attribute.append(helper.make_attribute("kernel_shape", [1] * len(linear.kernel)))
    return [first, second]


def _drop(node: onnx.NodeProto, names: tuple[str, ...]) -> None:
    for attribute in [a for a in node.attribute if a.name in names]:
        node.attribute.remove(attribute)


def _as_first(linear: Linear, right: Matrix, shape: tuple[int, ...]) -> Array:
    if linear.kind == "Conv":
        return right.reshape(len(right), *shape[1:])
    return right if linear.transposed else right.T


def _as_second(linear: Linear, left: Matrix, rank: int) -> Array:
    if linear.kind == "Conv":
        return left.reshape(*left.shape, *[1] * (rank - 2))
    plain = left / linear.alpha
    return plain if linear.transposed else plain.T
