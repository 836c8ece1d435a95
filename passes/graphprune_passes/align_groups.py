"""Equal positions of all groups get equal ranks, so that count-balanced pruning is plain pruning.

A grouped convolution may keep other channels in each group as long as their number is equal; so
may the V/O dimensions of attention heads. A unit is the same position of every group. Reordering
the channels inside each group by their weights' size makes the weakest of each group one unit, the
second weakest another, and so on; the function of the model stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from graphprune.analysis import Analysis
from graphprune.coupling import FLOAT_TYPES, tied
from graphprune.model import Array, Model, set_initializer
from graphprune.pipeline import Change, Context, PassResult
from graphprune.slots import Axis, SlotArray, SlotTensor

Indices = NDArray[np.integer[Any]]
Products = set[tuple[bytes, bytes]]  # a whole and the outer part of its fold, by components


@dataclass(frozen=True)
class _Family:
    """Folds (groups, positions) whose positions correspond: components in their order."""

    outer: Indices  # [groups]
    inner: Indices  # [positions]
    wholes: tuple[Indices, ...]  # each [groups * positions]


@dataclass(frozen=True)
class _Place:
    """A tensor with positions of a family: along ``axis``, in every group or (``blocks``: the axis
    whose equal blocks belong to the groups) relative to one."""

    tensor: str
    axis: int
    blocks: int | None


@dataclass(frozen=True)
class AlignGroups:
    """1. Where the same positions of all groups leave together, each group's positions are put in
       ascending order of the sizes of their weights.
    2. Where anything but weights knows the order (an interface, a shuffle, a rotary table), nothing
       moves.
    """

    name: str = "align_groups"

    def run(self, model: Model, context: Context) -> PassResult:
        if not context.analysis(model).relations.folds:
            return PassResult(model)
        tensors: dict[str, onnx.TensorProto] = {}
        changes = []
        for family, places in _families(context.analysis(model)):
            weights = {p.tensor: _array(model, tensors, p.tensor) for p in places}
            order = _order(family, places, weights, model)
            if (order == np.arange(order.shape[1])).all():
                continue
            for place in places:
                moved = _moved(weights[place.tensor], place, order)
                weights[place.tensor] = moved
                tensors[place.tensor] = _stored(model, place.tensor, moved)
            text = f"{order.shape[1]} in each of {order.shape[0]} groups"
            changes.append(
                Change(self.name, places[0].tensor, "positions", "as given", "by size", text)
            )
        if not tensors:
            return PassResult(model)
        kept = [tensors.get(t.name, t) for t in model.initializers.values()]
        return PassResult(model.with_graph(model.nodes, kept), tuple(changes))


def _families(analysis: Analysis) -> list[tuple[_Family, list[_Place]]]:
    """Those whose positions may be reordered in each group alone, and where they stand."""
    labels = tied(analysis.relations)
    families, members = _balanced(analysis, labels)
    index = np.full(int(labels.max(initial=0)) + 1, -1)  # component → family
    refused: set[int] = set()
    for number, family in enumerate(families):
        moving = np.concatenate([family.inner, *family.wholes])
        claimed = set(np.unique(index[moving]).tolist()) - {-1}
        refused |= claimed | ({number} if claimed else set())
        index[moving] = number
    for slots in _ordered(analysis, members):
        refused |= set(np.unique(index[labels[slots]]).tolist())
    products = {
        (labels[fold.whole].tobytes(), labels[fold.parts[0]].tobytes())
        for fold in analysis.relations.folds
    }
    places: list[list[_Place]] = [[] for _ in families]
    for tensor in analysis.relations.slots.tensors.values():
        for axis in tensor:
            for number in np.unique(index[labels[axis.slots]]).tolist():
                place = None
                if number >= 0:
                    place = _place(tensor, axis, families[number], labels, products)
                    places[number] += [place] if place is not None else []
                if place is None:
                    refused.add(number)
    constants = analysis.model.initializers
    return [
        (family, [place for place in places[number] if place.tensor in constants])
        for number, family in enumerate(families)
        if number not in refused and any(place.tensor in constants for place in places[number])
    ]


def _balanced(analysis: Analysis, labels: Indices) -> tuple[list[_Family], set[int]]:
    """Folds of the same two parts, whose inner one carries removals; and which folds these are."""
    by_inner: dict[bytes, list[int]] = {}
    for number, fold in enumerate(analysis.relations.folds):
        by_inner.setdefault(labels[fold.parts[-1]].tobytes(), []).append(number)
    families, members = [], set()
    for numbers in by_inner.values():
        folds = [analysis.relations.folds[number] for number in numbers]
        outer, inner = (labels[part] for part in (folds[0].parts[0], folds[0].parts[-1]))
        alike = all(
            len(fold.parts) == 2 and np.array_equal(labels[fold.parts[0]], outer) for fold in folds
        )
        carries = bool((analysis.coupling.unit_of(folds[0].parts[-1]) >= 0).any())
        if alike and carries and len(np.unique(inner)) == len(inner):
            wholes = {labels[fold.whole].tobytes(): labels[fold.whole] for fold in folds}
            families.append(_Family(outer, inner, tuple(wholes.values())))
            members.update(numbers)
    return families, members


def _ordered(analysis: Analysis, members: set[int]) -> Iterator[SlotArray]:
    """Slots whose order something knows: pinned, under statistics, or in other folds."""
    relations = analysis.relations
    yield from (pin.slots for pin in (*relations.pins, *relations.interface, *relations.shifts))
    for number, fold in enumerate(relations.folds):
        yield fold.parts[0]
        if number not in members:
            yield fold.whole
            yield from fold.parts[1:]


def _place(
    tensor: SlotTensor, axis: Axis, family: _Family, labels: Indices, products: Products
) -> _Place | None:
    """``None`` where the axis has some of the positions only or in another order, or positions
    relative to a group and no axis that says to which."""
    mine = labels[axis.slots]
    if any(np.array_equal(mine, whole) for whole in family.wholes):
        return _Place(tensor.name, axis.index, None)
    if not np.array_equal(mine, family.inner):
        return None
    for other in tensor:
        found = labels[other.slots]
        product = (found.tobytes(), family.outer.tobytes()) in products
        if other.index != axis.index and (product or np.array_equal(found, family.outer)):
            return _Place(tensor.name, axis.index, other.index)
    return None


def _array(model: Model, tensors: dict[str, onnx.TensorProto], name: str) -> Array:
    return onnx.numpy_helper.to_array(tensors[name]) if name in tensors else model.array(name)


def _stored(model: Model, name: str, value: Array) -> onnx.TensorProto:
    old = model.initializers[name]
    new = set_initializer(name, value)
    new.doc_string, new.data_type = old.doc_string, old.data_type
    return new


def _order(
    family: _Family, places: Sequence[_Place], weights: dict[str, Array], model: Model
) -> Indices:
    """[groups, positions]: what stands where afterwards, by the summed relative L1 norms."""
    groups, positions = len(family.outer), len(family.inner)
    size = np.zeros((groups, positions))
    for place in places:
        if model.initializers[place.tensor].data_type not in FLOAT_TYPES:
            continue
        values = np.abs(_blocked(weights[place.tensor].astype(np.float64), place, groups))
        size += values.sum(axis=(1, 2)) / max(float(values.sum()), 1e-30)
    return np.argsort(size, axis=1, kind="stable")


def _blocked(array: Array, place: _Place, groups: int) -> Array:
    """[groups, rows of the group, others, positions]"""
    if place.blocks is None:
        last = np.moveaxis(array, place.axis, -1)
        return last.reshape(1, -1, groups, last.shape[-1] // groups).transpose(2, 0, 1, 3)
    front = np.moveaxis(array, (place.blocks, place.axis), (0, -1))
    return front.reshape(groups, front.shape[0] // groups, -1, front.shape[-1])


def _moved(array: Array, place: _Place, order: Indices) -> Array:
    groups, positions = order.shape
    if place.blocks is None:
        every = (np.arange(groups)[:, None] * positions + order).reshape(-1)
        return np.asarray(np.take(array, every, axis=place.axis))
    front = np.moveaxis(array, (place.blocks, place.axis), (0, -1))
    split = front.reshape(groups, front.shape[0] // groups, -1, positions)
    moved = np.take_along_axis(split, order[:, None, None, :], axis=-1).reshape(front.shape)
    return np.ascontiguousarray(np.moveaxis(moved, (0, -1), (place.blocks, place.axis)))
