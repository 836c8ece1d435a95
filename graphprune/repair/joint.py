"""One solution for all uses of one weight: their moments add up (``graphprune.pooled``).

Each use counts by its rows, over the variance of its targets: what is solved for is the mean of the
uses' relative errors. Each has a bias of its own, which makes its means agree.

Uses that feed each other are seen one after the other, each with the weights that serve those
before it and, as far as can be foreseen, those to come: these will read about what they read in
the original, once all before them is repaired. The last solution is on what all have read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from graphprune.frontier import Frontier
from graphprune.least_squares import Ridged, best_ridge, error
from graphprune.linear import Linear, Matrix
from graphprune.model import Array
from graphprune.oracle import sliced
from graphprune.pooled import about, pooled
from graphprune.repair.damage import Damage
from graphprune.repair.sites import Known, Pieces, Site, sums_of
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
    """The uses of one weight that have been seen so far. ``weights``: those that the cut left;
    ``total``: how many uses there are; ``ahead``: all of them as they can be foreseen."""

    weights: Matrix
    total: int
    ahead: Joint | None = None
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
        before: Known,
        after: Known,
    ) -> Matrix:
        """Count these uses in, whose biases are ``olds``: the weights that serve all so far."""
        for site, old in zip(sites, olds, strict=True):
            self._count(damage, site, old, before, after)
        fit, held, whole = (self._foreseen(name) for name in ("fit", "held", "whole"))
        self.ridge = best_ridge(fit, held, self.weights)
        inputs = Ridged(whole, self.ridge)
        matrix, _ = inputs.solved(whole, self.weights)
        self.errors = self._errors(matrix)
        self.biases = [use.mean_t - _mean(matrix, use) for use in self.uses]
        if not self.rectified:
            return matrix
        for place, site in enumerate(sites, start=len(self.uses) - len(sites)):
            use = self.uses[place]
            parts = sums_of(damage, site, before, after, (matrix, self.biases[place]))
            found = parts[0].merged(parts[1]).centred()
            self.loose = _with(self.loose, found, use.share)
            self.uses[place] = replace(use, mean_t=found.mean_t)
        matrix, _ = inputs.solved(replace(self._foreseen("loose"), xx=whole.xx), self.weights)
        self.biases = [use.mean_t - _mean(matrix, use) for use in self.uses]
        return matrix

    def _count(self, damage: Damage, site: Site, old: Matrix, before: Known, after: Known) -> None:
        fit, held = sums_of(damage, site, before, after)
        whole, first, last = fit.merged(held).centred(), fit.centred(), held.centred()
        flat = CONSTANT * float(np.square(whole.mean_t).sum())
        scale = max(float(whole.tt.sum()), flat, float(np.finfo(np.float32).tiny))
        self.fit = _with(self.fit, first, first.count / scale)
        self.held = _with(self.held, about(last, first), last.count / scale)
        self.whole = _with(self.whole, whole, whole.count / scale)
        self.uses.append(_Use(whole.mean_x, whole.mean_t, whole.count / scale, old))
        self.rectified = self.rectified and site.rectified

    def _foreseen(self, name: str) -> Moments:
        """What the uses so far have shown, and for those to come what is foreseen of all."""
        seen: Moments = getattr(self, name)
        share = 1 - len(self.uses) / self.total
        if self.ahead is None or not share:
            return seen
        rest: Moments = getattr(self.ahead, "whole" if name == "loose" else name)
        return pooled([seen, replace(rest, count=share * rest.count)])

    def _errors(self, matrix: Matrix) -> tuple[float, ...]:
        whole = self.whole
        scale = 0.0 if whole is None else float(whole.tt.sum())
        if whole is None or not scale:
            return ()
        nothing = np.zeros_like(self.uses[0].old)
        off = [np.square(use.old + _mean(self.weights, use) - use.mean_t) for use in self.uses]
        means = sum(use.share * float(one.sum()) for use, one in zip(self.uses, off, strict=True))
        before = error(whole, self.weights, nothing) + means / whole.count
        return before / scale, error(whole, matrix, nothing) / scale


def look_ahead(damage: Damage, several: Sequence[tuple[Linear, Joint]]) -> None:
    """Let joints foresee these uses of their weights, in node order: one walk over the original."""
    if not several:
        return
    known = Frontier(damage.original, damage.feeds, damage.memory / 4)
    left = _Left(known, damage)
    for linear, joint in several:
        known.advance([linear.x, linear.y or linear.x])
        if joint.ahead is None:
            joint.ahead = Joint(joint.weights, joint.total)
        nothing = np.zeros(joint.weights.shape[:2])
        joint.ahead._count(damage, Site(linear, linear.y, None, False), nothing, known, left)


@dataclass(frozen=True)
class _Left:
    """The original's activations, less what has left of them."""

    known: Frontier
    damage: Damage

    @property
    def chunks(self) -> int:
        return self.known.chunks

    def __getitem__(self, name: str, /) -> Pieces:
        return _Pieces(self, name)


@dataclass(frozen=True)
class _Pieces:
    left: _Left
    name: str

    def __getitem__(self, index: int, /) -> Array:
        whole = {self.name: self.left.known[self.name][index]}
        return sliced(whole, self.left.damage.coupling, self.left.damage.alive)[self.name]


def _with(so_far: Moments | None, more: Moments, share: float) -> Moments:
    """Both together, the new ones with this share in place of their rows."""
    more = replace(more, count=share)
    return pooled([more] if so_far is None else [so_far, more])


def _mean(matrix: Matrix, use: _Use) -> Matrix:
    """The mean output without a bias: [groups, out]."""
    return np.asarray(np.einsum("gmd,gd->gm", matrix, use.mean_x))
