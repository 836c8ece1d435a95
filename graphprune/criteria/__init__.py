"""Importance of units: element-wise criteria lifted to groups (SPA, arXiv 2403.18955, section 3).

I[g, j] = NORM_g( AGG over parameter axes of g ( RED over the elements on unit j of s(theta) ) )
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from graphprune import external
from graphprune.coupling import FLOAT_TYPES, Coupling, Group
from graphprune.criteria.normalise import NORMALISE
from graphprune.criteria.surgeon import Consumer
from graphprune.errors import UsageError
from graphprune.model import Array, Model
from graphprune.quantisation import real
from graphprune.relations import Role
from graphprune.slots import Axis
from graphprune.unread import unread_units

Scores = NDArray[np.float64]
REDUCE = ("sum", "mean", "l1", "l2")
AGGREGATE = ("sum", "mean", "max", "prod", "producers", "consumers")


@dataclass(frozen=True)
class Part:
    """One parameter axis's contribution to the units of its group."""

    role: Role
    units: NDArray[np.int64]  # the units that take slots from the axis, ascending
    value: Scores  # one number for each of them

    def of(self, units: NDArray[np.int64]) -> Part:
        """The same part, for some of its units in the order given."""
        return Part(self.role, units, self.value[np.searchsorted(self.units, units)])


@dataclass(frozen=True)
class Criterion:
    """A way to score units.

    ``element(weights, axis, seed)`` gives s(theta): an array like the weights, or one number per
    slot of ``axis`` for criteria that look at whole slots. ``combine`` may take the parts of all
    roles into its own hands (a product of producers and consumers, say) instead of the
    aggregation asked for. A criterion on calibration inputs gives ``observed(consumer)`` instead,
    a number for each unit that the consumer reads; a ``greedy`` one drops the unit of least
    second-order error, updates the weights, and looks again.
    """

    name: str
    element: Callable[[Array, int, int], Array] | None = None
    roles: frozenset[Role] = frozenset({Role.PRODUCER, Role.CONSUMER, Role.SCALE})
    combine: Callable[[list[Part]], Scores] | None = None
    normalise: str = "mean"
    doc: str = ""
    observed: Callable[[Consumer], Scores] | None = None
    greedy: bool = False
    pointwise: bool = False  # ``element`` looks at one weight at a time: large ones come in parts

    @property
    def needs_inputs(self) -> bool:
        """Whether it looks at activations, not at weights alone."""
        return self.greedy or self.observed is not None


@dataclass(frozen=True)
class Scoring:
    """How element scores become unit scores; the defaults are each criterion's own."""

    reduce: str = "sum"
    aggregate: str = "mean"
    normalise: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for value, allowed, option in (
            (self.reduce, REDUCE, "--reduce"),
            (self.aggregate, AGGREGATE, "--aggregate"),
            (self.normalise or "none", tuple(NORMALISE), "--normalise"),
        ):
            if value not in allowed:
                raise UsageError(
                    f"{option} {value!r} is unknown", hint=f"One of: {', '.join(allowed)}."
                )


def score(model: Model, coupling: Coupling, criterion: Criterion, scoring: Scoring) -> Scores:
    """Normalised importance of every unit; comparable across groups. Zeros for a criterion that
    needs calibration inputs. Units that no output depends on are worth least of all."""
    if criterion.element is None:
        return np.zeros(coupling.n_units)
    parts = _parts(model, coupling, criterion, scoring)
    raw = np.zeros(coupling.n_units)
    for group in coupling.groups:
        raw[group.units] = unit_scores(group, parts, criterion, scoring)
    found = normalised(raw, coupling.groups, criterion, scoring)
    least = float(found.min(initial=0.0))  # standardised ones are below zero
    found[unread_units(model, coupling)] = np.nextafter(least, -np.inf) if least < 0 else 0.0
    return found


def normalised(
    raw: Scores, groups: Sequence[Group], criterion: Criterion, scoring: Scoring
) -> Scores:
    """NORM: what the units of each group are worth, comparable across groups."""
    normalise = NORMALISE[scoring.normalise or criterion.normalise]
    result = np.zeros(len(raw))
    for group in groups:
        result[group.units] = normalise(raw[group.units])
    return result


