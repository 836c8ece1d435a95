"""Masks that a pruning tool left in the graph are multiplied into their weights."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
import onnx

from graphprune import cleaned
from graphprune.coupling import FLOAT_TYPES
from graphprune.errors import UncomputableError
from graphprune.model import Array, Model, set_initializer
from graphprune.pipeline import Change, Context, PassResult

SEVERAL = 2  # elements: one number is a scale


@dataclass(frozen=True)
class FoldMasks:
    """1. Where a float initialiser is multiplied with a constant of zeros and ones, the product is
       stored instead.
    2. An initialiser that is read anywhere else stays: it would be stored twice.
    """

    name: str = "fold_masks"

    def run(self, model: Model, context: Context) -> PassResult:
        stored: dict[str, onnx.TensorProto] = {}
        changes = []
        for node in model.nodes:
            found = _masked(model, node)
            if found is not None:
                weight, mask = found
                value = model.array(weight) * mask.astype(model.array(weight).dtype)
                stored[node.output[0]] = set_initializer(node.output[0], value)
                change = Change(
                    self.name, node.output[0], cleaned.MASK, "in the graph", "stored", weight
                )
                changes.append(change)
        if not stored:
            return PassResult(model)
        nodes = [node for node in model.nodes if not stored.keys() & set(node.output)]
        tensors = [*model.initializers.values(), *stored.values()]
        return PassResult(model.with_graph(nodes, tensors), tuple(changes))


def _masked(model: Model, node: onnx.NodeProto) -> tuple[str, Array] | None:
    """The weight and the mask that a node multiplies."""
    if node.op_type != "Mul" or node.domain or node.output[0] in model.output_names:
        return None
    if not model.constant_names.issuperset(node.input):
        return None
    for weight, other in (node.input, node.input[::-1]):
        tensor = model.initializers.get(weight)
        if tensor is None or tensor.data_type not in FLOAT_TYPES or weight == other:
            continue
        if len(model.consumers[weight]) > 1 or prod(tensor.dims) < SEVERAL:
            continue
        try:
            mask = model.array(other)
        except UncomputableError:
            continue
        fits = mask.ndim <= len(tensor.dims) and mask.size >= SEVERAL
        if fits and bool(np.isin(np.unique(mask.astype(np.float64)), (0, 1)).all()):
            return weight, mask
    return None
