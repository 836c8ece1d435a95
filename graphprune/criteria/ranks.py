"""What calibration inputs say about each layer that may be two: the distortion of the model's
outputs at every rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from graphprune.calibrate.samples import split
from graphprune.criteria.evidence import (
    EFFECTS_SHARE,
    EFFORT,
    EVALUATIONS,
    FEWEST,
    Effect,
    few,
    scaled,
)
from graphprune.factors import Directions, Site, directions
from graphprune.frontier import Frontier
from graphprune.model import Model
from graphprune.runtime import Feeds

Matrix = NDArray[np.float64]
STOPS = (0.9, 0.4)  # of the rank that costs as much as the whole: where outputs are looked at
ALIKE = 1


def rank_curves(
    model: Model,
    folded: Model,
    sites: Sequence[Site],
    feeds: Sequence[Feeds],
    *,
    macs: float,
    memory: float,
    seed: int,
    progress: Callable[[float], None] = lambda share: None,
) -> Mapping[str, Matrix]:
    """By weight: the distortion [full + 1] of the outputs after so many directions have left.

    Squared errors of the layer's own outputs are the tail of its spectrum; they are scaled to the
    model's by what these do at two ranks, on inputs held out, as for channels.
    """
    fit, held = split(feeds)
    frontier = Frontier(folded, fit, memory * (1 - EFFECTS_SHARE))
    most = min(EVALUATIONS, EFFORT / max(macs, 1.0)) / max(1, len(sites) * len(STOPS))
    judges = few(folded, held if len(held) else fit, max(FEWEST, int(most)))
    operators = [site.folded for site in sites]
    effect = Effect(folded, judges, operators, len(sites), memory * EFFECTS_SHARE)
    found = {}
    for number, site in enumerate(sorted(sites, key=lambda site: site.folded.node)):
        progress(number / len(sites))
        assert site.folded.y is not None
        frontier.advance([site.folded.x, site.folded.y])
        found[site.weight] = _curve(folded, site, directions(model, site, frontier, seed), effect)
    return found


def _curve(folded: Model, site: Site, found: Directions, effect: Effect) -> Matrix:
    gone = np.cumsum(found.energy[::-1])
    local = np.concatenate([[0.0], gone]) / max(float(gone[-1]), 1e-30)
    if effect.due(ALIKE):
        ratios = []
        for share in STOPS:
            rank = max(1, int(share * site.even))
            value = effect.of([found.truncated(site.folded, folded, rank)])
            if local[site.full - rank] > 0 and value > 0:
                ratios.append((1 - rank / site.full, value / local[site.full - rank]))
        effect.lent[ALIKE] = ratios
    return scaled(local, effect.lent[ALIKE])
