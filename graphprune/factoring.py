"""Layers of lower rank in a study: what is known of them, and a decision about them carried into a
model in which they are two layers, cut and repaired like any other."""

from __future__ import annotations

import glob
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphprune.analysis import Analysis, Scope, matching
from graphprune.budget import Decision, allocate, distortion_of
from graphprune.coupling import Mask
from graphprune.criteria.ranks import rank_curves
from graphprune.errors import TargetError, UsageError
from graphprune.factors import Matrix, Site, all_directions, sites
from graphprune.ladders import BLOCKS
from graphprune.latency.predict import Latency
from graphprune.latency.ranks import ranked_latency
from graphprune.linear import INNER
from graphprune.model import Model
from graphprune.options import Options
from graphprune.pipeline import Context, Pass, Pipeline
from graphprune.plan import ANEW
from graphprune.prepared import Prepared
from graphprune.ranked import Ranks, ranks_of, with_ranks
from graphprune.repair.damage import silent
from graphprune.study import Progress, Study
from graphprune.targets import Target, choose


def in_scope(prepared: Prepared, folded: Model) -> tuple[list[Site], list[str]]:
    """The layers that may be two within --protect and --only, and weights too wide for it."""
    model, scope = prepared.analysis.model, prepared.context.scope
    found, wide = sites(model, folded)
    held = _named(model, found, scope, scope.protect, "--protect")
    chosen = _named(model, found, scope, scope.only, "--only") if scope.only else None
    kept = [
        site
        for site in found
        if site.weight not in held and (chosen is None or site.weight in chosen)
    ]
    return kept, wide


def _named(
    model: Model, found: Sequence[Site], scope: Scope, patterns: Sequence[str], option: str
) -> frozenset[str]:
    """Weights of the sites whose node, weight or output a pattern names."""
    if not patterns:
        return frozenset()
    nodes, tensors = matching(model, patterns, option, scope.given)
    outputs = {name for node in nodes for name in node.output}
    return frozenset(
        site.weight
        for site in found
        if {site.weight, site.linear.y, model.nodes[site.linear.node].output[0]}
        & (tensors | outputs)
    )


def ranks(studied: Study, options: Options, progress: Progress = silent) -> Ranks | None:
    """What the calibration inputs say about every layer that may be two; ``None`` without one."""
    prepared = studied.prepared
    assert studied.inputs is not None
    target = _target(prepared, options)
    found, wide = in_scope(prepared, studied.original)
    chosen = [site for site in found if ranks_of(site, target)]
    if not chosen:
        return None
    inputs = studied.inputs

    def make() -> Mapping[str, NDArray[Any]]:
        macs = prepared.analysis.cost.of(prepared.analysis.nothing_removed).macs
        return rank_curves(
            prepared.analysis.model,
            studied.original,
            chosen,
            inputs.feeds,
            macs=macs,
            memory=studied.memory,
            seed=studied.seed,
            progress=progress,
        )

    weights = [site.weight for site in chosen]
    parts = ("ranks", studied.original.sha256, inputs.key, studied.seed, weights)
    kept = prepared.cache(parts, make)
    analysis = with_ranks(prepared.analysis, chosen, target)
    if prepared.latency is not None:
        analysis = _timed(prepared, prepared.latency, chosen, analysis)
    first = len(prepared.analysis.coupling.groups)
    curves: dict[int, Matrix] = {first + i: kept[name] for i, name in enumerate(weights)}
    return Ranks(analysis, tuple(chosen), curves, tuple(wide))


def _timed(prepared: Prepared, one: Latency, chosen: Sequence[Site], ranked: Analysis) -> Analysis:
    """``ranked`` with a cost model that predicts milliseconds."""
    after = refactored(prepared, chosen, _of_shape(chosen)).analysis
    known = {site.weight: site for site in chosen}
    units = [_carried(prepared.analysis, after, known, known)]
    units += [directions_of(after, site) for site in chosen]
    nodes = prepared.analysis.model.nodes
    groups = ranked.coupling.groups[-len(chosen) :]
    layers = {
        nodes[site.linear.node].output[0]: group.units
        for site, group in zip(chosen, groups, strict=True)
    }
    latency = ranked_latency(one, after, np.concatenate(units), layers)
    return replace(ranked, cost=replace(ranked.cost, timed=latency))


def _of_shape(chosen: Sequence[Site]) -> dict[str, tuple[Matrix, Matrix]]:
    """Factors of the right shapes: nobody looks at what they hold."""
    return {
        site.weight: (
            np.full((site.rows, site.full), 1 / site.full),
            np.full((site.full, site.columns), 1 / site.columns),
        )
        for site in chosen
    }


def shaped(
    prepared: Prepared, lower: Ranks | None, chosen: Mapping[str, int], removed: Mask
) -> tuple[Prepared, Mask]:
    """What ``factored`` gives, as far as shapes go: to be timed."""
    if not chosen or lower is None:
        return prepared, removed
    known = {site.weight: site for site in lower.sites}
    mine = [known[name] for name in sorted(chosen)]
    after = refactored(prepared, mine, _of_shape(mine))
    return after, _gone(prepared.analysis, after.analysis, known, chosen, removed)[0]


