"""States that a model carries from run to run: graph inputs of what it otherwise makes itself.

The caller of a KV cache or of a recurrent state starts it with zeros or with nothing, and hands it
back. So where the interface may change at all, its slots may leave: whoever feeds the model asks
it for its shapes. What the model is given (its first input) and what it is asked for (its first
output) never change, nor does anything that is tied to them, nor an output that no state is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from graphprune.model import Model
from graphprune.relations import Fold, Pin, Relations, Role
from graphprune.shapes import Shapes
from graphprune.slots import Axis, SlotArray

Mask = NDArray[np.bool_]


def uncarried(
    model: Model, shapes: Shapes, relations: Relations, parameters: Sequence[Axis]
) -> list[Pin]:
    """The pins of the interface, less the slots of carried states."""
    carried = _carried(model, shapes, relations, parameters)
    left = [(pin, pin.slots[~carried[pin.slots]]) for pin in relations.interface]
    return [Pin(slots, pin.reason, pin.node) for pin, slots in left if len(slots)]


def _carried(
    model: Model, shapes: Shapes, relations: Relations, parameters: Sequence[Axis]
) -> Mask:
    """Slots that ties and folds connect to a graph input and to rows of a weight, which make them
    in the model itself; and neither to the first input or output nor to a symbolic size."""
    slots = relations.slots.tensors
    labels = _connected(relations)

    def reached(arrays: Iterable[SlotArray]) -> Mask:
        found = np.zeros(int(labels.max(initial=0)) + 1, dtype=bool)
        for array in arrays:
            found[labels[array]] = True
        return found

    def of(names: Iterable[str]) -> Iterable[SlotArray]:
        return (axis.slots for name in names if name in slots for axis in slots[name])

    inputs = [value.name for value in model.inputs]
    outputs = [value.name for value in model.outputs]
    symbolic = (
        slots[name][axis].slots
        for name, axes in shapes.symbolic.items()
        for axis in axes
        if name in slots
    )
    rows = np.zeros(relations.total, dtype=bool)
    for array, role in relations.roles:
        rows[array] |= role == Role.PRODUCER
    made = reached(axis.slots[rows[axis.slots]] for axis in parameters)
    fixed = reached(chain(of(inputs[:1]), of(outputs[:1]), symbolic))
    return np.asarray((reached(of(inputs)) & made & ~fixed)[labels])


def _connected(relations: Relations) -> NDArray[np.int32]:
    """Component of every slot, an axis and the factors that it is folded from being connected."""
    pairs = [(tie.a, tie.b) for tie in relations.ties if tie.a is not tie.b]
    pairs += [pair for fold in relations.folds for pair in _spread(fold)]
    a, b = (np.concatenate([*side, np.empty(0, np.int64)]) for side in _sides(pairs))
    shape = (relations.total, relations.total)
    graph = coo_array((np.ones(len(a), np.int8), (a, b)), shape=shape)
    labels: NDArray[np.int32] = connected_components(graph, directed=False)[1]
    return labels


def _sides(pairs: list[tuple[SlotArray, SlotArray]]) -> tuple[list[SlotArray], list[SlotArray]]:
    return [a for a, _ in pairs], [b for _, b in pairs]


def _spread(fold: Fold) -> Iterable[tuple[SlotArray, SlotArray]]:
    """The whole, and each part at the place that every slot of the whole has along it."""
    lengths = [len(part) for part in fold.parts]
    for index, part in enumerate(fold.parts):
        shape = [1] * len(lengths)
        shape[index] = lengths[index]
        yield fold.whole, np.broadcast_to(part.reshape(shape), lengths).reshape(-1)
