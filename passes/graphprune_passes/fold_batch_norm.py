"""Fold BatchNormalization into the convolution or Gemm before it, where that is exact."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from graphprune.linear import Linear, Matrix, linears, rewritten
from graphprune.model import Model, label
from graphprune.pipeline import Change, Context, PassResult
from graphprune_passes.lift_constants import rename_outputs

EPSILON = 1e-5  # ONNX's default


@dataclass(frozen=True)
class FoldBatchNorm:
    """1. A BatchNormalization with constant statistics that alone reads a linear operator's output
       is multiplied into the operator's weights and bias, in float64.
    2. One in training mode, or whose operator shares its weights with others, is left alone.
    """

    name: str = "fold_batch_norm"

    def run(self, model: Model, context: Context) -> PassResult:
        folds = {
            norm: linear
            for linear in linears(model)
            if linear.kind in ("Conv", "ConvTranspose", "Gemm")
            and (norm := _normalisation(model, linear)) is not None
            and _one_number_per_output(model, linear, norm)
        }
        if not folds:
            return PassResult(model)
        done = rewritten(model, [_folded(model, linear, i) for i, linear in folds.items()])
        alias = {model.nodes[i].input[0]: model.nodes[i].output[0] for i in folds}
        nodes = [
            rename_outputs(node, alias)
            for node in done.nodes
            if node.op_type != "BatchNormalization" or node.input[0] not in alias
        ]
        changes = [
            Change(self.name, label(model.nodes[i]), "node", "kept", "folded", linear.weight)
            for i, linear in folds.items()
        ]
        return PassResult(done.with_graph(nodes, done.initializers.values()), tuple(changes))


def _normalisation(model: Model, linear: Linear) -> int | None:
    """The BatchNormalization node that alone reads this operator, if there is one."""
    readers = model.consumers.get(linear.y or "", [])
    if len(readers) != 1 or readers[0][1] != 0 or linear.y in model.output_names:
        return None
    index = readers[0][0]
    node = model.nodes[index]
    training = any(a.name == "training_mode" and a.i for a in node.attribute)
    if node.op_type != "BatchNormalization" or training or any(node.output[1:]):
        return None
    return index if all(name in model.constant_names for name in node.input[1:]) else None


def _one_number_per_output(model: Model, linear: Linear, norm: int) -> bool:
    """False for opset 7's statistics per position."""
    outputs = linear.matrix(model).shape[1] * linear.groups
    return bool(model.array(model.nodes[norm].input[1]).size == outputs)


def _folded(model: Model, linear: Linear, norm: int) -> tuple[Linear, Matrix, Matrix]:
    node = model.nodes[norm]
    scale, shift, mean, variance = (model.array(n).astype(np.float64) for n in node.input[1:5])
    epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), EPSILON)
    factor = scale / np.sqrt(variance + epsilon)
    matrix = linear.matrix(model)
    old = linear.offset(model, factor.size)
    bias = (old.reshape(-1) - mean) * factor + shift
    return linear, matrix * factor.reshape(linear.groups, -1, 1), bias.reshape(old.shape)
