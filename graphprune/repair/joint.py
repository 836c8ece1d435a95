"""One solution for all uses of one weight: their moments add up (``graphprune.pooled``).

Each use counts by its rows, over the variance of its targets: what is solved for is the mean of the
uses' relative errors. Each has a bias of its own, which makes its means agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from graphprune.frontier import Frontier
from graphprune.least_squares import Ridged, best_ridge, error
from graphprune.linear import Matrix
from graphprune.pooled import about, pooled
from graphprune.repair.damage import Damage
from graphprune.repair.sites import Site, sums_of
from graphprune.statistics import Moments

CONSTANT = 1e-10  # variance over squared mean below which an output does not vary at all


@dataclass(frozen=True)
class _Use:
    """What stays of the moments of one use: its means, and the bias that it had."""

    mean_x: Matrix
    mean_t: Matrix
    share: float  # of what is solved for, beside the others
    old: Matrix


@dataclass
class Joint:
    """The uses of one weight that have been seen so far. ``weights``: those that the cut left."""

    weights: Matrix
    uses: list[_Use] = field(default_factory=list)
    biases: list[Matrix] = field(default_factory=list)  # by use
    ridge: float = 0.0
    errors: tuple[float, ...] = ()  # relative, with the weights as they were and as they are
    fit: Moments | None = None
    held: Moments | None = None
    whole: Moments | None = None
    loose: Moments | None = None  # with targets of which what lies below zero does not count,
    rectified: bool = True  # if that is so for all uses

    def add(
        self,
        damage: Damage,
        sites: Sequence[Site],
        olds: Sequence[Matrix],
        before: Frontier,
        after: Frontier,
    ) -> Matrix:
        """Count these uses in, whose biases are ``olds``: the weights that serve all so far."""
        for site, old in zip(sites, olds, strict=True):
            self._count(damage, site, old, before, after)
        assert self.fit is not None and self.held is not None and self.whole is not None
        self.ridge = best_ridge(self.fit, self.held, self.weights)
        inputs = Ridged(self.whole, self.ridge)
        matrix, _ = inputs.solved(self.whole, self.weights)
        self.errors = self._errors(self.whole, matrix)
        self.biases = [use.mean_t - _mean(matrix, use) for use in self.uses]
        if not self.rectified:
            return matrix
        for place, site in enumerate(sites, start=len(self.uses) - len(sites)):
            use = self.uses[place]
            parts = sums_of(damage, site, before, after, (matrix, self.biases[place]))
            found = parts[0].merged(parts[1]).centred()
            self.loose = _with(self.loose, found, use.share)
            self.uses[place] = replace(use, mean_t=found.mean_t)
        assert self.loose is not None
        matrix, _ = inputs.solved(replace(self.loose, xx=self.whole.xx), self.weights)
        self.biases = [use.mean_t - _mean(matrix, use) for use in self.uses]
        return matrix

    def _count(
        self, damage: Damage, site: Site, old: Matrix, before: Frontier, after: Frontier
    ) -> None:
        fit, held = sums_of(damage, site, before, after)
        whole, first, last = fit.merged(held).centred(), fit.centred(), held.centred()
        flat = CONSTANT * float(np.square(whole.mean_t).sum())
        scale = max(float(whole.tt.sum()), flat, float(np.finfo(np.float32).tiny))
        self.fit = _with(self.fit, first, first.count / scale)
        self.held = _with(self.held, about(last, first), last.count / scale)
        self.whole = _with(self.whole, whole, whole.count / scale)
        self.uses.append(_Use(whole.mean_x, whole.mean_t, whole.count / scale, old))
        self.rectified = self.rectified and site.rectified

    def _errors(self, whole: Moments, matrix: Matrix) -> tuple[float, ...]:
        scale = float(whole.tt.sum())
        if not scale:
            return ()
        nothing = np.zeros_like(self.uses[0].old)
        off = [np.square(use.old + _mean(self.weights, use) - use.mean_t) for use in self.uses]
        means = sum(use.share * float(one.sum()) for use, one in zip(self.uses, off, strict=True))
        before = error(whole, self.weights, nothing) + means / whole.count
        return before / scale, error(whole, matrix, nothing) / scale


def _with(so_far: Moments | None, more: Moments, share: float) -> Moments:
    """Both together, the new ones with this share in place of their rows."""
    more = replace(more, count=share)
    return pooled([more] if so_far is None else [so_far, more])


def _mean(matrix: Matrix, use: _Use) -> Matrix:
    """The mean output without a bias: [groups, out]."""
    return np.asarray(np.einsum("gmd,gd->gm", matrix, use.mean_x))
