"""Channels change places so that what each reader keeps is a range, and a Slice instead of a
Gather (UPSCALE, arXiv 2307.08771)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from numpy.typing import NDArray

from graphprune.analysis import Analysis
from graphprune.coupling import tied
from graphprune.model import Model, set_initializer
from graphprune.ordering import ordered, ranges
from graphprune.pipeline import Change, Context, PassResult, Skipped
from graphprune.selectors import is_selector
from graphprune.slots import Axis

Numbers = NDArray[np.int64]
Orders = dict[int, Numbers]  # family → what stands where afterwards
# Statistics that are the same whatever the order of what they are taken over.
ANY_ORDER = {"LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization"}
ANY_ORDER |= {"SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "ReduceMean"}
ANY_ORDER |= {"ReduceL2", "ReduceSumSquare", "Softmax", "LogSoftmax", "LpNormalization"}
INNER = "something knows the order: an interface, a Reshape, positions along the axis"


@dataclass(frozen=True)
class _Families:
    """Components that stand on the same axes, in the same order on each of them: they may change
    places. Those that may not are no family."""

    of: NDArray[np.int64]  # component → family, -1: none
    labels: NDArray[np.int32]  # slot → component

    def on(self, axis: Axis) -> dict[int, Numbers]:
        """Families on an axis: where their members stand, first to last."""
        found = self.of[self.labels[axis.slots]]
        return {int(f): np.flatnonzero(found == f) for f in np.unique(found[found >= 0])}


@dataclass(frozen=True)
class ReorderChannels:
    """1. Channels that selectors read are put in an order in which most of the kept sets are
       ranges; rows of producers, normalisations and columns of consumers move along.
    2. A reader's own columns are then put in the order of its source.
    3. Where anything but weights knows the order, nothing moves.

    ``kept`` names further sets that are to be ranges: ``tensor:axis`` → positions. The function of
    the model stays.
    """

    kept: Mapping[str, Sequence[Sequence[int]]] = field(default_factory=dict)
    name: str = "reorder_channels"

    def run(self, model: Model, context: Context) -> PassResult:
        selectors = [node for node in model.nodes if is_selector(node)]
        if not selectors and not self.kept:
            return PassResult(model)
        analysis = context.analysis(model)
        tensors = analysis.relations.slots.tensors
        read = [_Selector.of(analysis, node) for node in selectors]
        asked = [(_axis(analysis, name), sets) for name, sets in self.kept.items()]
        families = _families(analysis, [*(a for s in read for a in (s.source, s.given)),
                                        *(axis for axis, _ in asked)])  # fmt: skip
        wanted: dict[int, list[NDArray[np.bool_]]] = {}
        masks = [(s.source, s.positions) for s in read]
        masks += [(axis, np.array(k, np.int64)) for axis, sets in asked for k in sets]
        skipped = {}
        for axis, positions in masks:
            mask = np.zeros(len(axis), dtype=bool)
            mask[positions] = True
            here = families.on(axis)
            if not here and not mask.all():
                skipped[axis.tensor] = Skipped(axis.tensor, INNER)
            for family, at in here.items():
                if mask[at].any() and not mask[at].all():
                    wanted.setdefault(family, []).append(mask[at])
        orders: Orders = {}
        changes = []
        for family, sets in sorted(wanted.items()):
            size = int((families.of == family).sum())
            order = ordered(size, sets)
            before, after = ranges(np.arange(size), sets), ranges(order, sets)
            if after > before:
                orders[family] = order
                first = next(a for a, _ in masks if family in families.on(a))
                text = f"{before} of {len(sets)} kept sets", f"{after} of {len(sets)}"
                changes.append(Change(self.name, first.tensor, "order", *text, "ranges"))
        new: dict[str, onnx.TensorProto] = {}
        for selector in read:
            _reread(model, families, orders, selector, new)
        done = {selector.constant for selector in read}
        for name, tensor in model.initializers.items():
            axes = tensors[name].axes if name in tensors and name not in done else ()
            moved = {axis.index: where for axis in axes
                     if (where := _moved(families, orders, axis)) is not None}  # fmt: skip
            if moved:
                array = model.array(name)
                for index, where in moved.items():
                    array = np.take(array, where, axis=index)
                new[name] = set_initializer(name, array)
                new[name].doc_string, new[name].data_type = tensor.doc_string, tensor.data_type
        if not new:
            return PassResult(model, (), tuple(skipped.values()))
        kept = [new.get(t.name, t) for t in model.initializers.values()]
        result = model.with_graph(model.nodes, kept)
        return PassResult(result, tuple(changes), tuple(skipped.values()))


@dataclass(frozen=True)
class _Selector:
    """What a selector reads and gives."""

    source: Axis
    given: Axis
    constant: str
    positions: Numbers

    @staticmethod
    def of(analysis: Analysis, node: onnx.NodeProto) -> _Selector:
        tensors = analysis.relations.slots.tensors
        axis = next(int(a.i) for a in node.attribute if a.name == "axis")
        source, given = tensors[node.input[0]][axis], tensors[node.output[0]][axis]
        positions = analysis.model.array(node.input[1]).astype(np.int64)
        return _Selector(source, given, node.input[1], positions)


def _axis(analysis: Analysis, name: str) -> Axis:
    tensor, _, index = name.rpartition(":")
    return analysis.relations.slots.tensors[tensor][int(index)]


def _reread(
    model: Model,
    families: _Families,
    orders: Orders,
    selector: _Selector,
    new: dict[str, onnx.TensorProto],
) -> None:
    """The selector's positions after its source has moved, ascending where its reader can follow:
    then also an order for the reader."""
    source = _moved(families, orders, selector.source)
    given = _moved(families, orders, selector.given)  # a weight that also makes the source
    positions = selector.positions if given is None else selector.positions[given]
    if source is not None:
        positions = np.argsort(source)[positions]
    mine = families.on(selector.given)
    order = np.argsort(positions, kind="stable")
    if len(mine) == 1 and (order != np.arange(len(order))).any():
        family, at = next(iter(mine.items()))
        if len(at) == len(order) and family not in orders:
            orders[family] = order
            positions = positions[order]
    if not np.array_equal(positions, selector.positions):
        new[selector.constant] = set_initializer(selector.constant, positions)


def _moved(families: _Families, orders: Orders, axis: Axis) -> Numbers | None:
    """Which old position each position of an axis gets, where any moves."""
    where = np.arange(len(axis))
    for family, at in families.on(axis).items():
        if family in orders:
            where[at] = at[orders[family]]
    return None if (where == np.arange(len(axis))).all() else where


def _families(analysis: Analysis, axes: Sequence[Axis]) -> _Families:
    """Of the components on these axes."""
    relations = analysis.relations
    labels = tied(relations)
    count = int(labels.max(initial=-1)) + 1
    looked = np.zeros(count, dtype=bool)
    for axis in axes:
        looked[labels[axis.slots]] = True
    for slots in _ordered(analysis):
        looked[labels[slots]] = False
    looked[labels[relations.slots.total :]] = False  # axes that no tensor has
    every = [axis for axis in relations.slots.axes if len(axis)]
    found: dict[int, list[int]] = {}
    for number, axis in enumerate(every):
        for component in labels[axis.slots][looked[labels[axis.slots]]].tolist():
            found.setdefault(component, []).append(number)
    members: dict[tuple[int, ...], list[int]] = {}
    for component, stands in found.items():  # in the order of the first axis they stand on
        members.setdefault(tuple(stands), []).append(component)
    of = np.full(count, -1, np.int64)
    for family, (where, components) in enumerate(members.items()):
        if len(set(where)) < len(where) or len(components) == 1:
            continue
        inside = np.zeros(count, dtype=bool)
        inside[components] = True
        alike = (labels[every[i].slots][inside[labels[every[i].slots]]] for i in where)
        if all(np.array_equal(order, components) for order in alike):
            of[components] = family
    return _Families(of, labels)


def _ordered(analysis: Analysis) -> list[NDArray[np.int64]]:
    """Slots whose order something knows: pinned, part of a fold, or under statistics that may look
    at neighbours."""
    relations = analysis.relations
    found = [pin.slots for pin in (*relations.pins, *relations.interface)]
    for fold in relations.folds:
        found += [fold.whole, *fold.parts]
    nodes = analysis.model.nodes
    found += [p.slots for p in relations.shifts if nodes[p.node].op_type not in ANY_ORDER]
    return found
