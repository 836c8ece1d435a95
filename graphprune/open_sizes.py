"""Sizes that only the data decides (how many are not zero, how many boxes are left): a number that
there can be stands for them, so that what lies behind has a shape and a cost. Their slots are
positions, which the operators' rules pin.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import onnx

from graphprune.control import said
from graphprune.model import Array

FEW = 32  # found by a condition at most: as symbolic sizes are taken
BOXES = 1024  # left of a detector's first stage at most
Shape = tuple[int, ...]


def filled(
    node: onnx.NodeProto, proto: onnx.TypeProto, x: Shape | None, value: Mapping[str, Array]
) -> onnx.TypeProto:
    """``proto``, inferred for an output, with every size that it leaves open; itself where the node
    is none of those whose data decides, or its first input has no known shape ``x``."""
    if node.domain or x is None or not proto.tensor_type.HasField("shape"):
        return proto
    most = _most(node, x, value)
    if most is None:
        return proto
    result = onnx.TypeProto()
    result.CopyFrom(proto)
    for i, dim in enumerate(result.tensor_type.shape.dim):
        if not dim.HasField("dim_value"):
            whole = node.op_type in ("Slice", "TopK")  # what is open is no longer than it was
            dim.dim_value = x[i] if whole and i < len(x) else most
    return result


def _most(node: onnx.NodeProto, x: Shape, value: Mapping[str, Array]) -> int | None:
    """What stands for an open size."""
    kind = node.op_type
    if kind in ("Slice", "TopK"):
        return max(x, default=1)
    if kind == "NonZero":
        return min(FEW, max(1, math.prod(x)))
    if kind in ("Compress", "Unique"):
        axis = said(node, "axis")
        along = math.prod(x) if axis is None else x[int(axis) % max(1, len(x))]
        return min(FEW, max(1, along))
    if kind == "NonMaxSuppression":
        given = value.get(node.input[2]) if len(node.input) > 2 else None
        boxes = x[1] if len(x) > 1 else 1
        most = BOXES if given is None else int(np.reshape(given, -1)[0])
        return max(1, min(BOXES, boxes, most))
    return None
