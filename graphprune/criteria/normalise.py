"""NORM: what makes scores comparable across groups of other sizes and scales."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]


def _divide(scores: Scores, by: float) -> Scores:
    return scores / by if 0 < by < np.inf else scores


def standardise(scores: Scores) -> Scores:
    return _divide(scores - scores.mean(), float(scores.std()))


def lamp(scores: Scores) -> Scores:
    """w_u^2 / sum of w_v^2 over all v with w_v^2 >= w_u^2 (LAMP, arXiv 2010.07611, equation 3).

    ``scores`` are the squares. The largest scores 1, so ranking globally never empties a group.
    """
    ascending = np.sort(scores)
    suffix = np.cumsum(ascending[::-1])[::-1]
    from_there = suffix[np.searchsorted(ascending, scores, side="left")]  # equals share one sum
    return np.divide(scores, from_there, out=np.zeros(len(scores)), where=from_there > 0)


NORMALISE: dict[str, Callable[[Scores], Scores]] = {
    "none": lambda scores: scores,
    "sum": lambda scores: _divide(scores, float(scores.sum())),
    "mean": lambda scores: _divide(scores, float(scores.mean())),
    "max": lambda scores: _divide(scores, float(scores.max(initial=0.0))),
    "standardise": standardise,
    "lamp": lamp,
}
