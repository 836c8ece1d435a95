"""Fold BatchNormalization into the convolution or Gemm before it, where that is exact."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from graphprune.batch_norm import BatchNorm, batch_norm
from graphprune.linear import Linear, Matrix, linears
from graphprune.model import Model, label
from graphprune.pipeline import Change, Context, PassResult
from graphprune.rewriting import rewritten
from graphprune_passes.lift_constants import rename_outputs


@dataclass(frozen=True)
class FoldBatchNorm:
    """1. A BatchNormalization with constant statistics that alone reads a linear operator's output
       is multiplied into the operator's weights and bias, in float64.
    2. One in training mode, or whose operator shares its weights with others, is left alone.
    """

    name: str = "fold_batch_norm"

    def run(self, model: Model, context: Context) -> PassResult:
        folds = {
            linear.y: (linear, norm)
            for linear in linears(model)
            if linear.kind in ("Conv", "ConvTranspose", "Gemm")
            and (norm := _normalisation(model, linear)) is not None
            and _one_number_per_output(model, linear, norm)
        }
        if not folds:
            return PassResult(model)
        done = rewritten(model, [_folded(model, *fold) for fold in folds.values()])
        alias = {norm.x: norm.y for _, norm in folds.values()}
        nodes = [
            rename_outputs(node, alias)
            for node in done.nodes
            if node.op_type != "BatchNormalization" or node.input[0] not in alias
        ]
        changes = [
            Change(
                self.name,
                label(model.nodes[model.producer[norm.y]]),
                "node",
                "kept",
                "folded",
                linear.weight,
            )
            for linear, norm in folds.values()
        ]
        return PassResult(done.with_graph(nodes, done.initializers.values()), tuple(changes))


def _normalisation(model: Model, linear: Linear) -> BatchNorm | None:
    """The BatchNormalization that alone reads this operator, if there is one."""
    readers = model.consumers.get(linear.y or "", [])
    if len(readers) != 1 or readers[0][1] != 0 or linear.y in model.output_names:
        return None
    return batch_norm(model, model.nodes[readers[0][0]])


def _one_number_per_output(model: Model, linear: Linear, norm: BatchNorm) -> bool:
    """False for opset 7's statistics per position."""
    return bool(norm.scale.size == linear.matrix(model).shape[1] * linear.groups)


def _folded(model: Model, linear: Linear, norm: BatchNorm) -> tuple[Linear, Matrix, Matrix]:
    factor = norm.scale / np.sqrt(norm.spread)
    matrix = linear.matrix(model)
    old = linear.offset(model, factor.size)
    bias = (old.reshape(-1) - norm.mean) * factor + norm.shift
    return linear, matrix * factor.reshape(linear.groups, -1, 1), bias.reshape(old.shape)
