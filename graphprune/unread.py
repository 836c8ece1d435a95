"""Units that no output depends on: what is left out by a Split, a Slice or a Gather, and what only
that is computed from.

By law 3 a unit acts on others through contractions alone. So it is unread where no operator sums
over it whose own result is read; what is pinned, or has statistics taken over it, is read.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from graphprune.control import is_open, regions
from graphprune.coupling import Coupling, Mask
from graphprune.model import Model
from graphprune.relations import Contraction
from graphprune.slots import SlotArray


def unread_units(model: Model, coupling: Coupling) -> Mask:
    """Which units (bool per unit) no output depends on. One walk from the outputs backwards."""
    read = np.zeros(coupling.n_units + 1, bool)
    read[-1] = True  # what is no unit
    for slots in _otherwise_read(model, coupling):
        read[coupling.unit_of(slots)] = True
    by_node: dict[int, list[Contraction]] = {}
    for contraction in coupling.relations.contractions:
        by_node.setdefault(contraction.node, []).append(contraction)
    tensors = coupling.relations.slots.tensors
    for node in sorted(by_node, reverse=True):
        outputs = [tensors.get(name, ()) for name in model.nodes[node].output if name]
        if any(all(read[coupling.unit_of(a.slots)].any() for a in axes) for axes in outputs):
            for contraction in by_node[node]:
                read[coupling.unit_of(contraction.slots)] = True
    return ~read[:-1]


def _otherwise_read(model: Model, coupling: Coupling) -> Iterator[SlotArray]:
    """Slots that matter without a contraction: of the interface, of statistics and choices, of
    what has readers of its own, of bodies, and those that stand for a branch."""
    relations = coupling.relations
    for pin in (*relations.interface, *relations.shifts):
        yield pin.slots
    for choice in relations.choices:
        yield choice.slots
    for entry in relations.reads:
        yield entry.source
    for branch in (*relations.branches, *relations.apart):
        yield branch.slots
    for node, inside in zip(model.nodes, regions(model.nodes), strict=True):
        if inside or is_open(node):
            for name in relations.slots.tensors.keys() & {*node.input, *node.output}:
                yield from (axis.slots for axis in relations.slots.tensors[name])
