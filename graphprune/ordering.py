"""In which order channels stand so that many kept sets are ranges (UPSCALE, arXiv 2307.08771).

Nodes are sets; one that lies inside another is ordered inside it, as its child. Sets that share
channels are neighbours: of all paths the one that covers most channels is laid out as
[shared with the previous][own][shared with the next]; on leaving a node all its other neighbours
are barred, since a later one could not be a range. Then the next path, of sets that share nothing
with what is laid out. The published search is exponential where many sets overlap (DenseNet): here
it takes a fixed number of steps, the most promising neighbours first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

MOST_STEPS = 2000  # of one search for a path
Set = frozenset[int]


def ordered(size: int, sets: Sequence[NDArray[np.bool_]]) -> NDArray[np.int64]:
    """[size]: which channel stands where, for ``sets`` (bool per channel) that are to be ranges."""
    unique = {frozenset(np.flatnonzero(mask).tolist()) for mask in sets}
    wanted = [s for s in unique if 1 < len(s) < size]
    return np.array(_laid_out(list(range(size)), wanted), dtype=np.int64)


def ranges(order: NDArray[np.int64], sets: Sequence[NDArray[np.bool_]]) -> int:
    """How many of the sets are ranges in this order."""
    found = [np.flatnonzero(mask[order]) for mask in sets]
    return sum(len(at) == 0 or int(at[-1] - at[0]) == len(at) - 1 for at in found)


def _laid_out(channels: list[int], sets: Sequence[Set]) -> list[int]:
    """``channels`` in an order; those in no set keep theirs, at the end."""
    rest = sorted(sets, key=lambda s: (-len(s), sorted(s)))
    done: list[int] = []
    while rest:
        top = [s for s in rest if not any(s < other for other in rest)]
        path = _path(top)
        segments = _segments(path)
        used: Set = frozenset().union(*path)
        for segment in segments:
            inner = [s for s in rest if s < segment]
            done += _laid_out(sorted(segment), inner)
        rest = [s for s in rest if not s & used]
    placed = set(done)
    return done + [channel for channel in channels if channel not in placed]


def _segments(path: Sequence[Set]) -> list[Set]:
    """[own][shared with the next][own of the next]…; no channel twice."""
    segments: list[Set] = []
    shared: Set = frozenset()
    for i, node in enumerate(path):
        following = path[i + 1] & node if i + 1 < len(path) else frozenset()
        segments += [node - shared - following, following - shared]
        shared = shared | following
    return [segment for segment in segments if segment]


def _path(nodes: Sequence[Set]) -> list[Set]:
    """The path that covers most distinct channels, as far as ``MOST_STEPS`` reach."""
    near = [
        sorted(
            (j for j, other in enumerate(nodes) if j != i and node & other),
            key=lambda j: (-len(nodes[j] - node), j),
        )
        for i, node in enumerate(nodes)
    ]
    best: list[int] = []
    most, steps = -1, 0
    waiting = [([i], frozenset[int]()) for i in reversed(range(len(nodes)))]
    while waiting and steps < MOST_STEPS:
        steps += 1
        path, barred = waiting.pop()
        covered = len(frozenset[int]().union(*(nodes[i] for i in path)))
        if covered > most:
            best, most = path, covered
        last = path[-1]
        for following in reversed(near[last]):
            if following in barred or following in path:
                continue
            waiting.append(([*path, following], barred | set(near[last]) | {last}))
    return [nodes[i] for i in best]
