"""Run only the part of a model that some inner tensors need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import onnx
from onnx import helper

from graphprune.model import Model
from graphprune.shapes import Shapes


def tapped(model: Model, names: Sequence[str], shapes: Shapes) -> Model:
    """The model with ``names`` as its only outputs, less all that they do not need.

    The graph's inputs all stay, so the same feeds fit; no output shape is declared, so none can
    be wrong. Names must be written by nodes.
    """
    skeleton = onnx.ModelProto()
    skeleton.CopyFrom(model.skeleton)
    del skeleton.graph.output[:]
    for name in names:
        kind = helper.make_tensor_type_proto(shapes.dtype[name], None)
        skeleton.graph.output.append(helper.make_value_info(name, kind))
    shorter = replace(model, skeleton=skeleton)
    return shorter.with_graph(model.nodes, model.initializers.values(), value_info=[])
