"""What calibration inputs say about each group: the order in which its units leave, the distortion
that costs, and how much of that reaches the model's outputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from graphprune.analysis import Analysis
from graphprune.calibrate.samples import batched_inputs, rows_per_run, split
from graphprune.coupling import Group
from graphprune.criteria.surgeon import Consumer, Matrix, sweep
from graphprune.distortion import distortion
from graphprune.errors import ModelError
from graphprune.frontier import Frontier
from graphprune.least_squares import offset
from graphprune.linear import Linear, linears
from graphprune.model import Array, Model
from graphprune.rewriting import Change
from graphprune.runtime import Feeds
from graphprune.statistics import Moments, Sums, chunk_rows
from graphprune.stretches import Stretches
from graphprune.thin import finite

Order = Callable[[Group, list[Consumer]], NDArray[np.int64] | None]
STOPS = (0.25, 0.6)  # shares of a group gone at which its effect on the outputs is measured
EVALUATIONS = 4096  # samples run for all measurements of effects together,
EFFORT = 2e12  # as long as they would cost no more MACs than this if each ran the whole model,
FEWEST = 4  # but so many samples for each
EFFECTS_SHARE = 0.25  # of the memory


@dataclass(frozen=True)
class Evidence:
    """One group: ``order`` (ordinals, first to leave first) and ``curve`` [units + 1], the
    distortion of the model's outputs after so many units have left."""

    order: NDArray[np.int64]
    curve: Matrix


@dataclass(frozen=True)
class _Reader:
    """A linear operator that reads units of a group, and its columns for each."""

    linear: Linear
    columns: NDArray[np.int64]  # [units, groups, width]


def gather(
    analysis: Analysis,
    original: Model,
    feeds: Sequence[Feeds],
    order: Order,
    *,
    memory: float = 4e9,
    seed: int = 0,
    progress: Callable[[float], None] = lambda share: None,
) -> dict[int, Evidence]:
    """Evidence by group index; groups that no linear operator reads have none.

    ``original`` computes what ``analysis.model`` does, with the same names. One walk over it: each
    group is judged as soon as all its readers' inputs have been seen, so that few Gram matrices
    are held at a time.
    """
    readers = _readers(analysis, original)
    waiting = {g: {r.linear.weight for r in found} for g, found in readers.items()}
    groups_of: dict[str, list[int]] = {}
    for g, weights in waiting.items():
        for weight in weights:
            groups_of.setdefault(weight, []).append(g)
    fit, held = split(feeds)
    frontier = Frontier(original, fit, memory * (1 - EFFECTS_SHARE))
    macs = analysis.cost.of(analysis.nothing_removed).macs
    most = min(EVALUATIONS, EFFORT / max(macs, 1.0)) / max(1, len(readers) * len(STOPS))
    judges = few(original, held if len(held) else fit, max(FEWEST, int(most)))
    operators = [r.linear for found in readers.values() for r in found]
    effect = Effect(original, judges, operators, len(readers), memory * EFFECTS_SHARE)
    known: dict[str, Moments] = {}
    evidence: dict[int, Evidence] = {}
    todo = [
        linear
        for linear in linears(original, original.constant_names)
        if linear.weight in groups_of
    ]
    last: tuple[object, Moments] | None = None
    for number, linear in enumerate(todo):
        progress(number / len(todo))
        frontier.advance([linear.x, linear.y] if linear.y else [linear.x])
        geometry = replace(linear, node=0, weight="", bias=None, y="", bias_node=None)
        if last is None or last[0] != geometry:
            last = geometry, observed(linear, frontier, seed)
        known[linear.weight] = last[1]
        for g in groups_of[linear.weight]:
            waiting[g].discard(linear.weight)
            if not waiting[g]:
                group = analysis.coupling.groups[g]
                evidence[g] = _judged(original, group, readers[g], known, order, effect)
        for weight in [w for w in known if not any(waiting[g] for g in groups_of[w])]:
            del known[weight]
    return evidence


def observed(linear: Linear, frontier: Frontier, seed: int) -> Moments:
    """Mean and covariance of the operator's unfolded inputs."""
    sums: Sums | None = None
    for chunk in range(frontier.chunks):
        x = frontier[linear.x][chunk]
        y = frontier[linear.y][chunk] if linear.y else x
        for rows, _ in chunk_rows(linear, x, y, frontier.chunks, (seed, 0, chunk)):
            nothing = np.zeros((*rows.shape[:2], 0), np.float32)
            with np.errstate(over="ignore", invalid="ignore"):  # said below
                sums = sums or Sums.empty(rows, nothing)
                sums.add(rows, nothing)
    assert sums is not None
    with np.errstate(over="ignore", invalid="ignore"):
        moments = sums.centred()
    if not finite(moments.xx):
        raise ModelError(
            "activations on the calibration inputs are NaN, infinite or too large to be squared",
            f"tensor {linear.x!r}",
            "Give samples with --calib, in the range that the model was trained on.",
        )
    return moments


def _readers(analysis: Analysis, original: Model) -> dict[int, list[_Reader]]:
    """By group: the operators that read its units with weights of their own."""
    coupling = analysis.coupling
    slots = coupling.relations.slots.tensors
    group_of = np.full(coupling.n_units, -1)
    for group in coupling.groups:
        group_of[group.units] = group.index
    readers: dict[int, list[_Reader]] = {}
    for linear in linears(original, original.constant_names):
        if linear.weight not in slots:
            continue
        units = coupling.unit_of(slots[linear.weight][linear.contracted_axis].slots)
        for g in np.unique(group_of[units[units >= 0]]):
            mine = _columns(linear, units, coupling.groups[int(g)].units)
            if mine is not None:
                readers.setdefault(int(g), []).append(_Reader(linear, mine))
    return readers


