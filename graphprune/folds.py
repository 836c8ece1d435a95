"""What folds say before it is settled which of their parts carries the removals."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from graphprune.relations import Fold, Relations
from graphprune.slots import SlotArray

Labels = NDArray[np.int32]  # slot → component
Mask = NDArray[np.bool_]


def same_parts(relations: Relations, labels: Labels) -> list[tuple[SlotArray, SlotArray]]:
    """Ties between the parts of two folds that split the same slots into the same lengths, as a
    grouped convolution and the Reshape into heads behind it do, where they are not tied yet."""
    first: dict[tuple[bytes, tuple[int, ...]], Fold] = {}
    ties = []
    for fold in relations.folds:
        lengths = tuple(len(part) for part in fold.parts)
        known = first.setdefault((labels[fold.whole].tobytes(), lengths), fold)
        for a, b in zip(known.parts, fold.parts, strict=True):
            if not np.array_equal(labels[a], labels[b]):
                ties.append((a, b))
    return ties


def stuck_components(relations: Relations, labels: Labels, pinned: Mask) -> Mask:
    """Components that must stay: those pinned, and what cannot leave a fold without them. A part is
    smaller than its whole, so few rounds settle folds of folds."""
    stuck = pinned.copy()
    before = -1
    while before != (before := int(stuck.sum())):
        for fold in relations.folds:
            lengths = [len(part) for part in fold.parts]
            whole = stuck[labels[fold.whole]].reshape(lengths)
            if not whole.any():
                continue
            for p, part in enumerate(fold.parts):
                others = tuple(axis for axis in range(len(lengths)) if axis != p)
                stuck[labels[part[whole.any(axis=others)]]] = True
    return stuck
