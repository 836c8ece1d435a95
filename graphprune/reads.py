"""What is read by copies of its own (``Op.read``): who leaves with whom, in one direction.

A source takes all its reads along when it leaves; a read leaves alone. Once all reads of a source
have left and nothing else sums over it, it leaves too: nobody would see it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from graphprune.relations import Pin, Relations

Labels = NDArray[np.int32]  # slot → component
Mask = NDArray[np.bool_]
Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Follow:
    """Pairs of a source and what reads it, and the sources that leave once all their reads have:
    numbers of components or of units."""

    source: Numbers  # [pairs]
    read: Numbers  # [pairs]
    unread: Numbers  # sources

    def closed(self, gone: Mask) -> Mask:
        """``gone`` (bool per number) with all that leaves because of it."""
        if not len(self.source):
            return gone
        gone = gone.copy()
        before = -1
        while before != (before := int(gone.sum())):
            gone[self.read[gone[self.source]]] = True
            left = np.bincount(self.source, ~gone[self.read], minlength=len(gone))
            gone[self.unread[left[self.unread] == 0]] = True
        return gone

    def renumbered(self, number: Numbers) -> Follow:
        """By ``number`` of each, which is -1 where it never leaves."""
        source, read = number[self.source], number[self.read]
        real = (source >= 0) & (read >= 0)
        unread = number[self.unread]
        return Follow(source[real], read[real], unread[unread >= 0])


def pairs(relations: Relations, labels: Labels) -> tuple[Numbers, Numbers]:
    """Components of sources and of what reads them, each pair once."""
    found = [np.empty((0, 2), np.int64)]
    found += [np.stack([labels[r.source], labels[r.read]], axis=1) for r in relations.reads]
    unique = np.unique(np.concatenate(found), axis=0)
    return unique[:, 0], unique[:, 1]


def follow(relations: Relations, labels: Labels, stays: Mask) -> Follow:
    """Among components, of which those of ``stays`` never leave.

    Unread are sources that no operator sums over or takes statistics over: for these, to be read
    by nobody is to be absent.
    """
    source, read = pairs(relations, labels)
    seen = np.zeros(len(stays), dtype=bool)
    for contraction in relations.contractions:
        seen[labels[contraction.slots]] = True
    for shift in relations.shifts:
        seen[labels[shift.slots]] = True
    sources = np.unique(source)
    return Follow(source, read, sources[~seen[sources] & ~stays[sources]])


def held_by_reads(relations: Relations, labels: Labels, pinned: Mask) -> list[Pin]:
    """Pins on sources of which some read must stay."""
    held = pinned.copy()
    found: list[Pin] = []
    before = -1
    while before != (before := int(held.sum())):
        for entry in relations.reads:
            kept = held[labels[entry.read]] & ~held[labels[entry.source]]
            if kept.any():
                found.append(Pin(entry.source[kept], "what reads it must stay", entry.node))
                held[labels[entry.source[kept]]] = True
    return found
