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
from graphprune.pipeline import Arrays, Change, Context, PassResult
from graphprune.slots import Axis, SlotArray, SlotTensor

Indices = NDArray[np.integer[Any]]
Products = set[tuple[bytes, bytes]]  # a whole and the outer part of its fold, by components


@dataclass(frozen=True)
class _Whole:
    """An axis of groups and positions, and of anything else between and around them, such as the
    query heads that read one KV head: components in their order, the row-major product of
    ``lengths``. Groups are the factor number ``outer``, positions the last."""

    slots: Indices
    lengths: tuple[int, ...]
    outer: int


@dataclass(frozen=True)
class _Family:
    """Folds into groups and positions whose positions correspond: components in their order."""

    outer: Indices  # [groups]
    inner: Indices  # [positions]
    wholes: tuple[_Whole, ...]


@dataclass(frozen=True)
class _Place:
    """A tensor with positions of a family: along ``axis`` a ``whole`` from ``start``, or positions
    relative to a group (``blocks``: the axis whose equal blocks belong to the groups)."""

    tensor: str
    axis: int
    blocks: int = 0
    whole: _Whole | None = None
    start: int = 0


@dataclass(frozen=True)
class AlignGroups:
    """1. Where the same positions of all groups leave together, each group's positions are put in
       ascending order of the sizes of their weights.
    2. Where anything but weights knows the order (an interface, a shuffle, a rotary table), nothing
       moves; nor where the scope says that positions stay.
    """

    name: str = "align_groups"

    def run(self, model: Model, context: Context) -> PassResult:
        if not context.scope.aligned or not context.analysis(model).relations.folds:
            return PassResult(model)
        tensors: dict[str, onnx.TensorProto] = {}
        changes = []
        moves: list[tuple[_Place, Indices]] = []
        for family, places in _families(context.analysis(model)):
            weights = {p.tensor: _array(model, tensors, p.tensor) for p in places}
            order = _order(family, places, weights, model)
            if (order == np.arange(order.shape[1])).all():
                continue
            for place in places:
                moved = _moved(weights[place.tensor], place, order)
                weights[place.tensor] = moved
                tensors[place.tensor] = _stored(model, place.tensor, moved)
                moves.append((place, order))
            text = f"{order.shape[1]} in each of {order.shape[0]} groups"
            changes.append(
                Change(self.name, places[0].tensor, "positions", "as given", "by size", text)
            )
        if not tensors:
            return PassResult(model)
        kept = [tensors.get(t.name, t) for t in model.initializers.values()]

        def carry(arrays: Arrays) -> Arrays:
            carried = dict(arrays)
            for place, order in moves:
                if place.tensor in carried:
                    carried[place.tensor] = _moved(carried[place.tensor], place, order)
            return carried

        return PassResult(model.with_graph(model.nodes, kept), tuple(changes), carry=carry)


def _families(analysis: Analysis) -> list[tuple[_Family, list[_Place]]]:
    """Those whose positions may be reordered in each group alone, and where they stand."""
    labels = tied(analysis.relations)
    families, members = _balanced(analysis, labels)
    index = np.full(int(labels.max(initial=0)) + 1, -1)  # component → family
    refused: set[int] = set()
    for number, family in enumerate(families):
        moving = np.concatenate([family.inner, *(whole.slots for whole in family.wholes)])
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
                found = []
                if number >= 0:
                    found = _places(tensor, axis, families[number], labels, products)
                    places[number] += found
                if not found:
                    refused.add(number)
    constants = analysis.model.initializers
    return [
        (family, [place for place in places[number] if place.tensor in constants])
        for number, family in enumerate(families)
        if number not in refused and any(place.tensor in constants for place in places[number])
    ]


def _balanced(analysis: Analysis, labels: Indices) -> tuple[list[_Family], set[int]]:
    """Folds with the same last part, which carries removals, and one other part in common; and
    which folds these are."""
    by_inner: dict[bytes, list[int]] = {}
    folds = analysis.relations.folds
    for number, fold in enumerate(folds):
        by_inner.setdefault(labels[fold.parts[-1]].tobytes(), []).append(number)
    made_of = {labels[fold.whole].tobytes(): fold.parts for fold in folds}
    families, members = [], set()
    for numbers in by_inner.values():
        inner = labels[folds[numbers[0]].parts[-1]]
        carries = bool((analysis.coupling.unit_of(folds[numbers[0]].parts[-1]) >= 0).any())
        if not carries or len(np.unique(inner)) != len(inner):
            continue
        factors = [_factors(folds[number].parts[:-1], labels, made_of) for number in numbers]
        names = [[factor.tobytes() for factor in found] for found in factors]
        common = [f for f, name in zip(factors[0], names[0], strict=True)
                  if all(other.count(name) == 1 for other in names)]  # fmt: skip
        if not common:
            continue
        outer = max(common, key=len)
        wholes: dict[bytes, _Whole] = {}
        for number, found, name in zip(numbers, factors, names, strict=True):
            slots = labels[folds[number].whole]
            lengths = (*(len(factor) for factor in found), len(inner))
            wholes[slots.tobytes()] = _Whole(slots, lengths, name.index(outer.tobytes()))
        families.append(_Family(outer, inner, tuple(wholes.values())))
        members.update(numbers)
    return families, members


