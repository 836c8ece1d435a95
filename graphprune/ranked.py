"""Layers of lower rank beside channels: groups and costs for a choice among both.

A layer that may be two gets a group of its own, whose units are the directions of its outputs. As
long as none has left, it is the one layer that it was and costs that; without some of them it is
two layers and costs what these do. So the first step is from all directions to fewer than make two
layers cheaper, and what stays whole is not touched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.sparse import csr_array, vstack

from graphprune.analysis import Analysis
from graphprune.cost import CostModel, Terms, presence
from graphprune.coupling import Coupling, Group, Mask
from graphprune.factors import Matrix, Site
from graphprune.layout import NARROW
from graphprune.model import label, tensor_bytes
from graphprune.slots import SlotArray
from graphprune.targets import Target
from graphprune.wording import counted, listed

WORTH = 0.9  # of the whole layer's cost: two operators that hardly save anything take longer
MOST_STEPS = 32
MOST_NAMED = 8  # layers in a note
NODE_BYTES = 48  # of a further node beside the names in it


@dataclass(frozen=True)
class Ranks:
    """The layers that may be two, each with the distortion at its ranks, in an analysis of the
    model in which their directions are units after all others."""

    analysis: Analysis
    sites: tuple[Site, ...]
    curves: Mapping[int, Matrix]  # by index of the group
    wide: tuple[str, ...] = ()  # weights of layers too wide to be looked at

    @property
    def groups(self) -> tuple[Group, ...]:
        return self.analysis.coupling.groups[-len(self.sites) :]

    def chosen(self, removed: Mask) -> dict[str, int]:
        """The ranks of the layers that are to be two, by weight."""
        pairs = zip(self.sites, self.groups, strict=True)
        left = {site.weight: int((~removed[group.units]).sum()) for site, group in pairs}
        return {s.weight: left[s.weight] for s in self.sites if left[s.weight] < s.full}

    @property
    def scores(self) -> Matrix:
        """One for each direction: the distortion once it has left, after all after it."""
        found = [np.empty(0)]
        for group in self.groups:
            curve = self.curves[group.index][:0:-1]
            order = np.arange(len(curve), 0, -1)  # kept where the curve is flat
            found.append(curve + 1e-12 * max(float(curve[0]), 1e-12) * order)
        return np.concatenate(found)

    def notes(self, chosen: Mapping[str, int]) -> tuple[str, ...]:
        """What the report says of a decision."""
        full = {site.weight: site.full for site in self.sites}
        named = [f"{name} {rank} of {full[name]}" for name, rank in chosen.items()]
        some = ", ".join([*named[:MOST_NAMED], *["…"] * (len(named) > MOST_NAMED)])
        verb = "becomes" if len(chosen) == 1 else "become"
        of_all = f"{len(chosen)} of {counted(len(full), 'layer')}"
        said = f"{of_all} {verb} two of a lower rank: {some}"
        none = "no layer becomes two of a lower rank: removing channels does no more damage"
        layers = counted(len(self.wide), "layer is", "layers are")
        wide = f"{layers} too wide to look for a lower rank, first {listed(self.wide[:1])}"
        return (said if chosen else none, *[wide] * bool(self.wide))

    def channels(self, removed: Mask) -> Mask:
        """The decision about all other units."""
        return removed[: len(removed) - sum(site.full for site in self.sites)]


def ranks_of(site: Site, target: Target) -> tuple[int, ...]:
    """Ranks on the target's grid that make two layers cheaper, descending."""
    most = int(WORTH * site.even)
    step = target.multiple_of(site.linear.kind)
    while not target.strict and most < target.fewest_steps * step and step % 2 == 0:
        step //= 2
    least = step
    if site.linear.kind == "Conv" and site.rows >= NARROW * target.block:
        least = max(least, target.block)  # fewer leave the blocked layout
    if target.fixed_minimum:
        least = max(least, target.minimum)
    least = -(-least // step) * step
    found = list(range(most // step * step, least - 1, -step))
    return tuple(found[:: max(1, -(-len(found) // MOST_STEPS))])


def with_ranks(analysis: Analysis, sites: Sequence[Site], target: Target) -> Analysis:
    """The analysis with a group for each site, after all others."""
    coupling = analysis.coupling
    groups = list(coupling.groups)
    start = coupling.n_units
    for site in sites:
        units = np.arange(start, start + site.full, dtype=np.int64)
        signature = ((site.weight, site.linear.contracted_axis),)
        groups.append(Group(len(groups), signature, units, ranks_of(site, target)))
        start += site.full
    wider = replace(coupling, n_units=start, groups=tuple(groups))
    mine = groups[len(coupling.groups) :]
    return replace(analysis, coupling=wider, cost=_costs(analysis, wider, sites, mine))


class _Entries:
    """Extents and terms that come to a cost model's own."""

    def __init__(self, cost: CostModel, coupling: Coupling) -> None:
        self.first = len(cost.length)
        self.coupling = coupling
        self.length: list[float] = []
        self.rows: list[csr_array] = []
        self.terms: dict[str, list[tuple[float, list[int], int, int]]] = {}

    def extent(self, width: csr_array, length: int) -> int:
        self.rows.append(width)
        self.length.append(float(length))
        return self.first + len(self.length) - 1

    def term(
        self, kind: str, factor: float, axes: Sequence[SlotArray], more: Sequence[int], gate: int
    ) -> None:
        """Counts once the extent ``gate`` is no longer whole."""
        places = list(more)
        for slots in axes:
            if (self.coupling.unit_of(slots) >= 0).any():
                places.append(self.extent(self.coupling.widths([slots]), len(slots)))
            else:
                factor *= len(slots)
        self.terms.setdefault(kind, []).append((factor, places, gate, 0))


def _costs(
    analysis: Analysis, coupling: Coupling, sites: Sequence[Site], groups: Sequence[Group]
) -> CostModel:
    cost, model = analysis.cost, analysis.model
    entries = _Entries(cost, coupling)
    gates: dict[str, dict[int, int]] = {"macs": {}, "params": {}, "bytes": {}}
    place = {name: i for i, name in enumerate(model.initializers)}
    slots = coupling.relations.slots.tensors
    steps: list[int] = []
    there = presence(model, coupling)
    for site, group in zip(sites, groups, strict=True):
        node = site.linear.node
        row = np.zeros((1, coupling.n_units))
        row[0, group.units] = 1.0
        gate = entries.extent(csr_array(row), site.full)
        gates["macs"][node] = gate
        gates["params"][place[site.weight]] = gates["bytes"][place[site.weight]] = gate
        block = there.of_node(node)  # gone with it
        outputs = [axis.slots for axis in slots[model.nodes[node].output[0]]]
        at = 1 if site.linear.kind == "Conv" else len(outputs) - 1
        places = [axis for i, axis in enumerate(outputs) if i != at]
        weight = [axis.slots for axis in slots[site.weight]]
        rows = weight[site.row_axis]
        columns = [axis for axis in weight if axis is not rows]
        places = [*places, *block]
        entries.term("macs", 1.0, [*places, *columns], [gate], gate)
        entries.term("macs", 1.0, [*places, outputs[at]], [gate], gate)
        entries.term("traffic", 2.0, places, [gate], gate)
        size = tensor_bytes(model.initializers[site.weight]) / max(site.rows * site.columns, 1)
        for kind, each in (("params", 1.0), ("bytes", size)):
            entries.term(kind, each, [*columns, *block], [gate], gate)
            entries.term(kind, each, [rows, *block], [gate], gate)
        names = len(label(model.nodes[node])) + 2 * len(site.weight) + len(site.linear.x)
        entries.term("bytes", float(NODE_BYTES + names), block, [], gate)
        entries.term("memory", size, places, [gate], gate)
        steps.append(node + 1)
    return _joined(cost, entries, gates, coupling.n_units, steps)


def _joined(
    cost: CostModel,
    entries: _Entries,
    gates: Mapping[str, Mapping[int, int]],
    n_units: int,
    steps: Sequence[int],
) -> CostModel:
    wider = csr_array(
        (cost.width.data, cost.width.indices, cost.width.indptr),
        shape=(cost.width.shape[0], n_units),
    )
    one = entries.first + len(entries.length)  # the last extent is 1, and always whole
    length = np.array([*cost.length, *entries.length, 1.0])
    width = csr_array(vstack([wider, *entries.rows, csr_array((1, n_units))]))
    terms = {
        kind: _with(old, entries.terms.get(kind, []), gates.get(kind, {}), one)
        for kind, old in cost.terms.items()
    }
    between = np.array(steps, np.int64)
    pieces = cost.buffers
    more = replace(
        pieces,
        tensor=(*pieces.tensor, *[f"between at {step}" for step in steps]),
        element_bytes=np.append(pieces.element_bytes, np.zeros(len(steps))),
        first=np.append(pieces.first, between),
        last=np.append(pieces.last, between),
    )
    return replace(cost, length=length, width=width, terms=terms, buffers=more)


def _with(
    old: Terms, new: Sequence[tuple[float, list[int], int, int]], gates: Mapping[int, int], one: int
) -> Terms:
    widest = max([old.factor.shape[1], *(len(places) for _, places, _, _ in new)])
    factor = np.full((len(old.owner) + len(new), widest), one, dtype=np.int64)
    factor[: len(old.owner), : old.factor.shape[1]] = old.factor
    for i, (_, places, _, _) in enumerate(new):
        factor[len(old.owner) + i, : len(places)] = places
    waiting = dict(gates)  # an owner's first term is its own: nodes may follow initialisers
    mine = [waiting.pop(int(owner), one) for owner in old.owner]
    return Terms(
        np.append(old.coefficient, [entry[0] for entry in new]),
        factor,
        np.append(old.owner, [entry[3] for entry in new]).astype(np.int64),
        np.array([*mine, *(entry[2] for entry in new)], np.int64),
        np.array([True] * len(mine) + [False] * len(new)),
    )
