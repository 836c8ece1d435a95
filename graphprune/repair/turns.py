"""In which order operators are repaired: each after all that it reads from.

The uses of one weight are one step, taken when the inputs of all of them are known. Uses that feed
each other, directly or through uses of another weight, cannot wait for that: each is a step.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from graphprune.linear import Linear
from graphprune.model import Model, captured

Uses = tuple[Linear, ...]
Edges = set[tuple[int, int]]


def turns(model: Model, several: Sequence[Uses]) -> list[Uses]:
    """The steps: ``several`` in order, those split into single uses that feed each other."""
    if all(len(uses) == 1 for uses in several):
        return sorted(several, key=lambda uses: uses[0].node)
    edges = _edges(model)
    together = [uses for uses in several if len(uses) > 1]
    feeding = _feeding(len(model.nodes), edges, together)
    whole = [uses for uses in together if uses[0].weight not in feeding]
    place = _order(len(model.nodes), edges, whole)
    at_once = {uses[0].weight for uses in whole}
    steps = [(one,) for uses in several for one in uses if one.weight not in at_once]
    return sorted([*whole, *steps], key=lambda uses: (place[uses[0].node], uses[0].node))


def _edges(model: Model) -> Edges:
    return {
        (model.producer[name], j)
        for j, node in enumerate(model.nodes)
        for name in (*node.input, *captured(node))
        if name in model.producer
    }


def _merged(count: int, together: Sequence[Uses]) -> list[int]:
    """Which number stands for each node: uses of one weight have that of the first."""
    numbers = list(range(count))
    for uses in together:
        for use in uses:
            numbers[use.node] = uses[0].node
    return numbers


def _feeding(count: int, edges: Edges, together: Sequence[Uses]) -> set[str]:
    """Weights of which some use reads what another one computes, once uses are taken as one."""
    number = np.array(_merged(count, together))
    pairs = number[np.array(sorted(edges), dtype=np.int64).reshape(-1, 2)]
    graph = coo_array((np.ones(len(pairs), np.int8), pairs.T), shape=(count, count))
    labels = connected_components(graph, connection="strong")[1]
    sizes = np.bincount(labels)
    itself = {int(a) for a, b in pairs if a == b}
    return {
        uses[0].weight
        for uses in together
        if sizes[labels[uses[0].node]] > 1 or uses[0].node in itself
    }


def _order(count: int, edges: Edges, together: Sequence[Uses]) -> list[int]:
    """The place of each node in an order that keeps to the nodes' own where it can."""
    number = _merged(count, together)
    after: dict[int, set[int]] = {}
    before = [0] * count
    for a, b in sorted({(number[a], number[b]) for a, b in edges}):
        after.setdefault(a, set()).add(b)
        before[b] += 1
    ready = [i for i in range(count) if number[i] == i and not before[i]]
    heapq.heapify(ready)
    place = [0] * count
    for turn in range(count):
        if not ready:
            break
        at = heapq.heappop(ready)
        place[at] = turn
        for b in sorted(after.get(at, ())):
            before[b] -= 1
            if not before[b]:
                heapq.heappush(ready, b)
    return [place[n] for n in number]
