"""The walk backwards over a graph."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper

from graphprune.control import bodies
from graphprune.errors import ModelError
from graphprune.gradient.rules import RULES, Step, StopError
from graphprune.gradient.tape import Tape, Value
from graphprune.model import Model, captured, label, set_initializer
from graphprune.shapes import Shapes

FLOATS = {TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16}
OLDEST_OPSET = 9  # Sign, Where, Erf and MaxPool's indices
STANDARD = ("", "ai.onnx")


@dataclass(frozen=True)
class Gradient:
    """A model that computes its outputs and one gradient, in one run.

    ``name`` is the output that holds the gradient, in the shape of the input it belongs to;
    ``None`` where nothing flows. ``stopped`` says which nodes it could not pass, as
    ``operator (node: reason)``.
    """

    model: Model
    name: str | None
    stopped: tuple[str, ...]


@dataclass(frozen=True)
class Gradients:
    """The same of several inputs: ``names`` are in their order."""

    model: Model
    names: tuple[str | None, ...]
    stopped: tuple[str, ...]


def gradient(model: Model, shapes: Shapes, wrt: str, of: str) -> Gradient:
    """The model with one output more: d(sum of ``of``)/d(``wrt``)."""
    found = gradients(model, shapes, (wrt,), of)
    return Gradient(found.model, found.names[0], found.stopped)


def gradients(model: Model, shapes: Shapes, wrt: Sequence[str], of: str) -> Gradients:
    """The model with one output more for each of ``wrt``: d(sum of ``of``)/d(that one).

    ``wrt`` are graph inputs and ``of`` a tensor of the model, a loss most often, whose value can be
    an output too, so that one run yields all. Shapes must be concrete: ``infer`` at the batch that
    will be run; the result's inputs declare them. Raises ``ModelError`` for a model older than
    opset 9.
    """
    opset = model.opsets.get("", 0)
    if opset < OLDEST_OPSET:
        raise ModelError(
            f"gradients need opset {OLDEST_OPSET}, the model has {opset}",
            hint="Convert it with onnx.version_converter, or export it again.",
        )
    model = _frozen(model, shapes)
    active = _depending(model, shapes, wrt)
    nodes = [_copied(node) for node in model.nodes]
    tape = Tape(opset, _names(model))
    waiting: dict[str, list[Value]] = {}
    if of in active:
        ones = np.ones(shapes.shape[of] or (), helper.tensor_dtype_to_np_dtype(shapes.dtype[of]))
        waiting[of] = [tape.constant(ones)]
    stopped: dict[str, None] = {}
    for node in reversed(nodes):
        parts = [waiting.pop(name, []) for name in node.output]
        if not any(parts):
            continue
        try:
            given = _contributions(model, shapes, tape, node, parts, active)
        except StopError as stop:
            stopped[f"{node.op_type} ({label(node)}: {stop})"] = None
            continue
        for name, value in given:
            waiting.setdefault(name, []).append(value)
    totals = [_total(waiting[w], shapes.inputs[w]) if w in waiting else None for w in wrt]
    written = _static(model, shapes, nodes, tape, [t for t in totals if t is not None])
    names = tuple(None if total is None else total.name for total in totals)
    return Gradients(written, names, tuple(stopped))


def _contributions(
    model: Model,
    shapes: Shapes,
    tape: Tape,
    node: onnx.NodeProto,
    parts: list[list[Value]],
    active: frozenset[str],
) -> list[tuple[str, Value]]:
    """What the node's rule adds to the cotangents of its inputs, from those of its outputs."""
    found = RULES.get(node.op_type) if node.domain in STANDARD else None
    if found is None:
        raise StopError("no rule")
    step = Step(model, shapes, tape, node, active)
    for name, several in zip(node.output, parts, strict=True):
        step.cotangents.append(_total(several, step.shape_of(name)) if several else None)
    found(step)
    return step.given


def _total(parts: list[Value], shape: tuple[int, ...]) -> Value:
    """The sum of all contributions, small ones first, broadcast at last."""
    first, *others = sorted(parts, key=lambda value: int(np.prod(value.shape)))
    total = first
    for value in others:
        total = total + value
    return total.expand(shape)


def _frozen(model: Model, shapes: Shapes) -> Model:
    """Shape arithmetic replaced by its values, which concrete shapes decide."""
    kept, known = [], set()
    for node in model.nodes:
        outputs = {name for name in node.output if name}
        if not bodies(node) and outputs <= shapes.value.keys():
            known |= outputs
        else:
            kept.append(node)
    values = [set_initializer(name, shapes.value[name]) for name in sorted(known)]
    return model.with_graph(kept, [*model.initializers.values(), *values], value_info=())


def _depending(model: Model, shapes: Shapes, wrt: Sequence[str]) -> frozenset[str]:
    """Floating-point tensors whose value follows the inputs'."""
    active = set(wrt)
    for node in model.nodes:
        if active.intersection(node.input) or active.intersection(captured(node)):
            active.update(name for name in node.output if shapes.dtype.get(name) in FLOATS)
    return frozenset(active)


def _names(model: Model) -> set[str]:
    values: Iterable[str] = (value.name for value in model.graph.input)
    return {*values, *model.initializers, *(name for node in model.nodes for name in node.output)}


def _copied(node: onnx.NodeProto) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    return copy


def _static(
    model: Model, shapes: Shapes, nodes: list[onnx.NodeProto], tape: Tape, results: list[Value]
) -> Model:
    """The model with the tape's nodes and the gradients as its last outputs."""
    skeleton = onnx.ModelProto()
    skeleton.CopyFrom(model.skeleton)
    for value in skeleton.graph.input:
        if value.name in shapes.inputs:
            kind = value.type.tensor_type.elem_type
            value.type.CopyFrom(helper.make_tensor_type_proto(kind, shapes.inputs[value.name]))
    for value in skeleton.graph.output:  # a symbolic batch there would contradict the inputs'
        value.type.tensor_type.ClearField("shape")
    for result in {result.name: result for result in results}.values():
        skeleton.graph.output.append(
            helper.make_tensor_value_info(result.name, result.dtype, result.shape)
        )
    tensors = [*model.initializers.values(), *tape.constants.values()]
    return Model(skeleton, model.initializers, model.data_files).with_graph(
        [*nodes, *tape.nodes], tensors, value_info=()
    )
