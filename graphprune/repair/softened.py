"""A spelled model whose activations clip where integers end but are not rounded, so that gradients
pass (the straight-through estimator: Bengio et al., arXiv 1308.3432); weights are on their grids.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
from onnx import helper

from graphprune.model import Model, set_initializer

# What may stand between a QuantizeLinear and the node that reads real numbers again.
MOVED = {"Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity", "MaxPool"}
MOVED |= {"Slice", "Split", "Concat", "Gather", "Expand"}
ENDS = ("/graphprune_low", "/graphprune_high")
BOUNDS = 11  # the opset from which Clip has inputs


def softened(model: Model) -> Model:
    """The model without rounding of activations; itself where that cannot be said."""
    coded: set[str] = set()  # integers, which stand for floats from now on
    nodes: list[onnx.NodeProto] = []
    tensors = dict(model.initializers)
    for node in model.nodes:
        if model.constant_names.issuperset(filter(None, node.output)):
            nodes.append(node)
        elif node.op_type == "QuantizeLinear":
            ends = _ends(model, node)
            if ends is None:
                return model
            nodes.append(_clip(model, node, ends, tensors))
            coded.add(node.output[0])
        elif not coded.intersection(node.input):
            nodes.append(node)
        elif node.op_type == "DequantizeLinear":
            nodes.append(helper.make_node("Identity", node.input[:1], node.output))
        elif node.op_type in MOVED:
            nodes.append(node)
            coded.update(node.output)
        else:
            return model
    if not coded or coded & model.output_names:
        return model
    return model.with_graph(nodes, tensors.values(), value_info=())


def read_alike(model: Model, node: onnx.NodeProto) -> bool:
    """Whether all that reads the integers of a QuantizeLinear reads them, perhaps moved, as the
    numbers that they stand for: a DequantizeLinear with its scale and zero point. Else rows of
    them cannot be taken for those numbers."""
    seen, waiting = set(), [node.output[0]]
    while waiting:
        name = waiting.pop()
        for index, _ in model.consumers.get(name, ()):
            reader = model.nodes[index]
            if index in seen or reader.op_type == "Shape":
                continue
            seen.add(index)
            moved = reader.op_type in MOVED and not _joins_constants(model, reader)
            if not moved and not (
                reader.op_type == "DequantizeLinear" and _alike(model, node, reader)
            ):
                return False
            waiting += list(reader.output) if moved else []
    return True


def _joins_constants(model: Model, node: onnx.NodeProto) -> bool:
    return node.op_type == "Concat" and not model.constant_names.isdisjoint(node.input)


def _alike(model: Model, writer: onnx.NodeProto, reader: onnx.NodeProto) -> bool:
    """Equal scales and zero points; of more than one, the same tensors."""
    if list(writer.input[1:]) == list(reader.input[1:]):
        return True
    if len(writer.input) != len(reader.input):
        return False
    names = {*writer.input[1:], *reader.input[1:]}
    if not names <= model.initializers.keys():
        return False
    pairs = zip(writer.input[1:], reader.input[1:], strict=True)
    return all(np.array_equal(model.array(a), model.array(b)) for a, b in pairs)


def hardened(model: Model, tuned: Model) -> Model | None:
    """``model`` with the weights of ``tuned``, which was its softened form; ``None`` where tuning
    has changed more than their values."""
    weights = {n: t for n, t in tuned.initializers.items() if not n.endswith(ENDS)}
    if not weights.keys() <= model.initializers.keys():
        return None
    return replace(model, initializers={**model.initializers, **weights})


def _ends(model: Model, node: onnx.NodeProto) -> tuple[float, float] | None:
    """The least and the largest number that the integers reach."""
    if len(node.input) < 3 or not {*node.input[1:3]} <= model.initializers.keys():
        return None
    scale, zero = (model.array(name) for name in node.input[1:3])
    if scale.size != 1 or zero.dtype.kind not in "iu":
        return None
    span = np.iinfo(zero.dtype)
    low, high = (float(scale.item()) * (end - int(zero.item())) for end in (span.min, span.max))
    return low, high


def _clip(
    model: Model,
    node: onnx.NodeProto,
    ends: tuple[float, float],
    tensors: dict[str, onnx.TensorProto],
) -> onnx.NodeProto:
    if model.opsets.get("", 1) < BOUNDS:
        return helper.make_node("Clip", node.input[:1], node.output, min=ends[0], max=ends[1])
    names = [f"{node.output[0]}{end}" for end in ENDS]
    for name, end in zip(names, ends, strict=True):
        tensors[name] = set_initializer(name, np.asarray(end, np.float32))
    return helper.make_node("Clip", [node.input[0], *names], node.output)
