"""Which selectors are worth their copy: readers timed behind one, and without."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from graphprune.analysis import Analysis
from graphprune.coupling import Group
from graphprune.errors import ModelError
from graphprune.latency.device import Device
from graphprune.latency.forms import form_of
from graphprune.latency.micro import micro
from graphprune.latency.pieces import Piece, blocked
from graphprune.selectors import is_selector
from graphprune.targets import Target

SHARE = 0.5  # of its channels that a reader is left with behind a selector


@dataclass(frozen=True)
class Reader:
    """A selector's node, the nodes behind it up to the reader that sums over its channels, and the
    group of these."""

    selector: int
    behind: tuple[int, ...]
    group: Group


def readers(analysis: Analysis) -> list[Reader]:
    """One for each selector whose channels may leave."""
    model, coupling = analysis.model, analysis.coupling
    group_of = np.full(coupling.n_units + 1, -1)
    for group in coupling.groups:
        group_of[group.units] = group.index
    summing = {contraction.node for contraction in analysis.relations.contractions}
    found = []
    for i, node in enumerate(model.nodes):
        if not is_selector(node):
            continue
        axis = next(int(a.i) for a in node.attribute if a.name == "axis")
        slots = analysis.relations.slots.tensors[node.output[0]][axis].slots
        groups = np.unique(group_of[coupling.unit_of(slots)])
        behind = [model.consumers[node.output[0]][0][0]]
        while behind[-1] not in summing:
            behind.append(model.consumers[model.nodes[behind[-1]].output[0]][0][0])
        if len(groups) == 1 and groups[0] >= 0:
            found.append(Reader(i, tuple(behind), coupling.groups[int(groups[0])]))
    return found


def unpaid(analysis: Analysis, target: Target, device: Device) -> frozenset[int]:
    """Groups (by index) of readers that take as long with ``SHARE`` of their channels behind a
    selector as with all and no selector: what copies cost there is not earned."""
    pictures = blocked(analysis)
    model, known = analysis.model, {}
    found = set()
    for reader in readers(analysis):
        last = model.nodes[reader.behind[-1]]
        node = model.nodes[reader.selector]
        whole = Piece(reader.behind, (node.output[0],), (last.output[0],))
        part = Piece((reader.selector, *reader.behind), (node.input[0],), (last.output[0],))
        text = form_of(analysis, part, pictures).text
        if text not in known:
            multiple = target.multiple_of(last.op_type)
            count = max(1, round(SHARE * len(reader.group) / multiple)) * multiple
            removed = analysis.nothing_removed
            removed[reader.group.units[count:]] = True
            few = analysis.coupling.alive(removed)
            every = analysis.coupling.alive(analysis.nothing_removed)
            try:
                before = device.piece(micro(analysis, whole, pictures, every))
                after = device.piece(micro(analysis, part, pictures, few))
            except ModelError:  # does not run alone: whole plans are measured all the same
                before, after = 1.0, 0.0
            known[text] = after >= before
        if known[text]:
            found.add(reader.group.index)
    return frozenset(found)
