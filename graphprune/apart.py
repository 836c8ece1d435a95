"""Experts with weights of their own: branches that are weighed by a router and added up.

    Concat(f1(x), f2(x), …) times gates, summed       or       g1 f1(x) + g2 f2(x) + …

A branch is all that serves one piece of the Concat, or one term of the sum, alone. It leaves with
the slot of its expert in the router: the piece or the term goes, and what served it is dead.
Tensors that hold nothing but this expert then have no slots, and nobody reads them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from graphprune.model import Model
from graphprune.relations import Branch, Relations

Labels = NDArray[np.int32]
NOBODY = -1


def experts_apart(model: Model, relations: Relations, labels: Labels) -> Relations:
    """The relations, with the branches of every choice whose experts stand apart, each alone."""
    pieces, terms = [*_pieces(model, relations)], [*_terms(model, relations)]
    ends = [*pieces, *((name, reader) for name, reader, _ in terms)]
    tops = [*(reader for _, reader in pieces), *(top for _, _, top in terms)]
    owner = _owners(model, [name for name, _ in ends])
    columns = _columns(relations, labels)
    experts, apart = [*relations.experts], []
    vanishing: set[int] = set()
    spoken: set[int] = set()  # components of experts that have their branch
    for choice in (*relations.choices, *relations.weighed):
        kinds = labels[choice.slots].tolist()
        held = [columns.get(kind, []) for kind in kinds]
        found = [{_owner_of(model, owner, name) for name in names} for names in held]
        numbers = [number for owners in found for number in owners]
        one_each = all(len(owners) == 1 for owners in found)
        if not one_each or NOBODY in numbers or len({*numbers}) < len(kinds) or len(kinds) < 2:
            continue
        if not spoken.isdisjoint(kinds):
            continue
        if len({tops[number] for number in numbers}) > 1:
            continue  # a part of the sum could lose all of its terms, and others read it
        spoken |= {*kinds}
        experts.append(choice.slots)
        for place, kind in enumerate(kinds):
            name, reader = ends[numbers[place]]
            nodes = frozenset(i for i, who in owner.items() if who == numbers[place])
            apart.append(Branch(name, choice.slots[place : place + 1], nodes, reader))
            axes = [axis for n in held[place] for axis in relations.slots.tensors[n]]
            mine = [axis for axis in axes if len(axis) == 1 and labels[axis.slots[0]] == kind]
            vanishing |= {int(axis.slots[0]) for axis in mine}
    return replace(relations, experts=experts, apart=apart, vanishing=vanishing)


def _pieces(model: Model, relations: Relations) -> Iterator[tuple[str, int]]:
    """Pieces of one slot that a Concat alone reads, and its number."""
    slots = relations.slots.tensors
    for index, node in enumerate(model.nodes):
        if node.op_type != "Concat" or node.domain or node.output[0] not in slots:
            continue
        names = list(node.input)
        axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
        known = all(name in slots and name not in model.constant_names for name in names)
        if not known or not all(model.read_once(name) for name in names):
            continue
        axis %= max(1, slots[node.output[0]].rank)
        if all(len(slots[name][axis]) == 1 for name in names):
            yield from ((name, index) for name in names)


def _terms(model: Model, relations: Relations) -> Iterator[tuple[str, int, int]]:
    """Terms of sums: what an Add or Sum of equal shapes alone reads, less sums themselves; and the
    last of the sums that each is a part of."""
    slots = relations.slots.tensors
    sums = {
        node.output[0]: index
        for index, node in enumerate(model.nodes)
        if node.op_type in ("Add", "Sum")
        and not node.domain
        and all(name in slots and name not in model.constant_names for name in node.input)
        and node.output[0] in slots
        and len({slots[name].shape for name in (*node.input, node.output[0])}) == 1
    }
    top: dict[int, int] = {}
    for name, index in reversed(sums.items()):
        reader = model.consumers[name][0][0] if model.read_once(name) else index
        top[index] = top.get(reader, index)
    for index in sums.values():
        for name in model.nodes[index].input:
            if model.read_once(name) and name not in sums:
                yield name, index, top[index]


def _owners(model: Model, ends: list[str]) -> dict[int, int]:
    """Node → the end that all it makes serves alone, by number."""
    number = {name: i for i, name in enumerate(ends)}
    owner: dict[int, int] = {}
    for index in range(len(model.nodes) - 1, -1, -1):
        found = set()
        for name in filter(None, model.nodes[index].output):
            if name in number:
                found.add(number[name])
            elif name in model.output_names:
                found.add(NOBODY)
            else:
                found |= {owner.get(i, NOBODY) for i, _ in model.consumers.get(name, ())}
        if len(found) == 1 and NOBODY not in found:
            owner[index] = found.pop()
    return owner


def _columns(relations: Relations, labels: Labels) -> Mapping[int, list[str]]:
    """Component → tensors that have an axis of it alone."""
    found: dict[int, list[str]] = {}
    for name, tensor in relations.slots.tensors.items():
        for axis in tensor:
            if len(axis) == 1:
                found.setdefault(int(labels[axis.slots[0]]), []).append(name)
    return found


def _owner_of(model: Model, owner: Mapping[int, int], name: str) -> int:
    """The end that a tensor serves alone: by the node that writes it, or by all that read it."""
    written = owner.get(model.producer.get(name, -1), NOBODY)
    if written != NOBODY:
        return written
    readers = {owner.get(i, NOBODY) for i, _ in model.consumers.get(name, ())}
    return readers.pop() if len(readers) == 1 else NOBODY
