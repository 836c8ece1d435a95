"""One description per operator. ``relate`` asks every node's rule and pins what no rule claims."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from operator import itemgetter

import numpy as np
import onnx
from numpy.typing import NDArray

from graphprune.control import is_open
from graphprune.model import Model, captured, label
from graphprune.relations import Pin, Relations
from graphprune.rules import (
    attention,
    contrib,
    control,
    elementwise,
    indexing,
    linear,
    movement,
    normalisation,
    pooling,
    quantised,
    recurrent,
)
from graphprune.rules.op import Op, RefusedError, Rule, Table
from graphprune.rules.positions import handed_on, pin_numbers
from graphprune.shapes import Shapes, open_values
from graphprune.slots import SlotTensor, number

__all__ = ["BUILTIN", "Op", "RefusedError", "Rule", "Table", "relate"]

Rules = Mapping[tuple[str, str], Rule]

BUILTIN: Rules = {
    **elementwise.table,
    **linear.table,
    **normalisation.table,
    **movement.table,
    **indexing.table,
    **pooling.table,
    **attention.table,
    **contrib.table,
    **recurrent.table,
    **quantised.table,
    **control.table,
}


# What a rule meets in a node that is none: ranks, types or sizes that no such operator has.
ILL_FORMED = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)

BOUNDED = {"Slice", "Split"}  # by values that must not rest on a size that only the data decides


def relate(
    model: Model, shapes: Shapes, rules: Rules = BUILTIN, pin_interface: bool = True
) -> Relations:
    """Ask the rule of every node; whatever no rule speaks of is pinned with a reason."""
    slots = number(shapes.shape)
    relations = Relations(slots, slots.total)
    decided = open_values(model, shapes, inputs=False)
    claimed = np.zeros(slots.total, dtype=bool)
    for index, node in enumerate(model.nodes):
        _relate_node(index, model, shapes, rules, relations, decided, claimed)
        for name in captured(node):
            _pin_tensor(relations, name, f"captured by the body of {node.op_type}", index)
    pin_numbers(model, relations)
    if pin_interface:
        sides = (("input", model.inputs), ("output", model.outputs))
        relations.interface += [
            Pin(axis.slots, f"graph {side} {value.name!r}", -1)
            for side, values in sides
            for value in values
            for axis in slots.tensors.get(value.name, ())
        ]
    return relations


def _relate_node(
    index: int,
    model: Model,
    shapes: Shapes,
    rules: Rules,
    relations: Relations,
    decided: Collection[str],
    claimed: NDArray[np.bool_],
) -> None:
    node = model.nodes[index]
    outputs = [name if _is_read(model, name) else "" for name in node.output]
    names = [name for name in (*node.input, *outputs) if name]
    domain = "" if node.domain == "ai.onnx" else node.domain
    rule = rules.get((domain, node.op_type))
    if rule is None:
        key = f"{domain}::{node.op_type}" if domain else node.op_type
        relations.unknown.setdefault(key, []).append(label(node))
        return _pin_all(relations, names, f"no rule for {key}", index)
    known = relations.slots.tensors
    if is_open(node):  # a value of unknown shape does not keep the others from passing
        known = {name: known.get(name, SlotTensor(name, ())) for name in names}
    if any(name not in known for name in names):
        return _pin_all(relations, names, f"{node.op_type} on a tensor of unknown shape", index)
    guessed = decided if node.op_type in BOUNDED else ()
    op = Op(
        index=index,
        node=node,
        version=model.opsets.get(domain, 1),
        x=tuple(known[name] if name else None for name in node.input),
        y=tuple(known[name] if name else None for name in outputs),
        values=tuple(None if n in guessed else shapes.value.get(n) for n in node.input),
        constant=tuple(name in model.constant_names for name in node.input),
        relations=relations,
        varying=tuple(name in shapes.varying for name in node.input),
    )
    marks = (len(relations.ties), len(relations.folds), len(relations.pins))
    try:
        if any(op.y):
            rule(op)
    except RefusedError as refusal:
        _forget(node, index, relations)
        return _pin_all(relations, names, f"{node.op_type}: {refusal}", index)
    except ILL_FORMED as error:
        _forget(node, index, relations)
        reason = f"{node.op_type}: its inputs and attributes do not fit together ({error})"
        return _pin_all(relations, names, reason, index)
    handed_on(node, index, relations)
    _pin_unclaimed(relations, names, marks, node.op_type, index, claimed)


def _forget(node: onnx.NodeProto, index: int, relations: Relations) -> None:
    """A node that was refused half-way has looked nothing up."""
    relations.looked_up.difference_update((index, place) for place in range(len(node.input)))


def _is_read(model: Model, name: str) -> bool:
    """An optional output that nothing reads is as good as absent."""
    return name in model.consumers or name in model.output_names


def _pin_unclaimed(
    relations: Relations,
    names: list[str],
    marks: tuple[int, int, int],
    kind: str,
    index: int,
    claimed: NDArray[np.bool_],
) -> None:
    """Slots of the node's tensors that its rule did not mention must stay. ``claimed``: a mask over
    the slots of all tensors, left as it was found: all false."""
    mentioned = [tie.a for tie in relations.ties[marks[0] :]]
    mentioned += [tie.b for tie in relations.ties[marks[0] :]]
    for fold in relations.folds[marks[1] :]:
        mentioned += [fold.whole, *fold.parts]
    mentioned += [pin.slots for pin in relations.pins[marks[2] :]]
    reason = f"positions along an axis of {kind}"
    if not mentioned:
        reason = f"{kind}: every axis has a meaning of its own here"
    real = np.concatenate([*mentioned, np.empty(0, np.int64)])
    real = real[real < len(claimed)]  # a rule's own slots belong to no tensor
    claimed[real] = True
    tensors = [relations.slots.tensors.get(name, ()) for name in dict.fromkeys(names)]
    axes = [axis.slots for tensor in tensors for axis in tensor if len(axis)]
    for slots in sorted(axes, key=itemgetter(0)):
        free = ~claimed[slots[0] : slots[-1] + 1]
        if free.any():
            relations.pins.append(Pin(slots[free], reason, index))
    claimed[real] = False


def _pin_all(relations: Relations, names: list[str], reason: str, index: int) -> None:
    for name in dict.fromkeys(names):
        _pin_tensor(relations, name, reason, index)


def _pin_tensor(relations: Relations, name: str, reason: str, index: int) -> None:
    tensor = relations.slots.tensors.get(name)
    for axis in tensor or ():
        relations.pins.append(Pin(axis.slots, reason, index))
