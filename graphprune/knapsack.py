"""How much each group loses: a multiple-choice knapsack over distortion curves, solved exactly.

Costs are products of several groups' sizes, so they are taken one group at a time around the
current choice, solved, taken again around the solution, and so on (algorithms: allocation).
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array, csr_array

Levels = NDArray[np.int64]
Values = NDArray[np.float64]
ROUNDS = 8
PROBES = 9  # levels of a group at which costs are evaluated; between them they are interpolated
GAP = 1e-4  # relative: how near the optimum HiGHS must come
# Measured costs are good to a few percent and need not fall with every step, which makes optima
# hard to prove and little worth.
MEASURED = {"latency"}
MEASURED_GAP = 5e-3
# Levels that are weighed in all, and at least of each group: what passes between two of them is
# given back step by step afterwards. So the time does not grow with every level of every group.
COLUMNS, FEWEST_LEVELS = 16384, 16
MOST_NODES = 500  # of the tree of solutions: ends a search at the same place on any machine


def solve(
    distortions: Sequence[Values],
    costs: Callable[[Levels], Mapping[str, float]],
    limits: Mapping[str, float],
    start: Levels,
    every: Collection[int] = (),
) -> Levels:
    """Levels of least summed distortion whose costs stay within the limits, or near them.

    ``distortions[g][level]`` never falls with the level; ``costs`` evaluates all levels exactly;
    ``start`` is a choice that fits. The best exact fit found is returned. Costs of the groups in
    ``every`` are evaluated at all of their levels.
    """
    current, best = start, start
    allowed = dict(limits)

    def total(levels: Levels) -> float:
        return float(sum(d[level] for d, level in zip(distortions, levels, strict=True)))

    for _ in range(ROUNDS):
        now = costs(current)
        tables = _tables(distortions, costs, current, list(limits), every)
        room = {kind: allowed[kind] - now[kind] for kind in limits}
        found = _chosen(distortions, tables, room, current)
        if found is None:
            return best
        after = costs(found)
        if all(after[kind] <= limits[kind] * (1 + 1e-12) for kind in limits):
            best = found if total(found) < total(best) or (best is start) else best
        if np.array_equal(found, current):
            break
        for kind in limits:  # what linearisation missed last time is asked for beforehand
            excess = after[kind] - limits[kind]
            allowed[kind] = min(limits[kind], allowed[kind] - max(excess, 0.0) * 0.5)
        current = found
    return best


def _tables(
    distortions: Sequence[Values],
    costs: Callable[[Levels], Mapping[str, float]],
    current: Levels,
    kinds: Sequence[str],
    every: Collection[int],
) -> dict[str, list[Values]]:
    """Change of each cost for every level of every group, the others staying as they are."""
    base = costs(current)
    tables: dict[str, list[Values]] = {kind: [] for kind in kinds}
    for g, curve in enumerate(distortions):
        count = len(curve) if g in every else PROBES
        probes = np.unique(np.linspace(0, len(curve) - 1, count).round().astype(np.int64))
        probes = np.union1d(probes, [current[g]])
        found = []
        for level in probes:
            other = current.copy()
            other[g] = level
            found.append(costs(other))
        for kind in kinds:
            values = [after[kind] - base[kind] for after in found]
            tables[kind].append(np.interp(np.arange(len(curve)), probes, values))
    return tables


def _chosen(
    distortions: Sequence[Values],
    tables: Mapping[str, Sequence[Values]],
    room: Mapping[str, float],
    current: Levels,
) -> Levels | None:
    """One level per group: least distortion with the summed changes of cost within ``room``."""
    most = max(FEWEST_LEVELS, COLUMNS // max(len(distortions), 1))
    picks = [_picked(len(d), most, level) for d, level in zip(distortions, current, strict=True)]
    sizes = [len(pick) for pick in picks]
    objective = np.concatenate([d[pick] for d, pick in zip(distortions, picks, strict=True)])
    group = np.repeat(np.arange(len(sizes)), sizes)
    one_each: csr_array = coo_array((np.ones(len(group)), (group, np.arange(len(group))))).tocsr()
    constraints = [LinearConstraint(one_each, 1, 1)]
    changes = np.array(
        [
            np.concatenate([row[pick] for row, pick in zip(rows, picks, strict=True)])
            for rows in tables.values()
        ]
    )
    changes = changes.reshape(len(tables), len(objective))
    scale = np.abs(changes).max(axis=1, initial=1e-30)
    most = np.array([room[kind] for kind in tables]) / scale
    constraints.append(LinearConstraint(csr_array(changes / scale[:, None]), -np.inf, most))
    spread = max(float(objective.max()), 1e-30)
    gap = GAP if MEASURED.isdisjoint(tables) else MEASURED_GAP
    options: Any = {"mip_rel_gap": gap, "node_limit": MOST_NODES}  # never a time: no two are equal
    with _stdout_shut():
        answer = milp(
            objective / spread,
            constraints=constraints,
            integrality=np.ones(len(objective), np.int64),
            bounds=Bounds(0, 1),
            options=options,
        )
    if answer.x is None:
        return None
    starts = np.cumsum([0, *sizes[:-1]])
    return np.array(
        [
            pick[int(np.argmax(answer.x[s : s + len(pick)]))]
            for s, pick in zip(starts, picks, strict=True)
        ],
        dtype=np.int64,
    )


def _picked(count: int, most: int, current: int) -> Levels:
    """Up to about ``most`` of so many levels, evenly, and the current one."""
    if count <= most:
        return np.arange(count)
    return np.union1d(np.linspace(0, count - 1, most).round().astype(np.int64), [current])


@contextmanager
def _stdout_shut() -> Iterator[None]:
    """What C code prints goes nowhere: HiGHS now and then writes a line of its own, which would
    stand among the JSON (known upstream, jump-dev/HiGHS.jl issue 312)."""
    try:
        kept = os.dup(1)
    except OSError:  # there is no stdout to keep clean
        yield
        return
    flush = ctypes.CDLL(None).fflush if os.name == "posix" else (lambda stream: None)
    sys.stdout.flush()
    flush(None)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        flush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