def with_lower_ranks(
    lower: Ranks,
    scores: Matrix,
    alone: Decision | None,
    target: Target,
    limits: Mapping[str, float],
    curves: Mapping[int, Matrix],
    allow_miss: bool,
    stays: Mask | None,
    said: Callable[[str, float], float] | None = None,
) -> Decision | None:
    """The decision among channels and ranks; ``None`` where that among channels ``alone`` promises
    as much, or the budget is out of reach for both."""
    every = {**curves, **lower.curves}
    none = np.zeros(len(lower.scores), dtype=bool)
    start = None
    if alone is not None and not alone.missed:
        target, start = alone.grid, np.concatenate([alone.removed, none])
    stays = None if stays is None else np.concatenate([stays, none])
    scores = np.concatenate([scores, lower.scores])
    try:
        found = allocate(
            lower.analysis,
            scores,
            target,
            limits,
            allow_miss=allow_miss,
            curves=every,
            stays=stays,
            known=start,
            said=said,
        )
    except TargetError:
        return None
    least = np.inf if start is None else _damage(lower.analysis, every, start)
    chosen = lower.chosen(found.removed)
    if not chosen or not _damage(lower.analysis, every, found.removed) < least:
        return None
    costs = lower.analysis.cost.of(found.removed)
    return replace(found, removed=lower.channels(found.removed), ranks=chosen, costs=costs)


def _damage(analysis: Analysis, curves: Mapping[int, Matrix], removed: Mask) -> float:
    """Summed distortion of what leaves, blocks among it."""
    of_groups = {g: curve for g, curve in curves.items() if g != BLOCKS}
    units = analysis.coupling.blocks
    gone = int(removed[units[units >= 0]].sum())
    of_blocks = float(curves[BLOCKS][gone]) if BLOCKS in curves else 0.0
    return distortion_of(of_groups, analysis.coupling.groups, removed) + of_blocks


def factored(
    studied: Study, chosen: Mapping[str, int], removed: Mask
) -> tuple[Study, Mask, NDArray[np.int64]]:
    """The study of the model in which the chosen layers (weight → rank) are two at full rank; what
    leaves there; and where each of the units of before is."""
    if not chosen:
        return studied, removed, np.arange(len(removed))
    assert studied.inputs is not None
    prepared = studied.prepared
    found, _ = in_scope(prepared, studied.original)
    known = {site.weight: site for site in found}
    _check_ranks(chosen, known)
    mine = [known[name] for name in sorted(chosen)]
    spectra = all_directions(
        prepared.analysis.model,
        studied.original,
        mine,
        studied.inputs.feeds,
        studied.memory,
        studied.seed,
    )
    factors = {name: (found.left, found.right) for name, found in spectra.items()}
    after = refactored(prepared, mine, factors)
    gone, units = _gone(prepared.analysis, after.analysis, known, chosen, removed)
    original = after.folded(after.analysis.model)
    return replace(studied, prepared=after, original=original), gone, units


def _gone(
    before: Analysis,
    after: Analysis,
    known: Mapping[str, Site],
    chosen: Mapping[str, int],
    removed: Mask,
) -> tuple[Mask, NDArray[np.int64]]:
    """What leaves after, and where each of the units of before is."""
    units = _carried(before, after, known, chosen)
    gone = after.nothing_removed
    gone[units[removed]] = True
    for name, rank in chosen.items():
        gone[directions_of(after, known[name])[rank:]] = True
    return gone, units


def refactored(
    prepared: Prepared, mine: Sequence[Site], factors: Mapping[str, tuple[Matrix, Matrix]]
) -> Prepared:
    """``prepared`` with these layers as two."""
    scope = _scope(prepared.context.scope, mine)
    context = Context(rules=prepared.context.rules, scope=scope)
    step: Pass = prepared.registry.passes["factorise"](factors)
    done = Pipeline((step,)).run(prepared.analysis.model, context)
    return replace(
        prepared,
        analysis=context.analysis(done.model),
        context=context,
        moved=True,
        given=prepared.analysis,
        changes=done.changes,
    )


def _scope(scope: Scope, mine: Sequence[Site]) -> Scope:
    """Directions are channels to the rules, and new ones, which --only cannot have named."""
    only = scope.only
    if only:
        only = (*only, *(glob.escape(f"{site.weight}/{INNER}") for site in mine))
    units = tuple(dict.fromkeys((*scope.units, "channels")))
    return replace(scope, only=only, units=units)


def directions_of(analysis: Analysis, site: Site) -> NDArray[np.int64]:
    """Units of a layer's directions, the most needed first."""
    slots = analysis.relations.slots.tensors[site.weight]
    at = site.linear.contracted_axis
    return analysis.coupling.unit_of(slots[at].slots)


def _carried(
    before: Analysis, after: Analysis, known: Mapping[str, Site], chosen: Container[str]
) -> NDArray[np.int64]:
    """Unit of before → unit of after: the rows of a layer stay with its name, its columns are those
    of what comes first now."""
    units = np.full(before.coupling.n_units, -1, np.int64)
    tensors = after.relations.slots.tensors
    for axis in before.coupling.parameters:
        name = axis.tensor
        if name in chosen and axis.index != known[name].row_axis:
            name = f"{name}/{INNER}"
        mine = before.coupling.unit_of(axis.slots)
        units[mine[mine >= 0]] = after.coupling.unit_of(tensors[name][axis.index].slots)[mine >= 0]
    there = dict(zip((b.name for b in after.blocks), after.coupling.blocks, strict=True))
    for block, unit in zip(before.blocks, before.coupling.blocks.tolist(), strict=True):
        if unit >= 0:
            units[unit] = there[block.name]
    return units


def _check_ranks(chosen: Mapping[str, int], known: Mapping[str, Site]) -> None:
    for name, rank in chosen.items():
        if name not in known:
            raise UsageError("the plan lowers the rank of a layer that is not there", name, ANEW)
        if not 0 < rank < known[name].full:
            raise UsageError(f"the plan's rank {rank} is none of the layer's", name, ANEW)


def _target(prepared: Prepared, options: Options) -> Target:
    return choose(
        prepared.registry.targets, options.hardware, options.round_to, options.min_channels
    )
