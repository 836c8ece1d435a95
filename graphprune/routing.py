"""What calibration inputs say of experts: how much each adds to what is summed up over them.

That is how often a router takes an expert, times how much it weighs it, times the norm of what it
says: the norm, over all tokens, of the expert's weighed outputs. Two forms are read:

1. All experts are computed: what the sum over experts reads, [.., experts, ..]; of a product with
   the router's shares the norms of both sides, multiplied.
2. Experts are looked up by their numbers: the last tensor with a row for each number.

3. Experts stand apart and are added up: the terms of the sum.
4. ONNX Runtime's MoE and QMoE show nothing but the router's logits: the shares of those taken,
   times the norm of the weights that make what an expert says (in integers: of their scales).
How far the outputs move is then measured with the least of the experts cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from graphprune.analysis import Analysis
from graphprune.calibrate.samples import split
from graphprune.control import regions
from graphprune.coupling import FLOAT_TYPES, Group
from graphprune.criteria import Criterion, Scores
from graphprune.criteria.evidence import STOPS, Evidence, scaled
from graphprune.cut import cut
from graphprune.distortion import distortion
from graphprune.interface import fitted
from graphprune.model import Array, Model
from graphprune.oracle import with_outputs
from graphprune.repair.damage import silent
from graphprune.runtime import Feeds, run_session, session
from graphprune.study import Progress, Study

MOST_CHUNKS = 16  # of the inputs, for each measurement
FUSED = {"MoE": 4, "QMoE": 6}  # operator → where its last weights stand, or their scales


@dataclass(frozen=True)
class _Seen:
    """Tensors that show what experts add: each with its axis of experts, their norms multiplied;
    or one with rows for the numbers in ``numbers``. ``kinds`` are the experts' components."""

    tensors: tuple[tuple[str, int], ...]
    kinds: NDArray[np.int64]
    numbers: str | None = None
    each: bool = False  # a tensor for each expert, in their order
    fused: tuple[int, str] | None = None  # how many are taken of logits, and the last weights


def expert_evidence(
    studied: Study, criterion: Criterion, scores: Scores, progress: Progress = silent
) -> dict[int, Evidence]:
    """Evidence by group of experts; in the order of ``scores`` where the criterion looks at weights
    alone. Groups of which no tensor shows what their experts add have none."""
    assert studied.inputs is not None
    analysis = studied.prepared.analysis
    groups = [
        group for group in analysis.coupling.groups if group.index in analysis.coupling.fewest
    ]
    if not groups:
        return {}
    order = [] if criterion.needs_inputs else scores[np.concatenate([g.units for g in groups])]
    parts = (
        "experts",
        studied.original.sha256,
        studied.inputs.key,
        [(group.name, len(group)) for group in groups],
        list(map(float, order)),
    )

    def make() -> Mapping[str, Array]:
        made: dict[str, Array] = {}
        last = _last_by_rows(analysis)
        for number, group in enumerate(groups):
            progress(number / len(groups))
            seen = _seen(analysis, group, last)
            if seen is None:
                continue
            found = _judged(studied, group, seen, None if criterion.needs_inputs else scores)
            made |= {f"order_{group.index}": found.order, f"curve_{group.index}": found.curve}
        return made

    kept = studied.prepared.cache(parts, make)
    indices = sorted(int(n.removeprefix("order_")) for n in kept if n.startswith("order_"))
    return {g: Evidence(kept[f"order_{g}"], kept[f"curve_{g}"]) for g in indices}


def _judged(studied: Study, group: Group, seen: _Seen, scores: Scores | None) -> Evidence:
    assert studied.inputs is not None
    analysis = studied.prepared.analysis
    model = analysis.model.closed
    fit, held = split(studied.inputs.feeds)
    held = held if len(held) else fit
    added = _added(analysis, model, seen, _some(fit))[_ordinals(analysis, group, seen)]
    order = np.argsort(added if scores is None else scores[group.units], kind="stable")
    curve = np.concatenate([[0.0], np.cumsum(added[order])])
    most = len(group) - analysis.coupling.fewest[group.index]
    counts = sorted({max(1, min(most, round(share * len(group)))) for share in STOPS if most})
    reference = _outputs(model, _some(held))
    ratios = []
    for count in counts:
        removed = analysis.nothing_removed
        removed[group.units[order[:count]]] = True
        alive = analysis.coupling.alive(removed)
        smaller = cut(analysis.model, analysis.shapes, analysis.coupling, alive)[0].closed
        pairs = zip(reference, _outputs(smaller, _some(held)), strict=True)
        value = float(np.mean([distortion(whole, now) for whole, now in pairs]))
        if curve[count] > 0 and value > 0:
            ratios.append((count / len(group), value / curve[count]))
    return Evidence(order, scaled(curve, ratios))


def _some(feeds: Sequence[Feeds]) -> list[Feeds]:
    return [feeds[i] for i in range(min(len(feeds), MOST_CHUNKS))]


def _outputs(model: Model, feeds: Sequence[Feeds]) -> list[list[Array]]:
    runner = session(model)
    return [run_session(runner, fitted(model, feed)) for feed in feeds]


def _ordinals(analysis: Analysis, group: Group, seen: _Seen) -> NDArray[np.int64]:
    """Where the group's units stand among the experts."""
    units = analysis.coupling.unit_of_component[seen.kinds]
    return np.array([int(np.flatnonzero(units == unit)[0]) for unit in group.units.tolist()])