def _columns(linear: Linear, units: Array, wanted: Array) -> NDArray[np.int64] | None:
    """[units, groups, width], or None where units take unequal numbers of columns."""
    if linear.kind == "ConvTranspose":
        per_group = units.reshape(linear.groups, -1)
    else:
        per_group = np.tile(units, (linear.groups, 1))
    taps = np.arange(linear.taps)
    width = int((per_group[0] == wanted[0]).sum())
    result = np.empty((len(wanted), linear.groups, width * linear.taps), np.int64)
    ordinal = np.full(max(int(units.max()), int(wanted.max())) + 2, -1)
    ordinal[wanted] = np.arange(len(wanted))
    for g, row in enumerate(per_group):
        mine = ordinal[row]
        channels = np.flatnonzero(mine >= 0)
        if width == 0 or len(channels) != width * len(wanted):
            return None
        by_unit = channels[np.argsort(mine[channels], kind="stable")].reshape(len(wanted), width)
        if not (
            np.sort(mine[channels]).reshape(len(wanted), width) == np.arange(len(wanted))[:, None]
        ).all():
            return None
        result[:, g] = (by_unit[:, :, None] * linear.taps + taps).reshape(len(wanted), -1)
    return result


def _judged(
    original: Model,
    group: Group,
    readers: Sequence[_Reader],
    known: Mapping[str, Moments],
    order: Order,
    effect: Effect,
) -> Evidence:
    consumers = [
        Consumer(
            r.linear.matrix(original),
            known[r.linear.weight].xx,
            known[r.linear.weight].mean_x,
            r.columns,
            known[r.linear.weight].count,
        )
        for r in readers
    ]
    size = len(readers[0].columns)
    alike = len(readers)
    counts = sorted({max(1, round(share * size)) for share in STOPS}) if effect.due(alike) else []
    found = sweep(consumers, size, order(group, consumers), counts)
    if counts:
        effect.lent[alike] = ratios = []
        for count, weights in found.stops:
            changes = [
                (r.linear, w, offset(_known_outputs(original, r.linear, known[r.linear.weight]), w))
                for r, w in zip(readers, weights, strict=True)
            ]
            local, value = found.curve[count], effect.of(changes)
            if local > 0 and value > 0:
                ratios.append((count / size, value / local))
    return Evidence(found.order, scaled(found.curve, effect.lent[alike]))


def _known_outputs(original: Model, linear: Linear, moments: Moments) -> Moments:
    """The moments with the mean output that the operator's own weights give."""
    matrix = linear.matrix(original)
    bias = linear.offset(original, matrix.shape[0] * matrix.shape[1])
    return replace(moments, mean_t=np.einsum("gmd,gd->gm", matrix, moments.mean_x) + bias)


def scaled(curve: Matrix, ratios: Sequence[tuple[float, float]]) -> Matrix:
    """The local curve times (output distortion / local distortion), which is known after some
    shares of the group have left; between these in logs."""
    if not ratios:
        return curve
    shares, values = zip(*ratios, strict=True)
    here = np.linspace(0, 1, len(curve))
    return np.maximum.accumulate(curve * np.exp(np.interp(here, shares, np.log(values))))


class Effect:
    """Distortion of the model's outputs when some operators get other weights.

    Of very many groups only some are measured; to the others the last one with as many readers
    lends what it has, so that the cost is linear in the depth.
    """

    def __init__(
        self,
        model: Model,
        feeds: Sequence[Feeds],
        operators: Sequence[Linear],
        groups: int,
        memory: float,
    ) -> None:
        self.stretches = Stretches(model, feeds, operators, memory)
        self.every = -(-groups * len(STOPS) * FEWEST // EVALUATIONS)
        self.seen: Counter[int] = Counter()
        self.lent: dict[int, list[tuple[float, float]]] = {}  # number of readers → what was found
        answers = [a for answer in self.stretches.reference for a in answer]
        floats = [a for a in answers if a.dtype.kind == "f"]
        if floats and not all(np.isfinite(array).all() for array in floats):
            raise ModelError(
                "nothing can be scored: outputs on the calibration inputs are NaN or infinite",
                hint="Check the weights for infinities and overflows, or give --calib.",
            )

    def due(self, alike: int) -> bool:
        """Whether the next group of so many readers is to be measured."""
        self.seen[alike] += 1
        return (self.seen[alike] - 1) % self.every == 0

    def of(self, changes: Sequence[Change]) -> float:
        pairs = zip(self.stretches.reference, self.stretches.changed(changes), strict=True)
        return float(np.mean([distortion(reference, now) for reference, now in pairs]))


def _sizes(feed: Feeds) -> dict[str, tuple[int, ...]]:
    return {name: np.shape(value) for name, value in feed.items()}


def few(model: Model, feeds: Sequence[Feeds], samples: int) -> list[Feeds]:
    """The first samples, about as many as asked for: chunks are split only where one is enough."""
    batched = batched_inputs(model)
    first = feeds[0]
    rows = next((len(np.asarray(first[name])) for name in first if name in batched), 1)
    if rows <= samples or rows_per_run(model) is not None:
        found = [feeds[i] for i in range(min(len(feeds), max(1, samples // rows)))]
        return [feed for feed in found if _sizes(feed) == _sizes(first)]
    return [{name: v[:samples] if name in batched else v for name, v in first.items()}]