def _parts(
    model: Model, coupling: Coupling, criterion: Criterion, scoring: Scoring
) -> Mapping[tuple[str, int], Part]:
    """Score every parameter axis that some unit takes slots from; each weight is read once."""
    needed = {axis for group in coupling.groups for axis in group.signature}
    parts: dict[tuple[str, int], Part] = {}
    loaded: tuple[str, Array] | None = None
    for axis in coupling.parameters:
        if (axis.tensor, axis.index) not in needed:
            continue
        role = role_of(coupling, axis)
        if role not in criterion.roles:
            continue
        stored = model.initializers.get(axis.tensor)
        if criterion.pointwise and stored is not None and _large(stored):
            slots = _in_chunks(stored, axis.index, criterion, scoring)
            size = int(np.prod(stored.dims))
            units = coupling.unit_of(axis.slots)
            parts[axis.tensor, axis.index] = _lifted(role, slots, size, units, scoring.reduce)
            continue
        if loaded is None or loaded[0] != axis.tensor:
            how = coupling.relations.quantised.get(axis.tensor)
            array = model.array(axis.tensor) if how is None else real(model, axis.tensor, how)
            loaded = axis.tensor, array
        assert criterion.element is not None
        elements = criterion.element(loaded[1].astype(np.float32), axis.index, scoring.seed)
        at = axis.index if elements.ndim > 1 else 0
        parts[axis.tensor, axis.index] = lifted(coupling, axis, elements, at, scoring.reduce)
    return parts


def lifted(coupling: Coupling, axis: Axis, elements: Array, at: int, how: str) -> Part:
    """RED: sum, mean or a norm of the elements behind each unit, summed in float64; they have the
    parameter's ``axis`` at ``at``."""
    slots = _per_slot(elements, at, how)
    units = coupling.unit_of(axis.slots)
    return _lifted(role_of(coupling, axis), slots, elements.size, units, how)


def role_of(coupling: Coupling, axis: Axis) -> Role:
    """What most slots of the axis do."""
    return Role(int(np.bincount(coupling.role[axis.slots], minlength=5).argmax()))


def _per_slot(elements: Array, axis: int, how: str) -> Scores:
    others = tuple(i for i in range(elements.ndim) if i != axis)
    powers = np.square(elements) if how == "l2" else elements
    return np.asarray(powers.sum(axis=others, dtype=np.float64))


def _large(tensor: onnx.TensorProto) -> bool:
    return tensor.data_type in FLOAT_TYPES and external.on_disk(tensor)


def _in_chunks(
    tensor: onnx.TensorProto, axis: int, criterion: Criterion, scoring: Scoring
) -> Scores:
    """Sums per slot of a weight that stays on disk: one part of it in memory at a time."""
    assert criterion.element is not None
    sums = [
        _per_slot(
            criterion.element(part.astype(np.float32), axis, scoring.seed), axis, scoring.reduce
        )
        for part in external.chunks(tensor)
    ]
    return np.concatenate(sums) if axis == 0 else np.asarray(np.sum(sums, axis=0))


def _lifted(role: Role, slots: Scores, size: int, unit_of_slot: Array, how: str) -> Part:
    real = unit_of_slot >= 0
    units, place = np.unique(unit_of_slot[real], return_inverse=True)
    value = np.bincount(place, slots[real], len(units)).astype(np.float64)
    if how == "l2":
        value = np.sqrt(value)
    elif how == "mean":
        value /= np.bincount(place, minlength=len(units)) * (size / max(len(slots), 1))
    return Part(role, units, value)  # elements are non-negative: their L1 norm is their sum


def unit_scores(
    group: Group,
    parts: Mapping[tuple[str, int], Part],
    criterion: Criterion,
    scoring: Scoring,
) -> Scores:
    """AGG: one number for each unit of the group, of the parts of its axes."""
    mine = [parts[axis].of(group.units) for axis in group.signature if axis in parts]
    if criterion.combine is not None:
        return criterion.combine(mine) if mine else np.ones(len(group))
    wanted = {"producers": Role.PRODUCER, "consumers": Role.CONSUMER}.get(scoring.aggregate)
    chosen = [p for p in mine if wanted is None or p.role == wanted] or mine
    if not chosen:
        return np.ones(len(group))  # the criterion sees nothing here: all units are alike
    stack = np.stack([p.value for p in chosen])
    if scoring.aggregate == "max":
        return np.asarray(stack.max(axis=0))
    if scoring.aggregate == "prod":
        return np.asarray(stack.prod(axis=0))
    total = stack.sum(axis=0)
    return np.asarray(total / len(stack) if scoring.aggregate == "mean" else total)
