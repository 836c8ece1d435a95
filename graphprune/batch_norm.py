"""BatchNormalization in its inference form: what it stored of its input, and how it scales it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from graphprune.model import Model

Floats = NDArray[np.float64]
EPSILON = 1e-5  # ONNX's default


@dataclass(frozen=True)
class BatchNorm:
    """y = scale (x - mean) / sqrt(variance + epsilon) + shift, each [channels]."""

    x: str
    y: str
    scale: Floats
    shift: Floats
    mean: Floats
    variance: Floats
    epsilon: float

    @property
    def spread(self) -> Floats:
        """The variance with epsilon: what differences are divided by, squared."""
        return self.variance + self.epsilon


def batch_norm(model: Model, node: onnx.NodeProto) -> BatchNorm | None:
    """The node's constants; ``None`` where it is another operator, trains, or reads what is not
    known before run time."""
    if node.op_type != "BatchNormalization" or node.domain not in ("", "ai.onnx"):
        return None
    settings = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if settings.get("training_mode", 0) or any(node.output[1:]):
        return None
    if len(node.input) != 5 or not model.constant_names.issuperset(node.input[1:]):
        return None
    arrays = [model.array(name) for name in node.input[1:]]
    if len({array.shape for array in arrays}) > 1 or any(a.dtype.kind in "OSU" for a in arrays):
        return None  # damaged: ONNX Runtime says so
    scale, shift, mean, variance = (array.astype(np.float64) for array in arrays)
    epsilon = float(settings.get("epsilon", EPSILON))
    return BatchNorm(node.input[0], node.output[0], scale, shift, mean, variance, epsilon)


def batch_norms(model: Model) -> list[BatchNorm]:
    """All of them, in order."""
    return [found for node in model.nodes if (found := batch_norm(model, node)) is not None]
