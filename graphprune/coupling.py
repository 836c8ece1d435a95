"""Ties become groups of units; what stays is pinned, and ``why`` says through which operators."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import networkx as nx
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components

from graphprune.apart import experts_apart
from graphprune.choices import fewest, settled
from graphprune.folds import same_parts
from graphprune.heads import heads_of, not_among, settled_folds
from graphprune.model import Model, label
from graphprune.reads import Follow, follow, held_by_reads, pairs
from graphprune.relations import Pin, Relations
from graphprune.shapes import Shapes
from graphprune.slots import Axis, SlotArray
from graphprune.states import uncarried

FLOAT_TYPES = {1, 10, 11, 16}  # float32, float16, float64, bfloat16
# What may leave; the user chooses among them.
UNITS = ("channels", "heads", "head-dims", "blocks", "ranks", "experts")
USUAL_UNITS = ("channels", "heads")
Signature = tuple[tuple[str, int], ...]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Group:
    """Units of one signature: the parameter axes that lose slots when one of them leaves."""

    index: int
    signature: Signature
    units: NDArray[np.int64]  # unit numbers, in slot order
    counts: tuple[int, ...] | None = None  # that may stay besides all; None: any
    ordinal: int = 1  # among the groups that begin with the same axis

    @property
    def name(self) -> str:
        """The first axis; for the second group that begins with it ``conv1.weight:0#2``."""
        first = self.signature[0]
        which = f"#{self.ordinal}" if self.ordinal > 1 else ""
        return f"{first[0]}:{first[1]}{which}"

    def __len__(self) -> int:
        return len(self.units)

    def __str__(self) -> str:
        axes = ", ".join(f"{tensor}:{axis}" for tensor, axis in self.signature)
        return f"group {self.index}: {len(self)} units over {axes}"


