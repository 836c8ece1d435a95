"""Arithmetic written behind a model: a loss over its tensors, further inputs and outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import onnx
from onnx import helper

from graphprune.errors import ModelError
from graphprune.gradient.tape import Tape, Value
from graphprune.model import Model
from graphprune.shapes import Shapes


def tape_for(model: Model) -> Tape:
    taken = {value.name for value in model.graph.input} | set(model.initializers)
    taken |= {name for node in model.nodes for name in node.output}
    return Tape(model.opsets.get("", 0), taken)


def value_of(tape: Tape, shapes: Shapes, name: str) -> Value:
    shape = shapes.shape.get(name)
    if shape is None:
        raise ModelError("the shape of an inner tensor is unknown", f"tensor {name!r}")
    return Value(tape, name, shape, shapes.dtype[name])


def extended(model: Model, tape: Tape, outputs: Sequence[Value], inputs: Sequence[Value]) -> Model:
    """The model with the tape's nodes, these outputs and more inputs, less what is not needed."""
    skeleton = onnx.ModelProto()
    skeleton.CopyFrom(model.skeleton)
    del skeleton.graph.output[:]
    for values, place in ((outputs, skeleton.graph.output), (inputs, skeleton.graph.input)):
        for value in values:
            place.append(helper.make_tensor_value_info(value.name, value.dtype, value.shape))
    tensors = [*model.initializers.values(), *tape.constants.values()]
    return replace(model, skeleton=skeleton).with_graph(
        [*model.nodes, *tape.nodes], tensors, value_info=()
    )
