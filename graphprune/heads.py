"""Which part of a fold carries its removals: whole heads, or the same positions of every head."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from graphprune.folds import stuck_components
from graphprune.relations import Fold, Pin, Relations
from graphprune.slots import SlotArray

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Heads:
    """Which components count heads, which are what heads are made of, and where all of it stands.

    Heads are made of others where queries are grouped: of KV heads, and of the query heads in each.
    """

    counted: frozenset[int]
    within: frozenset[int]
    whole: tuple[SlotArray, ...]  # axes of heads
    dims: tuple[SlotArray, ...]  # what is folded with them: the positions in a head

    @property
    def slots(self) -> tuple[SlotArray, ...]:
        return self.whole + self.dims


def heads_of(relations: Relations, labels: NDArray[np.int32], pinned: Mask) -> Heads:
    counted = frozenset(int(c) for slots in relations.heads for c in labels[slots])
    within = _made_of(relations, labels, pinned, counted)
    either = counted | within
    whole, dims = list(relations.heads), []
    for fold in relations.folds:
        is_head = [not either.isdisjoint(labels[part].tolist()) for part in fold.parts]
        whole += [part for part, head in zip(fold.parts, is_head, strict=True) if head]
        if any(is_head):
            dims += [part for part, head in zip(fold.parts, is_head, strict=True) if not head]
    channels = {int(c) for slots in relations.channels for c in labels[slots]}
    dims = [part for part in dims if channels.isdisjoint(labels[part].tolist())]
    return Heads(counted, within, tuple(whole), tuple(dims))


def not_among(units: Collection[str], heads: Heads) -> list[Pin]:
    """Pins on what the user did not choose."""
    pins = []
    if "heads" not in units:
        pins += [Pin(slots, "whole heads are not among the --units", -1) for slots in heads.whole]
    if "head-dims" not in units:
        pins += [
            Pin(slots, "positions in heads are not among the --units", -1) for slots in heads.dims
        ]
    return pins


def settled_folds(
    relations: Relations,
    labels: NDArray[np.int32],
    pinned: Mask,
    heads: Heads,
    held: Sequence[Pin],
) -> tuple[list[tuple[SlotArray, SlotArray]], list[Pin]]:
    """What settling the folds ties, and the pins on the parts that must stay whole."""
    carrier = _carriers(relations, labels, pinned, heads)
    first_pin: dict[int, Pin] = {}
    for pin in held if relations.folds else ():
        for component in np.unique(labels[pin.slots]).tolist():
            first_pin.setdefault(component, pin)
    ties: list[tuple[SlotArray, SlotArray]] = []
    pins: list[Pin] = []
    for f, fold in enumerate(relations.folds):
        chosen = carrier.get(f)
        for p, part in enumerate(fold.parts):
            if p != chosen:
                pins.append(Pin(part, "a Reshape keeps this factor whole", fold.node))
        if chosen is None:
            because = _what_holds(fold, labels, pinned, first_pin)
            reason = f"it is made of axes that must stay{because}"
            pins.append(Pin(fold.whole, reason, fold.node))
            continue
        ties.append((fold.whole, _spread(fold, chosen)))
    return ties, pins


def _carriers(
    relations: Relations, labels: NDArray[np.int32], pinned: Mask, heads: Heads
) -> dict[int, int]:
    """Choose for every fold the part that carries removals; its other parts must stay whole.

    Parts tied to each other across folds decide together (a channel shuffle splits and merges the
    same two axes). What cannot leave comes last: each of its slots would take one along that must
    stay. Of the others heads come first, then what heads are made of; among them what stands in
    most folds (of grouped queries KV heads, not the query heads in a group). Experts that may leave
    come first like heads. Then comes what no
    statistics are taken over, then the part of which most may leave apart from each other once
    heads leave whole, then the outermost.
    """
    places: dict[int, list[tuple[int, int]]] = {}  # class of a part → (fold, part) where it stands
    found: dict[int, tuple[int, int, int, int]] = {}  # class → head, made of heads, exact, free
    stuck = stuck_components(relations, labels, pinned)
    movable: set[int] = set()  # classes with a slot that may leave
    classes = _part_classes(relations, labels)
    shifted = _under_statistics(relations, labels)
    either = (*relations.choices, *relations.weighed)
    first = heads.counted.union(*(labels[choice.slots].tolist() for choice in either))
    for f, fold in enumerate(relations.folds):
        for p, part in enumerate(fold.parts):
            loose = labels[part][~pinned[labels[part]]]
            free = len(loose)
            if free == 0:
                continue
            kind = classes[f][p]
            components = labels[part].tolist()
            is_head = int(not first.isdisjoint(components))
            in_head = int(not heads.within.isdisjoint(components))
            places.setdefault(kind, []).append((f, p))
            exact = int(not shifted[loose].any())
            found.setdefault(kind, (is_head, in_head, exact, free))
            if not stuck[components].all():
                movable.add(kind)

    carrier: dict[int, int] = {}

    def carry(kind: int) -> None:
        folds = [f for f, _ in places[kind]]
        if len(set(folds)) == len(folds) and not any(f in carrier for f in folds):
            carrier.update(places[kind])

    def rank(kind: int) -> tuple[int, int, int, int, int, int]:
        is_head, in_head, exact, free = found[kind]
        reach = len(places[kind]) if is_head or in_head else 0
        return kind not in movable, -is_head, -in_head, -reach, -exact, -free

    of_heads = [kind for kind in places if any(found[kind][:2]) and kind in movable]
    for kind in sorted(of_heads, key=rank):
        carry(kind)
    others = [kind for kind in places if kind not in of_heads]
    whole = _heads_whole(relations, labels, carrier)
    if whole is not None:
        for kind in others:
            is_head, in_head, exact, free = found[kind]
            free = _apart(relations, labels, pinned, whole, places[kind], free)
            found[kind] = is_head, in_head, exact, free
    for kind in sorted(others, key=rank):
        carry(kind)
    return carrier


def _spread(fold: Fold, chosen: int) -> SlotArray:
    """For each slot of the whole the one of the chosen part that it leaves with."""
    lengths = [len(part) for part in fold.parts]
    shape = [1] * len(lengths)
    shape[chosen] = lengths[chosen]
    return np.broadcast_to(fold.parts[chosen].reshape(shape), lengths).reshape(-1)


def _heads_whole(
    relations: Relations, labels: NDArray[np.int32], carrier: dict[int, int]
) -> NDArray[np.int32] | None:
    """Component → component where heads leave whole; ``None`` where there are none."""
    if not carrier:
        return None
    folds = [(relations.folds[f], p) for f, p in carrier.items()]
    a = np.concatenate([labels[fold.whole] for fold, _ in folds])
    b = np.concatenate([labels[_spread(fold, p)] for fold, p in folds])
    size = int(labels.max()) + 1
    graph = coo_array((np.ones(len(a), np.int8), (a, b)), shape=(size, size))
    return np.asarray(connected_components(graph, directed=False)[1])


def _apart(
    relations: Relations,
    labels: NDArray[np.int32],
    pinned: Mask,
    whole: NDArray[np.int32],
    places: Sequence[tuple[int, int]],
    free: int,
) -> int:
    """How many of the ``free`` slots of a part still leave one by one where heads leave whole and
    this part carries the removals of its folds."""
    folds = [(relations.folds[f], p) for f, p in places]
    ends = [labels[fold.whole] for fold, _ in folds]
    if all(len(np.unique(end)) == len(np.unique(whole[end])) for end in ends):
        return free  # no head takes several of them
    parts = whole[np.concatenate([labels[_spread(fold, p)] for fold, p in folds])]
    taken = whole[np.concatenate(ends)]
    names, numbers = np.unique(np.concatenate([parts, taken]), return_inverse=True)
    a, b = numbers[: len(parts)], numbers[len(parts) :]
    graph = coo_array((np.ones(len(a), np.int8), (a, b)), shape=(len(names), len(names)))
    merged = connected_components(graph, directed=False)[1]
    slots = np.concatenate([fold.parts[p] for fold, p in folds])
    loose = whole[labels[slots[~pinned[labels[slots]]]]]
    return len(np.unique(merged[np.searchsorted(names, loose)]))


def _under_statistics(relations: Relations, labels: NDArray[np.int32]) -> Mask:
    """Components over which a normalisation takes statistics."""
    found = np.zeros(int(labels.max(initial=-1)) + 1, dtype=bool)
    for pin in relations.shifts:
        found[labels[pin.slots]] = True
    return found


def _made_of(
    relations: Relations, labels: NDArray[np.int32], pinned: Mask, heads: frozenset[int]
) -> frozenset[int]:
    """Components of the parts that axes of heads are folded from, and of their parts in turn. What
    must stay is none of them: a fixed batch may share an axis with the heads.
    """
    folds = relations.folds
    lengths = [len(fold.whole) for fold in folds]
    wholes = labels[np.concatenate([*(fold.whole for fold in folds), np.empty(0, np.int64)])]
    order = np.argsort(wholes, kind="stable")
    wholes, inside = wholes[order], np.repeat(np.arange(len(folds)), lengths)[order]
    found: set[int] = set()
    seen: set[int] = set()
    waiting = [np.array(sorted(heads), dtype=np.int64)]
    while waiting:  # components, of which some belong to the wholes of folds
        parts = waiting.pop()
        low, high = (np.searchsorted(wholes, parts, side) for side in ("left", "right"))
        hit = [inside[a:b] for a, b in zip(low[low < high], high[low < high], strict=True)]
        for f in set(np.concatenate([*hit, inside[:0]]).tolist()) - seen:
            seen.add(f)
            parts = np.unique(np.concatenate([labels[part] for part in folds[f].parts]))
            found.update(parts[~pinned[parts]].tolist())
            waiting.append(parts)
    return frozenset(found)


def _what_holds(
    fold: Fold, labels: NDArray[np.int32], pinned: Mask, first_pin: dict[int, Pin]
) -> str:
    """Why the parts of a fold are pinned: the reasons of each part's first pinned slot."""
    stuck = [part[pinned[labels[part]]] for part in fold.parts]
    found = [first_pin[int(labels[slots[0]])].reason for slots in stuck if len(slots)]
    return f" ({', '.join(dict.fromkeys(found))})" if found else ""


def _part_classes(relations: Relations, labels: NDArray[np.int32]) -> list[list[int]]:
    """Parts that share any component decide together: number their classes."""
    parts = [part for fold in relations.folds for part in fold.parts]
    if not parts:
        return []
    rows = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    components = labels[np.concatenate(parts)] + len(parts)
    size = len(parts) + int(labels.max()) + 1
    graph = coo_array((np.ones(len(rows), np.int8), (rows, components)), shape=(size, size))
    _, classes = connected_components(graph, directed=False)
    numbers = iter(classes[: len(parts)].tolist())
    return [[next(numbers) for _ in fold.parts] for fold in relations.folds]
