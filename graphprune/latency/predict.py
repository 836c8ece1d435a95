"""The latency of a model with some units gone: the sum of its pieces', from tables filled lazily.

After ZipLM (arXiv 2302.04089): a layer's time is looked up by its shape. Here the shape is that of
a piece with its neighbours, and the table holds what was asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import onnx
from numpy.typing import NDArray
from scipy.sparse import csr_array

from graphprune.analysis import Analysis
from graphprune.coupling import Mask
from graphprune.errors import ModelError, TargetError
from graphprune.latency.device import Device
from graphprune.latency.forms import Form, counts_matrix, form_of
from graphprune.latency.micro import micro
from graphprune.latency.pieces import Piece, blocked, split
from graphprune.tables import Counts, Table, interpolated
from graphprune.targets import Target

# Times are interpolated between counts this many intervals apart, by the number of knobs.
INTERVALS = {1: 16, 2: 8}
INTERVALS_OF_MANY = 3


@dataclass
class Latency:
    """Predicts milliseconds for any set of removed units. ``device`` times what the table lacks;
    without one the nearest entries must do."""

    analysis: Analysis
    target: Target
    table: Table
    device: Device | None
    slope: float = 1.0  # from the sum of the pieces to the whole model
    offset: float = 0.0  # milliseconds
    _seen: dict[Counts, float] = field(default_factory=dict)  # piece and counts → microseconds
    untimed: dict[str, str] = field(default_factory=dict)  # forms that do not run alone, and why

    def __call__(self, removed: Mask) -> float:
        """Milliseconds of the model once the units of ``removed`` have left."""
        return max(0.0, self.slope * float(self.by_piece(removed).sum()) + self.offset)

    def by_piece(self, removed: Mask, which: Sequence[int] | None = None) -> NDArray[np.float64]:
        """Milliseconds of each piece, or of some, as the table has them."""
        values = (self._matrix @ (~removed).astype(np.float64)).round().astype(np.int64)
        starts = np.cumsum([0, *(len(form.knobs) for form in self.forms)])
        chosen = np.arange(len(self.forms)) if which is None else np.array(which, np.int64)
        times = []
        for i in chosen.tolist():
            counts = tuple(values[starts[i] : starts[i + 1]].tolist())
            if (i, *counts) not in self._seen:
                self._seen[i, *counts] = self._time(i, counts)
            times.append(self._seen[i, *counts])
        found = np.array(times, dtype=np.float64)
        unknown = np.isnan(found)
        if unknown.any():
            found[unknown] = self._by_rate(removed)[chosen[unknown]]
        gone = np.zeros(len(self.forms), dtype=bool)
        for unit, inside in self._in_blocks:
            gone[inside] |= removed[unit]
        found[gone[chosen]] = 0.0
        return found / 1e3

    def work(self, removed: Mask) -> tuple[NDArray[np.float64], list[str]]:
        """MACs of each piece, and the operator that does most of them."""
        nodes = self.analysis.model.nodes
        macs = self.analysis.cost.per_node_macs(removed, len(nodes))
        sums = np.array([macs[list(piece.nodes)].sum() for piece in self.pieces])
        most = [max(piece.nodes, key=lambda i: (macs[i], -i)) for piece in self.pieces]
        return sums, [_kind(nodes[i]) for i in most]

    @property
    def untimed_share(self) -> float:
        """Share of the MACs in pieces that do not run alone, and count as taking no time."""
        macs, _ = self.work(self.analysis.nothing_removed)
        missing = [form.text in self.untimed for form in self.forms]
        return float(macs[missing].sum() / max(macs.sum(), 1.0))

    @property
    def unknown(self) -> float:
        """Share of the MACs in pieces that neither the table nor a device knows."""
        if self.device is not None:
            return 0.0
        macs, _ = self.work(self.analysis.nothing_removed)
        known = [form.text in self.table.entries for form in self.forms]
        return float(1 - macs[known].sum() / max(macs.sum(), 1.0))

    def _by_rate(self, removed: Mask) -> NDArray[np.float64]:
        """Microseconds of each piece from its MACs alone."""
        rates = self.target.rates
        if not rates:
            raise TargetError(
                "the latency table has nothing for a part of this model",
                f"target {self.target.name}",
                "Measure it on the device: `graphprune targets measure MODEL -o FILE.toml`.",
            )
        usual = float(np.median(list(rates.values())))
        macs, operators = self.work(removed)
        return np.asarray(macs / [rates.get(operator, usual) for operator in operators])

    def fit(self, whole: float, removed: Mask, ratio: float) -> None:
        """Lay the prediction through two measured models: the original (``whole`` milliseconds),
        and the one without ``removed``, whose latency is ``ratio`` of that. Caches and what runs
        between kernels make the whole other than the sum of its parts."""
        full = float(self.by_piece(self.analysis.nothing_removed).sum())
        part = float(self.by_piece(removed).sum())
        if full - part < 1e-9 * full or ratio >= 1:
            self.slope, self.offset = whole / max(full, 1e-9), 0.0
            return
        self.slope = whole * (1 - ratio) / (full - part)
        self.offset = whole - self.slope * full

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        return split(self.analysis)

    @cached_property
    def forms(self) -> tuple[Form, ...]:
        return tuple(form_of(self.analysis, piece, self._blocked) for piece in self.pieces)

    @cached_property
    def _in_blocks(self) -> list[tuple[int, NDArray[np.bool_]]]:
        """Of every residual block that may leave: its unit, and the pieces that leave with it,
        those whose multiply-accumulates are all inside."""
        working = {macs.node for macs in self.analysis.relations.macs}
        heads = [working.intersection(p.nodes) or set(p.nodes) for p in self.pieces]
        pairs = zip(self.analysis.relations.branches, self.analysis.coupling.blocks, strict=True)
        return [
            (int(unit), np.array([branch.nodes >= nodes for nodes in heads], dtype=bool))
            for branch, unit in pairs
            if unit >= 0
        ]

    @cached_property
    def _blocked(self) -> frozenset[str]:
        return blocked(self.analysis)

    @cached_property
    def _matrix(self) -> csr_array:
        return counts_matrix(self.forms, self.analysis.coupling.n_units)

    @cached_property
    def steps(self) -> list[tuple[int, ...]]:
        return [self._step(p, f) for p, f in zip(self.pieces, self.forms, strict=True)]

    def _step(self, piece: Piece, form: Form) -> tuple[int, ...]:
        """Units in a step of the staircase of each knob."""
        operators = {self.analysis.model.nodes[i].op_type for i in piece.nodes}
        multiple = math.lcm(*(self.target.multiple_of(operator) for operator in operators))
        return tuple(multiple // math.gcd(multiple, width) for width in form.width)

    def _time(self, i: int, counts: Counts) -> float:
        """Microseconds of piece ``i`` at ``counts``."""
        form = self.forms[i]
        known = self.table.at(form.text, counts)
        if known is not None:
            return known
        if self.device is None:
            return self._nearest(i, counts)
        intervals = INTERVALS.get(len(counts), INTERVALS_OF_MANY)
        around = [
            nodes_around(count, len(knob), step, intervals)
            for count, knob, step in zip(counts, form.knobs, self.steps[i], strict=True)
        ]
        found = interpolated(counts, around, lambda corner: self.measured(i, corner))
        assert found is not None
        return found

    def measured(self, i: int, counts: Counts) -> float:
        """Microseconds of piece ``i`` at just these counts, timed unless the table has them."""
        form = self.forms[i]
        known = self.table.at(form.text, counts)
        if known is not None:
            return known
        if form.text in self.untimed:
            return 0.0
        removed = self.analysis.nothing_removed
        for knob, count in zip(form.knobs, counts, strict=True):
            removed[knob[count:]] = True
        alive = self.analysis.coupling.alive(removed)
        assert self.device is not None
        try:
            time = self.device.piece(micro(self.analysis, self.pieces[i], self._blocked, alive))
        except ModelError as error:
            self.untimed[form.text] = error.what
            return 0.0
        self.table.enter(form.text, counts, time)
        return time

    def _nearest(self, i: int, counts: Counts) -> float:
        """From the entries around, else from the nearest one by the work that both do."""
        form = self.forms[i]
        found = self.table.between(form.text, counts)
        if found is not None:
            return found
        known = self.table.entries.get(form.text, {})
        known = {entry: time for entry, time in known.items() if len(entry) == len(counts)}
        if not known:
            return math.nan

        def far(entry: Counts) -> float:
            return sum(abs(math.log((a + 1) / (b + 1))) for a, b in zip(entry, counts, strict=True))

        nearest = min(sorted(known), key=far)
        grown = math.prod((a + 1e-9) / (b + 1e-9) for a, b in zip(counts, nearest, strict=True))
        return known[nearest] * grown


def _kind(node: onnx.NodeProto) -> str:
    """Convolutions in groups do their MACs at another rate than dense ones."""
    grouped = any(a.name == "group" and a.i > 1 for a in node.attribute)
    return f"{node.op_type} in groups" if grouped else node.op_type


def nodes_around(count: int, full: int, step: int, intervals: int) -> tuple[int, int]:
    """The counts below and above at which a piece is timed. On the staircase these are whole
    steps, so that what lies between is its straight tread; off it, the count itself."""
    if count % step or count == full:
        return count, count
    pitch = max(1, math.ceil(full / step / intervals)) * step
    below, above = count // pitch * pitch, min(full, -(-count // pitch) * pitch)
    return max(below, min(count, step)), above
