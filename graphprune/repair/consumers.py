"""Operators that read channels which left, with the weights they had for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from graphprune.coupling import Coupling, Mask
from graphprune.linear import CONVOLUTIONS, Linear, Matrix, linears
from graphprune.model import Model, label, set_initializer


@dataclass(frozen=True)
class Untouched:
    """An operator that keeps the weights the cut left, and why."""

    node: str
    reason: str

    def __str__(self) -> str:
        return f"{self.node}: not repaired ({self.reason})"


@dataclass(frozen=True)
class Consumer:
    """A linear operator of the pruned model, whose ``weights`` are still those for all channels of
    its input: [groups, out, channels, taps]. ``kept``: [groups, channels]; ``groups``: which of the
    original's groups of channels there still are."""

    linear: Linear
    node: str
    weights: Matrix
    offset: Matrix  # [groups, out]
    kept: Mask
    groups: Mask

    def folded(self, mixing: list[Matrix], shift: list[Matrix]) -> tuple[Linear, Matrix, Matrix]:
        """The weights of what is kept, when channel p that left is mixing[p, s] x_s + shift[p].

        One mixing and one shift for each group, in the order of the group's channels.
        """
        matrices, offsets = [], []
        for g, kept in enumerate(self.kept):
            lost = self.weights[g][:, ~kept]
            matrix = self.weights[g][:, kept] + np.einsum("opt,ps->ost", lost, mixing[g])
            matrices.append(matrix.reshape(len(matrix), -1))
            offsets.append(self.offset[g] + np.einsum("opt,p->o", lost, shift[g]))
        return self.linear, np.stack(matrices), np.stack(offsets)


def channel_axis(linear: Linear, rank: int) -> int:
    """The axis of the operator's input that it sums over."""
    return 1 if linear.kind in CONVOLUTIONS else rank - 1


def consumers(
    original: Model, pruned: Model, coupling: Coupling, alive: Mask
) -> Iterator[Consumer]:
    """The linear operators of ``pruned`` that lost channels of their input, in node order."""
    slots = coupling.relations.slots.tensors
    before = {linear.weight: linear for linear in linears(original)}
    for linear in linears(pruned):
        if linear.weight not in before or not {linear.weight, linear.x} <= slots.keys():
            continue
        x = slots[linear.x]
        kept = alive[x[channel_axis(linear, x.rank)].slots].reshape(before[linear.weight].groups, -1)
        groups = kept.any(axis=1)
        if kept[groups].all():
            continue
        weight = original.array(linear.weight)
        for axis in slots[linear.weight]:
            rows = alive[axis.slots]
            if axis.index == linear.contracted_axis:
                whole = linear.kind == "ConvTranspose"
                rows = np.repeat(groups, kept.shape[1]) if whole else np.ones(len(axis), bool)
            weight = np.compress(rows, weight, axis=axis.index)
        tensors = {**pruned.initializers, linear.weight: set_initializer(linear.weight, weight)}
        matrix = linear.matrix(replace(pruned, initializers=tensors))
        outputs = matrix.shape[0] * matrix.shape[1]
        yield Consumer(
            linear,
            label(pruned.nodes[linear.node]),
            matrix.reshape(*matrix.shape[:2], kept.shape[1], -1),
            linear.offset(pruned, outputs),
            kept[groups],
            groups,
        )
