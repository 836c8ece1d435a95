"""Operators that read channels which left, with the weights they had for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np
from numpy.typing import NDArray

from graphprune.coupling import Mask
from graphprune.linear import CONVOLUTIONS, Linear, Matrix, repairable
from graphprune.model import Model, label, set_initializer
from graphprune.repair.damage import Damage

Index = NDArray[np.int64]


@dataclass(frozen=True)
class Consumer:
    """A linear operator of the pruned model, whose ``weights`` are still those for all channels of
    its input: [groups, out, channels, taps]. ``kept``: [groups, channels]; ``groups``: which of the
    original's groups there still are; ``channels``: those that all of the original's groups had."""

    linear: Linear
    node: str
    weights: Matrix
    offset: Matrix  # [groups, out]
    kept: Mask
    groups: Index
    channels: int

    def folded(
        self, places: Sequence[Index], mixing: Sequence[Matrix], shift: Sequence[Matrix]
    ) -> tuple[Linear, Matrix, Matrix]:
        """The weights of what is kept, when channel p that left is mixing[p, s] x_s + shift[p].

        One of each for every group. ``places`` [channels, times] says where channels stand among
        the group's columns: once, or after a Flatten at many positions, which then leave together.
        """
        matrices, offsets = [], []
        transposed = self.linear.kind == "ConvTranspose"  # a position meets a share of the taps
        phases = prod(self.linear.strides) if transposed else 1
        for g, place in enumerate(places):
            kept = self.kept[g][place[:, 0]]
            matrix = self.weights[g].copy()
            lost = matrix[:, place[~kept]]  # [out, channels, times, taps]
            read = np.tensordot(mixing[g], lost, axes=(0, 1))  # [kept, out, times, taps]
            matrix[:, place[kept]] += read.swapaxes(0, 1)
            matrices.append(matrix[:, self.kept[g]].reshape(len(matrix), -1))
            offsets.append(self.offset[g] + np.einsum("opnt,p->o", lost, shift[g]) / phases)
        return self.linear, np.stack(matrices), np.stack(offsets)


def places_of(columns: Index, kept: Mask) -> Index | None:
    """[channels, times]: where each number stands in ``columns``, channels in ascending order.

    ``None`` where they stand unequally often, or only some of one channel's columns are kept.
    """
    unique, counts = np.unique(columns, return_counts=True)
    if (counts != counts[0]).any():
        return None
    places = np.argsort(columns, kind="stable").reshape(len(unique), -1)
    together = kept[places] == kept[places[:, :1]]
    return places if together.all() else None


def channel_axis(linear: Linear, rank: int) -> int:
    """The axis of the operator's input that it sums over."""
    return 1 if linear.kind in CONVOLUTIONS else rank - 1


def consumers(damage: Damage) -> Iterator[Consumer]:
    """The linear operators of the pruned model that lost channels of their input, in node order."""
    slots = damage.coupling.relations.slots.tensors
    before = {linear.weight: linear for linear in repairable(damage.original)}
    for linear in repairable(damage.pruned):
        if linear.weight not in before or not {linear.weight, linear.x} <= slots.keys():
            continue
        kept = _kept(damage, before[linear.weight])
        groups = np.flatnonzero(kept.any(axis=1))
        if kept[groups].all():
            continue
        matrix = linear.matrix(_with_all_columns(damage, linear, groups, kept.shape[1]))
        yield Consumer(
            linear,
            label(damage.pruned.nodes[linear.node]),
            matrix.reshape(*matrix.shape[:2], kept.shape[1], -1),
            linear.offset(damage.pruned, matrix.shape[0] * matrix.shape[1]),
            kept[groups],
            groups,
            kept.size,
        )


def _kept(damage: Damage, linear: Linear) -> Mask:
    """Which channels of the operator's input still stand: [groups, channels]."""
    slots = damage.coupling.relations.slots.tensors
    if linear.reverse:  # both directions lose the same states
        alive = damage.alive[slots[linear.weight][linear.contracted_axis].slots]
        return np.tile(alive, (linear.groups, 1))
    x = slots[linear.x]
    return damage.alive[x[channel_axis(linear, x.rank)].slots].reshape(linear.groups, -1)


def _with_all_columns(damage: Damage, linear: Linear, groups: Index, width: int) -> Model:
    """The pruned model with the operator's original weights, cut along their outputs only."""
    weight = damage.original.array(linear.weight)
    for axis in damage.coupling.relations.slots.tensors[linear.weight]:
        if axis.index != linear.contracted_axis:
            weight = np.compress(damage.alive[axis.slots], weight, axis=axis.index)
        elif linear.kind == "ConvTranspose":  # this axis holds the groups too
            columns = groups[:, None] * width + np.arange(width)
            weight = np.take(weight, columns.reshape(-1), axis=axis.index)
    tensor = set_initializer(linear.weight, weight)
    return replace(
        damage.pruned, initializers={**damage.pruned.initializers, linear.weight: tensor}
    )