def _factors(
    parts: Sequence[SlotArray], labels: Indices, made_of: dict[bytes, tuple[SlotArray, ...]]
) -> list[Indices]:
    """The parts, each in turn by what it is folded from: heads are KV heads and those of each."""
    found: list[Indices] = []
    waiting = list(parts)[::-1]
    while waiting:
        part = labels[waiting.pop()]
        inside = made_of.get(part.tobytes())
        if inside is None:
            found.append(part)
        else:
            waiting += inside[::-1]
    return found


def _ordered(analysis: Analysis, members: set[int]) -> Iterator[SlotArray]:
    """Slots whose order something knows: pinned, under statistics, or in other folds."""
    relations = analysis.relations
    yield from (pin.slots for pin in (*relations.pins, *relations.interface, *relations.shifts))
    for number, fold in enumerate(relations.folds):
        yield from fold.parts[:-1]
        if number not in members:
            yield fold.whole
            yield fold.parts[-1]


def _places(
    tensor: SlotTensor, axis: Axis, family: _Family, labels: Indices, products: Products
) -> list[_Place]:
    """None where the axis has some of the positions only or in another order, or positions
    relative to a group and no axis that says to which."""
    mine = labels[axis.slots]
    runs = _runs(mine, family)
    if runs:
        return [_Place(tensor.name, axis.index, 0, whole, start) for start, whole in runs]
    if not np.array_equal(mine, family.inner):
        return []
    for other in tensor:
        found = labels[other.slots]
        product = (found.tobytes(), family.outer.tobytes()) in products
        if other.index != axis.index and (product or np.array_equal(found, family.outer)):
            return [_Place(tensor.name, axis.index, other.index)]
    return []


def _runs(mine: Indices, family: _Family) -> list[tuple[int, _Whole]]:
    """Where wholes of the family begin, as in packed projections; none if that is not all of it."""
    moving = np.isin(mine, np.concatenate([whole.slots for whole in family.wholes]))
    found, position = [], 0
    while position < len(mine):
        if not moving[position]:
            position += 1
            continue
        rest = mine[position:]
        fits = (w for w in family.wholes if np.array_equal(rest[: len(w.slots)], w.slots))
        whole = next(fits, None)
        if whole is None:
            return []
        found.append((position, whole))
        position += len(whole.slots)
    return found


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
        size += values.sum(axis=1) / max(float(values.sum()), 1e-30)
    return np.argsort(size, axis=1, kind="stable")


def _blocked(array: Array, place: _Place, groups: int) -> Array:
    """[groups, anything of a group, positions]"""
    if place.whole is None:
        front = np.moveaxis(array, (place.blocks, place.axis), (0, -1))
    else:
        last = np.moveaxis(array, place.axis, -1)[..., place.start :]
        whole = last[..., : len(place.whole.slots)].reshape(-1, *place.whole.lengths)
        front = np.moveaxis(whole, 1 + place.whole.outer, 0)
    return front.reshape(groups, -1, front.shape[-1])


def _moved(array: Array, place: _Place, order: Indices) -> Array:
    groups, positions = order.shape
    if place.whole is not None:
        numbers = np.arange(len(place.whole.slots)).reshape(place.whole.lengths)
        front = np.moveaxis(numbers, place.whole.outer, 0)
        found = np.take_along_axis(front.reshape(groups, -1, positions), order[:, None], axis=-1)
        moved = np.moveaxis(found.reshape(front.shape), 0, place.whole.outer).reshape(-1)
        every = np.arange(array.shape[place.axis])
        every[place.start : place.start + len(moved)] = place.start + moved
        return np.asarray(np.take(array, every, axis=place.axis))
    front = np.moveaxis(array, (place.blocks, place.axis), (0, -1))
    split = front.reshape(groups, front.shape[0] // groups, -1, positions)
    moved = np.take_along_axis(split, order[:, None, None, :], axis=-1).reshape(front.shape)
    return np.ascontiguousarray(np.moveaxis(moved, (0, -1), (place.blocks, place.axis)))
