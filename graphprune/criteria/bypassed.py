"""What residual blocks are worth: how far the outputs move once they are bypassed.

Blocks leave greedily (after FinerCut, arXiv 2405.18218, which looks at attention and MLP apart):
next goes the one whose loss costs least distortion for the multiply-accumulates it saves. After
each removal the next few in line are measured again, with all others that have left bypassed too,
so the curve holds the distortion of that many blocks gone together and adds nothing up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from graphprune.analysis import Analysis
from graphprune.calibrate.samples import split
from graphprune.calibrate.taps import tapped
from graphprune.criteria.evidence import Evidence, few
from graphprune.distortion import distortion
from graphprune.model import Array, Model
from graphprune.runtime import Feeds, run_session, session
from graphprune.stretches import Stretches

MEASURED_AGAIN = 4  # of the next in line, after each removal
RUINED = 2.0  # distortion beyond which no more is measured: outputs have nothing in common
EVALUATIONS, EFFORT, FEWEST = 4096, 2e12, 4  # samples, MACs, and samples for each, as for groups
COSINE_SAMPLES = 8
SPATIAL_RANK = 4


@dataclass(frozen=True)
class BlockEvidence:
    """Of all blocks that may leave, in the order of ``coupling.blocks``: ``alone`` [blocks], the
    distortion of the outputs when one is bypassed, and ``turn`` [blocks], how similar its output is
    to its input: 1 - cosine. ``greedy`` holds their order and the curve of leaving together."""

    alone: NDArray[np.float64]
    turn: NDArray[np.float64]
    greedy: Evidence


def weigh_blocks(
    analysis: Analysis,
    original: Model,
    feeds: Sequence[Feeds],
    *,
    memory: float = 1e9,
    progress: Callable[[float], None] = lambda share: None,
) -> BlockEvidence:
    """Measure every block that may leave. ``original`` computes what ``analysis.model`` does, with
    the same names."""
    units = analysis.coupling.blocks
    terms = [branch.tensor for branch in analysis.relations.branches]
    terms = [term for term, unit in zip(terms, units, strict=True) if unit >= 0]
    sums = [b.exit for b, unit in zip(analysis.blocks, units, strict=True) if unit >= 0]
    fit, held = split(feeds)
    macs = max(analysis.cost.of(analysis.nothing_removed).macs, 1.0)
    runs = max(1, len(terms) * (1 + MEASURED_AGAIN))
    most = max(FEWEST, int(min(EVALUATIONS, EFFORT / macs) / runs))
    judges = few(original, held if len(held) else fit, most)
    stretches = Stretches(original, judges, (), memory)

    def lost(gone: Sequence[int]) -> float:
        answers = stretches.without([terms[i] for i in gone])
        pairs = zip(stretches.reference, answers, strict=True)
        found = float(np.mean([distortion(reference, now) for reference, now in pairs]))
        return found if np.isfinite(found) else np.inf

    alone = np.zeros(len(terms))
    for i in range(len(terms)):
        progress(i / runs)
        alone[i] = lost([i])
    again = partial(_beyond, progress, len(terms), runs)
    greedy = _greedy(alone, _saved(analysis), lost, again)
    return BlockEvidence(alone, _turns(analysis, original, judges, terms, sums), greedy)


def _beyond(progress: Callable[[float], None], first: int, runs: int, done: int) -> None:
    progress((first + done) / runs)


def _saved(analysis: Analysis) -> NDArray[np.float64]:
    """Share of the MACs of each block that may leave."""
    whole = analysis.cost.of(analysis.nothing_removed).macs
    found = []
    for unit in analysis.coupling.blocks[analysis.coupling.blocks >= 0]:
        removed = analysis.nothing_removed
        removed[unit] = True
        found.append(1 - analysis.cost.of(removed).macs / max(whole, 1.0))
    return np.asarray(np.maximum(found, 1e-9))


def _greedy(
    alone: NDArray[np.float64],
    saved: NDArray[np.float64],
    lost: Callable[[Sequence[int]], float],
    progress: Callable[[int], None],
) -> Evidence:
    """The order in which blocks leave, and the distortion after each."""
    price = alone.copy()  # what leaving costs beside those that have left, as last measured
    left, gone = list(range(len(alone))), list[int]()
    curve = [0.0]
    measured = 0
    while left:
        line = sorted(left, key=lambda i: (price[i] / saved[i], i))
        best, after = line[0], curve[-1] + price[line[0]]
        if not gone:
            after = alone[best]
        elif curve[-1] < RUINED:
            found = []
            for i in line[:MEASURED_AGAIN]:
                progress(measured)
                measured += 1
                total = lost([*gone, i])
                price[i] = max(total - curve[-1], 0.0)
                found.append((price[i] / saved[i], i, total))
            _, best, after = min(found)
        gone.append(best)
        left.remove(best)
        curve.append(max(curve[-1], after))
    finite = np.array(curve)
    worst = float(finite[np.isfinite(finite)].max())
    finite[~np.isfinite(finite)] = 10 * max(worst, RUINED)
    return Evidence(np.array(gone, dtype=np.int64), finite)


def _turns(
    analysis: Analysis,
    original: Model,
    feeds: Sequence[Feeds],
    terms: Sequence[str],
    sums: Sequence[str],
) -> NDArray[np.float64]:
    """1 - cosine of what a sum is with a block and without, over the channels of every position."""
    if not terms:
        return np.zeros(0)
    names = [*dict.fromkeys((*terms, *sums))]
    runner = session(tapped(original, names, analysis.shapes))
    few_feeds = few(original, feeds, COSINE_SAMPLES)
    found = []
    for feed in few_feeds:
        values = dict(zip(names, run_session(runner, feed), strict=True))
        pairs = zip(terms, sums, strict=True)
        found.append([_turn(values[total] - values[term], values[total]) for term, total in pairs])
    return np.asarray(np.mean(found, axis=0))


def _turn(x: Array, y: Array) -> float:
    axis = 1 if x.ndim >= SPATIAL_RANK else -1
    a, b = x.astype(np.float64), y.astype(np.float64)
    sizes = np.sqrt((a * a).sum(axis=axis) * (b * b).sum(axis=axis))
    return float(np.mean(1 - (a * b).sum(axis=axis) / np.maximum(sizes, 1e-30)))
