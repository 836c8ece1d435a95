"""What activations look like, from weights alone: random rows of channel values walk the graph.

A tensor is stood for by rows, each the channel values at one position of one imagined sample.
Linear operators multiply them, what moves data moves their columns, and everything else runs on
them as it is. BatchNormalization sets each channel to the mean and variance that it stored, so that
nothing drifts where it is still in the graph. Means and covariances of any tensor, behind any
activation, are then those of its rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx

from graphprune.coupling import Coupling
from graphprune.errors import ModelError
from graphprune.linear import repairable
from graphprune.lookups import index_bounds
from graphprune.model import Array, Model, captured, label
from graphprune.repair.row_rules import RULES
from graphprune.repair.rows import Rows, Step, StopError, alone
from graphprune.runtime import input_dtype
from graphprune.shapes import Shape, Shapes

PICTURE = 0.9  # correlation of the channels of a graph input that is a picture
FEW = 4  # channels of a picture at most


def propagate(
    model: Model, shapes: Shapes, coupling: Coupling, *, rows: int = 2048, seed: int = 0
) -> Iterator[tuple[str, Rows | str]]:
    """Every tensor that depends on the inputs, in node order, with its rows, or with the reason
    why nothing is known of it. One walk; rows that no later node reads are let go.

    Floating inputs are standard normal, ids any of their table's, masks all ones.
    """
    rng = np.random.default_rng(seed)
    constants = {*shapes.value, *model.constant_names}
    linear = {found.node: found for found in repairable(model)}
    last = {name: max(i for i, _ in reads) for name, reads in model.consumers.items()}
    known: dict[str, Rows | str] = {}
    fixed: dict[str, Array] = {}  # constants by the sizes of the inputs, too large for ``shapes``
    for value in model.inputs:
        axis = _channel_axis(model, coupling, value.name)
        known[value.name] = _started(model, shapes, value, axis, rows, rng)
        yield value.name, known[value.name]
    for i, node in enumerate(model.nodes):
        outputs = [name for name in node.output if name]
        if constants.issuperset(outputs):
            continue
        if constants.issuperset(filter(None, node.input)) and not captured(node):
            fixed |= _computed(Step(model, shapes, node, None, {}, fixed, rows, rng))
            constants |= fixed.keys()
            continue
        read = {name: known[name] for name in node.input if name in known}
        given = {name: x for name, x in read.items() if isinstance(x, Rows)}
        unknown = [reason for reason in read.values() if isinstance(reason, str)]
        found: dict[str, Rows | str] = dict.fromkeys(outputs, *unknown[:1])
        if not unknown or node.op_type == "BatchNormalization":
            found = _results(Step(model, shapes, node, linear.get(i), given, fixed, rows, rng))
        known |= found
        yield from found.items()
        for name in {*node.input, *outputs}:
            if last.get(name, i) <= i:
                known.pop(name, None)


def _results(step: Step) -> dict[str, Rows | str]:
    """The node's outputs by name."""
    node = step.node
    nothing = f"{node.op_type} {label(node)!r}: a further output"
    outputs: dict[str, Rows | str] = dict.fromkeys(filter(None, node.output), nothing)
    try:
        if node.op_type not in RULES:
            raise StopError("no rule for it")
        done = RULES[node.op_type](step)
        for name, rows in zip(filter(None, node.output), done, strict=False):
            _check(rows, step.shape(name))
            outputs[name] = rows
    except (StopError, ModelError) as error:
        return dict.fromkeys(outputs, f"{node.op_type} {label(node)!r}: {error}")
    return outputs


def _computed(step: Step) -> dict[str, Array]:
    """The outputs of a node that reads constants alone."""
    feeds = {name: step.value(name) for name in step.names}
    types = {name: step.shapes.dtype[name] for name in feeds}
    outputs = {name: step.shapes.dtype[name] for name in step.node.output if name}
    return dict(zip(outputs, alone(step.model, step.node, feeds, types, outputs), strict=True))


def _check(rows: Rows, shape: Shape) -> None:
    held = rows.index.shape
    if len(held) != len(shape) or any(a not in (1, b) for a, b in zip(held, shape, strict=True)):
        raise StopError(f"{list(held)} stands for no {list(shape)}")


def _started(
    model: Model,
    shapes: Shapes,
    value: onnx.ValueInfoProto,
    axis: int | None,
    rows: int,
    rng: np.random.Generator,
) -> Rows:
    shape = shapes.inputs[value.name]
    lengths = [1] * len(shape)
    kind = input_dtype(value).kind
    bound = max(2, min(index_bounds(model, shapes, value.name), default=2))
    if kind in "iu" or (kind == "f" and bound > 2):
        ids = np.ones(rows) if bound == 2 else rng.integers(0, bound, rows)
        return Rows.of(ids.reshape(rows, *lengths))
    if kind != "f" or not shape:
        return Rows.of(np.ones((rows, *lengths)))
    axis = (1 if len(shape) > 2 else len(shape) - 1) if axis is None else axis
    lengths[axis] = shape[axis]
    normal = rng.standard_normal((rows, *lengths))
    if len(shape) > 2 and shape[axis] <= FEW:
        shared = rng.standard_normal((rows, *(1,) * len(shape)))
        normal = PICTURE**0.5 * shared + (1 - PICTURE) ** 0.5 * normal
    return Rows.of(normal)


def _channel_axis(model: Model, coupling: Coupling, name: str) -> int | None:
    """The axis of a graph input that a weight's contracted axis is tied to."""
    slots = coupling.relations.slots.tensors
    contracted = [
        slots[linear.weight][linear.contracted_axis].slots
        for linear in repairable(model)
        if linear.weight in slots
    ]
    read = np.unique(coupling.labels[np.concatenate([*contracted, np.empty(0, np.int64)])])
    tied = [
        axis.index
        for axis in (slots[name].axes if name in slots else ())
        if len(axis) > 1 and np.isin(coupling.labels[axis.slots], read).all()
    ]
    return tied[0] if tied else None
