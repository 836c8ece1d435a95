"""An addition and the LayerNormalization after it stay two kernels: the fused one is slower."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from graphprune.model import Model, label, set_initializer
from graphprune.pipeline import Change, Context, PassResult
from graphprune_passes.open_skips import opened_from

FUSED = "SkipLayerNormalization"
AXES_AS_INPUT = 13  # opset from which Unsqueeze takes its axes as an input
AXES = "graphprune_first_axis"
WHY = "ONNX Runtime's fused kernel is slower on this target"


@dataclass(frozen=True)
class PartNorms:
    """LayerNormalization over the last axis of a sum is done with an axis more in front. That costs
    nothing, and keeps ONNX Runtime from making one SkipLayerNormalization of the two.

    1. Unsqueeze the sum in front. 2. Normalise. 3. Squeeze what comes out.
    """

    name: str = "part_norms"

    def run(self, model: Model, context: Context) -> PassResult:
        if model.opsets.get("", 1) < AXES_AS_INPUT:
            return PassResult(model)
        nodes: list[onnx.NodeProto] = []
        changes = []
        for node in model.nodes:
            if not _follows_a_sum(model, node):
                nodes.append(node)
                continue
            nodes += _parted(node)
            changes.append(Change(self.name, label(node), "fusion", FUSED, "two kernels", WHY))
        if not changes:
            return PassResult(model)
        axes = set_initializer(AXES, np.zeros(1, np.int64))
        weights = [*model.initializers.values(), axes]
        return PassResult(model.with_graph(nodes, weights), tuple(changes))


def _follows_a_sum(model: Model, node: onnx.NodeProto) -> bool:
    """LayerNormalization over the last axis, whose other outputs nothing reads, of an Add's. Not of
    one that the given model has fused, and gets back so."""
    if opened_from(node):
        return False
    if node.op_type != "LayerNormalization" or node.domain or AXES in model.initializers:
        return False
    axis = next((a.i for a in node.attribute if a.name == "axis"), -1)
    source = model.producer.get(node.input[0])
    return (
        axis == -1
        and len([name for name in node.output if name]) == 1
        and source is not None
        and model.nodes[source].op_type == "Add"
    )


def _parted(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    data, output = node.input[0], node.output[0]
    wide, normal = f"{output}/graphprune_wide", f"{output}/graphprune_normal"
    new = onnx.NodeProto()
    new.CopyFrom(node)
    new.input[0], new.output[0] = wide, normal
    before = helper.make_node("Unsqueeze", [data, AXES], [wide], name=wide)
    after = helper.make_node("Squeeze", [normal, AXES], [output], name=f"{normal}_out")
    return [before, new, after]
