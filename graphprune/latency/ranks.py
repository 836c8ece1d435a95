"""The latency of a model some of whose layers are two, from its pieces and those in their place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from graphprune.analysis import Analysis
from graphprune.coupling import Mask
from graphprune.latency.predict import Latency


@dataclass
class RankedLatency:
    """Predicts milliseconds for channels and directions that leave. ``one`` has every layer as it
    is; ``two`` every layer that may be two as two, of whose pieces those are taken that stand for
    such a layer; ``units`` says where each unit is there (those of ``one`` first).
    """

    one: Latency
    two: Latency
    units: NDArray[np.int64]
    layers: Mapping[str, NDArray[np.int64]]  # what a layer's node writes → units of its directions

    def __call__(self, removed: Mask) -> float:
        """Milliseconds of the model once the units of ``removed`` have left."""
        lower = {name: units for name, units in self.layers.items() if removed[units].any()}
        channels = len(self.one.analysis.nothing_removed)
        times = self.one.by_piece(removed[:channels])
        gone = self.two.analysis.nothing_removed
        gone[self.units[removed]] = True
        instead = [piece for name in lower for piece in self._instead[name][1]]
        more = self.two.by_piece(gone, sorted(set(instead)))
        kept = np.ones(len(times), dtype=bool)
        kept[[self._instead[name][0] for name in lower]] = False
        whole = float(times[kept].sum() + more.sum())
        return max(0.0, self.one.slope * whole + self.one.offset)

    @cached_property
    def _instead(self) -> dict[str, tuple[int, list[int]]]:
        """By layer: its piece, and the pieces of the two layers."""
        before, after = _piece_of(self.one), _piece_of(self.two)
        readers = self.two.analysis.model
        found = {}
        for name in self.layers:
            first = readers.nodes[readers.producer[name]].input[0]
            found[name] = before[name], [after[first], after[name]]
        return found


def ranked_latency(
    one: Latency,
    after: Analysis,
    units: NDArray[np.int64],
    layers: Mapping[str, NDArray[np.int64]],
) -> RankedLatency:
    """``after`` is the analysis in which all layers are two; tables are shared."""
    return RankedLatency(one, replace(one, analysis=after, _seen={}), units, layers)


def _piece_of(latency: Latency) -> dict[str, int]:
    """The piece that writes each tensor."""
    nodes = latency.analysis.model.nodes
    pieces: Sequence[tuple[int, ...]] = [piece.nodes for piece in latency.pieces]
    return {o: p for p, mine in enumerate(pieces) for i in mine for o in nodes[i].output if o}