@dataclass(frozen=True)
class Coupling:
    """Which slots leave together, which may not leave, and why."""

    relations: Relations
    labels: NDArray[np.int32]  # slot → component
    unit_of_component: NDArray[np.int64]  # component → unit, -1 where it is none
    n_units: int
    groups: tuple[Group, ...]
    parameters: tuple[Axis, ...]  # parameter axes, in order
    role: NDArray[np.int8]  # slot → Role
    reason: dict[int, int]  # pinned component → index of the first pin that holds it
    pins: tuple[Pin, ...]
    follow: Follow  # components that leave because others do
    blocks: NDArray[np.int64]  # units that are branches, in the order stated; -1 where one stays

    def unit_of(self, slots: SlotArray) -> NDArray[np.int64]:
        """Unit of each slot, -1 where it belongs to none."""
        return np.asarray(self.unit_of_component[self.labels[slots]])

    def alive(self, removed: Mask) -> Mask:
        """Slot mask after the units in ``removed`` (bool per unit) left."""
        gone = np.append(removed, False)[self.unit_of_component]
        return np.asarray(~self.follow.closed(gone)[self.labels])

    def closed(self, removed: Mask) -> Mask:
        """``removed`` (bool per unit) and the units that leave because these do."""
        return self._units_follow.closed(removed)

    @cached_property
    def _units_follow(self) -> Follow:
        return self.follow.renumbered(self.unit_of_component)

    def widths(self, axes: list[SlotArray]) -> csr_array:
        """Sparse matrix [axes, units]: how many slots of each axis a unit takes with it."""
        lengths = [len(a) for a in axes]
        rows = np.repeat(np.arange(len(axes)), lengths)
        slots = np.concatenate([*axes, np.empty(0, np.int64)])
        units = self.unit_of(slots.astype(np.int64))
        real = units >= 0
        shape = (len(axes), self.n_units)
        return coo_array((np.ones(real.sum()), (rows[real], units[real])), shape=shape).tocsr()

    def pin_of(self, slot: int) -> Pin | None:
        """What holds this slot in place, if anything does."""
        found = self.reason.get(int(self.labels[slot]))
        return None if found is None else self.pins[found]

    @cached_property
    def fewest(self) -> Mapping[int, int]:
        """Group index → units that must stay, where an operator takes so many of them."""
        every = self.unit_of(np.arange(self.relations.total, dtype=np.int64))
        of_unit = fewest(self.relations, every)
        return {
            group.index: max(of_unit[u] for u in group.units.tolist() if u in of_unit)
            for group in self.groups
            if not of_unit.keys().isdisjoint(group.units.tolist())
        }

    @cached_property
    def axis_graph(self) -> nx.MultiGraph:
        """Axes as nodes, one edge per operator that ties them; for explanations only."""
        slots = self.relations.slots
        starts = np.array([axis.slots[0] for axis in slots.axes if len(axis)])
        owners = [axis for axis in slots.axes if len(axis)]

        def owner(slot: int) -> tuple[str, int]:
            if slot >= slots.total:
                return "virtual", slot
            axis = owners[int(np.searchsorted(starts, slot, side="right")) - 1]
            return axis.tensor, axis.index

        graph: nx.MultiGraph = nx.MultiGraph()
        for tie in self.relations.ties:
            if len(tie.a) and tie.a is not tie.b:
                for place in {0, len(tie.a) // 2, len(tie.a) - 1}:
                    graph.add_edge(
                        owner(int(tie.a[place])), owner(int(tie.b[place])), node=tie.node
                    )
        for fold in self.relations.folds:
            for part in fold.parts:
                graph.add_edge(owner(int(fold.whole[0])), owner(int(part[0])), node=fold.node)
        return graph

    def path(
        self, start: tuple[str, int], ends: set[tuple[str, int]]
    ) -> list[tuple[str, int, int]]:
        """Shortest way from an axis to any of ``ends``: (tensor, axis, node that led there)."""
        if start not in self.axis_graph:
            return []
        routes = nx.single_source_shortest_path(self.axis_graph, start)
        reached = [routes[end] for end in ends if end in routes]
        if not reached:
            return []
        best = min(reached, key=lambda route: (len(route), route))
        steps = [(*best[0], -1)]
        for a, b in pairwise(best):
            edge = next(iter(self.axis_graph.get_edge_data(a, b).values()))
            steps.append((*b, edge["node"]))
        return steps

    def __str__(self) -> str:
        lines = [f"{self.n_units} units in {len(self.groups)} groups"]
        return "\n".join(lines + [str(group) for group in self.groups])


def couple(
    model: Model,
    shapes: Shapes,
    relations: Relations,
    *,
    held: Sequence[Pin] = (),
    allowed: Sequence[SlotArray] | None = None,
    units: Collection[str] = USUAL_UNITS,
    interface: bool = False,
    inexact: bool = False,
) -> Coupling:
    """Merge the ties into components, settle the folds, and collect units and groups.

    ``held`` are further pins; with ``allowed`` only components that touch one of its slots may
    leave. ``units`` are those of ``UNITS`` that may leave: whole heads; the same positions of every
    head, where whole heads do not leave; experts (``choices``); all other channels. The interface
    is pinned, with ``interface`` less the states that it carries; so are slots whose removal would
    shift statistics, unless ``inexact``.
    """
    if relations.choices:
        ties_alone = tied(relations)
        if "experts" in units:
            relations = experts_apart(model, relations, ties_alone)
        relations = settled(relations, ties_alone, units)
    parameters = parameter_axes(model, shapes, relations)
    pins = [*held, *relations.pins]
    pins += uncarried(model, shapes, relations, parameters) if interface else relations.interface
    pins += [] if inexact else relations.shifts
    ties = [(tie.a, tie.b) for tie in relations.ties]
    labels, pinned = _merge(ties, pins, relations.total)
    while same := same_parts(relations, labels):
        ties += same
        labels, pinned = _merge(ties, pins, relations.total)
    read_pins = held_by_reads(relations, labels, pinned)
    for pin in read_pins:
        pinned[labels[pin.slots]] = True
    pins += read_pins
    heads = heads_of(relations, labels, pinned)
    not_chosen = not_among(units, heads)
    for pin in not_chosen:
        pinned[labels[pin.slots]] = True
    pins += not_chosen
    more_ties, more_pins = settled_folds(relations, labels, pinned, heads, pins)
    pins += more_pins
    labels, pinned = _merge(ties + more_ties, pins, relations.total)
    chosen = [(allowed, "not in --only")] if allowed is not None else []
    if "channels" not in units:
        kinds = [branch.slots for branch in relations.branches]
        kinds += [choice.slots for choice in (*relations.choices, *relations.weighed)]
        chosen.append(((*heads.slots, *kinds), "channels are not among the --units"))
    for inside, why in chosen:
        outside = np.ones(len(pinned), dtype=bool)
        outside[labels[np.concatenate([*inside, np.empty(0, np.int64)])]] = False
        source, read = pairs(relations, labels)
        outside[read[~outside[source]]] = False  # who reads them may leave with them
        pins.append(Pin(np.flatnonzero(outside[labels]), why, -1))
        pinned |= outside
    made = np.zeros(len(pinned), dtype=bool)  # of parameters, which alone makes a unit
    for axis in parameters:
        made[labels[axis.slots]] = True
    read_pins = held_by_reads(relations, labels, pinned | ~made)
    for pin in read_pins:
        pinned[labels[pin.slots]] = True
    pins += read_pins
    role = np.zeros(relations.total, dtype=np.int8)
    for slots, value in relations.roles:
        role[slots] = value
    unit_of_component, n_units, groups = _units(parameters, labels, pinned)
    blocks, n_units = _blocks(relations, labels, pinned, unit_of_component, n_units)
    reason: dict[int, int] = {}
    for i, pin in enumerate(pins):
        for component in np.unique(labels[pin.slots]):
            reason.setdefault(int(component), i)
    return Coupling(
        relations,
        labels,
        unit_of_component,
        n_units,
        groups,
        tuple(parameters),
        role,
        reason,
        tuple(pins),
        follow(relations, labels, pinned),
        blocks,
    )


def tied(relations: Relations) -> NDArray[np.int32]:
    """Component of every slot by the ties alone: no fold is settled."""
    ties = [(tie.a, tie.b) for tie in relations.ties]
    labels = _merge(ties, [], relations.total)[0]
    while same := same_parts(relations, labels):
        ties += same
        labels = _merge(ties, [], relations.total)[0]
    return labels


def parameter_axes(model: Model, shapes: Shapes, relations: Relations) -> list[Axis]:
    """Axes (longer than 1) of the float constants that meet the data, and of the integer ones that
    stand for real numbers: what a unit is made of. An expert with weights of its own is made of its
    place in what weighs it."""
    constants = model.constant_names
    places = {model.nodes[one.node].input[1] for one in relations.weighed}
    axes = []
    for name in relations.slots.tensors:
        meets_data = any(
            not all(output in constants for output in model.nodes[i].output if output)
            for i, _ in model.consumers.get(name, ())
        )
        real = shapes.dtype.get(name) in FLOAT_TYPES or name in places | relations.quantised.keys()
        if name in constants and meets_data and real:
            axes += [axis for axis in relations.slots.tensors[name] if len(axis) > 1]
    return axes


def _merge(
    ties: list[tuple[SlotArray, SlotArray]], pins: list[Pin], total: int
) -> tuple[NDArray[np.int32], Mask]:
    """Component of every slot, and which components are pinned."""
    real = [(a, b) for a, b in ties if a is not b]
    empty = np.empty(0, np.int64)
    a = np.concatenate([*(pair[0] for pair in real), empty])
    b = np.concatenate([*(pair[1] for pair in real), empty])
    graph = coo_array((np.ones(len(a), np.int8), (a, b)), shape=(total, total))
    count, labels = connected_components(graph, directed=False)
    pinned = np.zeros(count, dtype=bool)
    for pin in pins:
        pinned[labels[pin.slots]] = True
    return labels, pinned


def _units(
    parameters: list[Axis], labels: NDArray[np.int32], pinned: Mask
) -> tuple[NDArray[np.int64], int, tuple[Group, ...]]:
    """Number the free components that touch a parameter; gather those of equal signature."""
    unit_of_component = np.full(len(pinned) + 1, -1, dtype=np.int64)
    found = [np.unique(labels[axis.slots]) for axis in parameters]
    found = [components[~pinned[components]] for components in found]
    components = np.concatenate([*found, np.empty(0, np.int32)]).astype(np.int64)
    touched = np.repeat(np.arange(len(found)), [len(f) for f in found])
    order = np.argsort(components, kind="stable")
    units, starts = np.unique(components[order], return_index=True)
    unit_of_component[units] = np.arange(len(units))
    all_axes, size = touched[order].tobytes(), touched.itemsize
    bounds = (np.append(starts, len(order)) * size).tolist()
    by_signature: dict[bytes, list[int]] = {}
    for unit, (start, end) in enumerate(pairwise(bounds)):
        by_signature.setdefault(all_axes[start:end], []).append(unit)
    axes = {key: np.frombuffer(key, dtype=touched.dtype).tolist() for key in by_signature}
    keys = sorted(by_signature, key=lambda key: axes[key])
    seen: Counter[int] = Counter()  # groups by the first axis
    groups = []
    for index, key in enumerate(keys):
        signature = tuple((parameters[i].tensor, parameters[i].index) for i in axes[key])
        seen[axes[key][0]] += 1
        mine = np.array(by_signature[key], dtype=np.int64)
        groups.append(Group(index, signature, mine, ordinal=seen[axes[key][0]]))
    return unit_of_component, len(units), tuple(groups)


def _blocks(
    relations: Relations,
    labels: NDArray[np.int32],
    pinned: Mask,
    unit_of_component: NDArray[np.int64],
    n_units: int,
) -> tuple[NDArray[np.int64], int]:
    """Number the branches that may leave after all other units: each is one by itself."""
    found = np.full(len(relations.branches), -1, dtype=np.int64)
    for i, branch in enumerate(relations.branches):
        component = int(labels[branch.slots[0]])
        if not pinned[component]:
            found[i] = unit_of_component[component] = n_units
            n_units += 1
    return found, n_units


def describe(model: Model, pin: Pin) -> str:
    """A pin as a person reads it."""
    where = f" (node {label(model.nodes[pin.node])!r})" if pin.node >= 0 else ""
    return f"{pin.reason}{where}"