def _added(analysis: Analysis, model: Model, seen: _Seen, feeds: Sequence[Feeds]) -> Scores:
    """Squared norms of what each expert adds, over all inputs."""
    names = [name for name, _ in seen.tensors]
    taps = [*names, seen.numbers] if seen.numbers is not None else names
    known = [value.name for value in model.outputs]
    runner = session(with_outputs(model, [n for n in taps if n not in known], analysis.shapes))
    places = [*known, *(n for n in taps if n not in known)]
    sums = np.zeros((1 if seen.each else len(names), len(seen.kinds)))
    for feed in feeds:
        found = dict(zip(places, run_session(runner, feed), strict=True))
        for i, (name, axis) in enumerate(seen.tensors):
            values = np.moveaxis(found[name], axis, 0).astype(np.float64)
            squares = np.square(values if seen.fused is None else _shares(values, seen.fused[0]))
            rows = squares.reshape(len(squares), -1).sum(axis=1)
            if seen.each:
                sums[0, i] += rows.sum()
                continue
            if seen.numbers is None:
                sums[i] += rows
            else:
                which = found[seen.numbers].reshape(-1).astype(np.int64)
                sums[i] += np.bincount(which % len(sums[i]), rows, len(sums[i]))
    if seen.fused is not None:
        last = model.array(seen.fused[1]).astype(np.float64)
        sums[0] *= np.square(last).reshape(len(last), -1).sum(axis=1)
    return np.asarray(sums.prod(axis=0))


def _shares(logits: Array, taken: int) -> Array:
    """[experts, ..]: a Softmax of the logits, zero where an expert is not among those taken."""
    exponents = np.exp(logits - logits.max(axis=0))
    shares = exponents / exponents.sum(axis=0)
    least = np.sort(shares, axis=0)[-taken]
    return np.where(shares >= least, shares, 0.0)


def _seen(analysis: Analysis, group: Group, last: Mapping[bytes, str]) -> _Seen | None:
    """Where to look; ``None`` inside bodies, and for operators that do it all themselves."""
    coupling, model = analysis.coupling, analysis.model
    inside = regions(model.nodes)
    for choice in (*coupling.relations.choices, *coupling.relations.weighed):
        kinds = coupling.labels[choice.slots]
        if not np.isin(coupling.unit_of(choice.slots), group.units).all() or inside[choice.node]:
            continue
        found = [*_summed(analysis, kinds), *_looked_up(analysis, kinds, last)]
        terms = {int(b.slots[0]): b.tensor for b in coupling.relations.apart}
        if not found and terms.keys() >= set(choice.slots.tolist()):
            tensors = tuple((terms[slot], 0) for slot in choice.slots.tolist())
            found.append(_Seen(tensors, kinds.astype(np.int64), each=True))
        node = model.nodes[choice.node]
        place = FUSED.get(node.op_type, len(node.input))
        if place < len(node.input) and node.input[place] in model.initializers:
            how = choice.least, node.input[place]
            logits = node.input[choice.input], choice.axis
            found.append(_Seen((logits,), kinds.astype(np.int64), fused=how))
        if found:
            return found[-1]
    return None


def _summed(analysis: Analysis, kinds: NDArray[np.int32]) -> Iterator[_Seen]:
    """What sums over experts, in order."""
    labels, slots = analysis.coupling.labels, analysis.relations.slots.tensors
    for node in dict.fromkeys(
        contraction.node
        for contraction in analysis.relations.contractions
        if np.array_equal(labels[contraction.slots], kinds)
    ):
        names = [name for name in analysis.model.nodes[node].input if name in slots]
        tensors = tuple(
            (name, axis.index)
            for name in names
            if name not in analysis.model.constant_names
            for axis in slots[name]
            if np.array_equal(labels[axis.slots], kinds)
        )
        if tensors:
            yield _Seen(tensors, kinds.astype(np.int64))


def _looked_up(
    analysis: Analysis, kinds: NDArray[np.int32], last: Mapping[bytes, str]
) -> Iterator[_Seen]:
    """For weights that are looked up: the last tensor with rows like the numbers that do so."""
    model, labels = analysis.model, analysis.coupling.labels
    for node, place in sorted(analysis.relations.looked_up):
        name = model.nodes[node].input[place]
        numbers = analysis.relations.slots.tensors[name]
        stacked = place == 1 and model.nodes[node].input[0] in model.constant_names
        mine = np.array_equal(labels[analysis.relations.positions[name]], kinds)
        if stacked and mine and prod(numbers.shape) == len(numbers[0]):
            shown = last.get(labels[numbers[0].slots].tobytes())
            if shown is not None:
                yield _Seen(((shown, 0),), kinds.astype(np.int64), name)


def _last_by_rows(analysis: Analysis) -> dict[bytes, str]:
    """Components of a first axis → the last tensor of floats, made of data, that has it."""
    labels, slots = analysis.coupling.labels, analysis.relations.slots.tensors
    names = [name for node in analysis.model.nodes for name in node.output if name in slots]
    return {
        labels[slots[name][0].slots].tobytes(): name
        for name in names
        if slots[name].rank and analysis.shapes.dtype.get(name) in FLOAT_TYPES
        if name not in analysis.model.constant_names
    }
