"""Masks from outside: what each weight's own mask removes, and which units leave for all of them.

An index of an axis leaves where all elements behind it are 0. A mask speaks about the axes of
which it removes an index; one that removes none of any axis says that all rows stay. A unit is what
the ties make of such indices, so that several masks may speak about it, and they may disagree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from graphprune.analysis import Analysis
from graphprune.coupling import Coupling, Mask
from graphprune.criteria import role_of
from graphprune.errors import UsageError
from graphprune.outside.files import Given, given, read
from graphprune.plan import emptied
from graphprune.prepared import Prepared
from graphprune.relations import Role
from graphprune.wording import counted

RESOLVE = ("error", "union", "intersection")
SPOKEN = frozenset({Role.PRODUCER, Role.CONSUMER, Role.SCALE})
WRITE = "weights without a mask write"
PARTLY = "units that the masks remove in part stay"
STUCK = "indices that the masks remove stay as they are"
MOST_REASONS = 4


@dataclass(frozen=True)
class Wanted:
    """What masks say. ``axes``: for each parameter axis that is spoken of, which of its indices
    leave, before any tie is looked at. ``units``: likewise for the units of a group, by its number.
    ``unstructured``: parameters whose mask has zeros that fill no index of an axis."""

    axes: Mapping[tuple[str, int], Mask]
    units: Mapping[int, Mask]
    unstructured: tuple[str, ...] = ()


@dataclass(frozen=True)
class Masked:
    """Units that leave, what to say of it, and the hash of the file."""

    removed: Mask
    notes: tuple[str, ...]
    sha256: str


def masks_from(prepared: Prepared, path: Path, resolve: str) -> Masked:
    """The units that the masks of a file leave. Where they disagree about one: ``union``, it leaves
    where any says so; ``intersection``, only where all say so; ``error``, that is refused."""
    arrays, digest = read(path, "--masks")
    for name, array in arrays.items():
        if not np.isin(array, (0, 1)).all():
            raise UsageError(
                "a mask holds nothing but 1 or True (a weight stays) and 0 or False (it leaves)",
                f"array {name!r} of {path}",
                "For numbers that say how much a weight matters: --scores.",
            )
    analysis = prepared.analysis
    found = wanted(analysis, given(prepared, arrays, path))
    ballots = _ballots(analysis.coupling, found)
    nobody = analysis.nothing_removed
    some = np.any([nobody, *(b.leave for b in ballots)], axis=0)
    apart = some & np.any([nobody, *(b.stay | b.part for b in ballots)], axis=0)
    if resolve == "error" and apart.any():
        raise _disagreement(analysis.coupling, ballots, apart)
    agreed = some & ~apart
    removed = agreed if resolve == "intersection" else some
    _check_left(analysis.coupling, ballots, removed, agreed, path)
    return Masked(removed, tuple(_notes(analysis, found, ballots, removed, apart)), digest)


def wanted(analysis: Analysis, masks: Given) -> Wanted:
    """What the masks say of each axis on its own: the set that every reader and writer of a tensor
    would keep, were it not for the others."""
    coupling = analysis.coupling
    leaves: dict[str, dict[int, Mask]] = {}
    rows: set[tuple[str, int]] = set()
    for axis in coupling.parameters:
        place = axis.tensor, axis.index
        whole, own = masks.elements.get(axis.tensor), masks.slots.get(place)
        if own is None and whole is not None:  # NaN, where nothing was given, stays
            own = np.abs(whole).max(axis=tuple(i for i in range(whole.ndim) if i != axis.index))
        if own is None:
            continue
        leaves.setdefault(axis.tensor, {})[axis.index] = own == 0
        rows |= set() if role_of(coupling, axis) is Role.CONSUMER else {place}
    axes: dict[tuple[str, int], Mask] = {}
    unstructured = []
    for name, found in leaves.items():
        told = {i for i, gone in found.items() if gone.any() or (name, i) in masks.slots}
        if not told and (masks.elements[name] == 0).any():
            unstructured.append(name)
        told = told or {i for i in found if (name, i) in rows}
        axes |= {(name, i): found[i] for i in sorted(told)}
    units = {group: array == 0 for group, array in masks.units.items()}
    return Wanted(axes, units, tuple(unstructured))


@dataclass(frozen=True)
class _Ballot:
    """What one mask says of units: these leave, these stay whole, these leave in part."""

    name: str
    leave: Mask
    stay: Mask
    part: Mask


def _ballots(coupling: Coupling, found: Wanted) -> list[_Ballot]:
    """Those that count: biases and other vectors only in groups of which nothing else is said."""
    strong: list[_Ballot] = []
    weak: list[_Ballot] = []
    for (name, index), gone in found.axes.items():
        axis = coupling.relations.slots.tensors[name][index]
        units = coupling.unit_of(axis.slots)
        every = np.bincount(units[units >= 0], minlength=coupling.n_units)
        gone_too = np.bincount(units[(units >= 0) & gone], minlength=coupling.n_units)
        leave, stay = (every > 0) & (gone_too == every), (every > 0) & (gone_too == 0)
        ballot = _Ballot(f"{name}:{index}", leave, stay, (every > 0) & ~leave & ~stay)
        (strong if role_of(coupling, axis) in SPOKEN else weak).append(ballot)
    for number, gone in found.units.items():
        group = coupling.groups[number]
        leave = np.zeros(coupling.n_units, dtype=bool)
        stay = leave.copy()
        leave[group.units], stay[group.units] = gone, ~gone
        strong.append(_Ballot(group.name, leave, stay, np.zeros_like(leave)))
    spoken = np.zeros(coupling.n_units, dtype=bool)
    for ballot in strong:
        spoken |= ballot.leave | ballot.stay | ballot.part
    for group in coupling.groups:
        spoken[group.units] = spoken[group.units].any()
    return strong + [
        _Ballot(b.name, b.leave & ~spoken, b.stay & ~spoken, b.part & ~spoken) for b in weak
    ]


def _disagreement(coupling: Coupling, ballots: Sequence[_Ballot], apart: Mask) -> UsageError:
    unit = int(np.flatnonzero(apart)[0])
    against = next(b.name for b in ballots if (b.stay | b.part)[unit])
    leaves = next(b.name for b in ballots if b.leave[unit])
    groups = [group for group in coupling.groups if apart[group.units].any()]
    ordinal = int(np.flatnonzero(groups[0].units == unit)[0])
    return UsageError(
        f"the masks disagree about {counted(int(apart.sum()), 'unit')} of "
        f"{counted(len(groups), 'group')}",
        f"unit {ordinal} of {groups[0].name}: {leaves} removes it, {against} does not",
        "--resolve union lets a unit leave where any of its masks says so, --resolve intersection "
        "only where all of them do.",
    )


def _check_left(
    coupling: Coupling, ballots: Sequence[_Ballot], removed: Mask, agreed: Mask, path: Path
) -> None:
    """Refuse masks that empty an axis. ``agreed``: what --resolve intersection would remove."""
    axis = emptied(coupling, removed)
    if axis is None:
        return
    left = int(coupling.alive(removed)[axis.slots].sum())
    units = np.append(np.zeros(coupling.n_units, dtype=bool), False)
    units[coupling.unit_of(axis.slots)] = True
    by = sorted(ballots, key=lambda b: -int((b.leave & units[:-1]).sum()))[0].name
    helps = emptied(coupling, agreed) is None
    raise UsageError(
        f"{left or 'nothing'} of {axis} would stay{', and an operator takes more' * bool(left)}",
        f"mask {by} of {path}",
        "Let more of it be 1, which stays"
        + (", or give --resolve intersection." if helps else "."),
    )


def _notes(
    analysis: Analysis, found: Wanted, ballots: Sequence[_Ballot], removed: Mask, apart: Mask
) -> Iterator[str]:
    """What the masks ask for and does not happen, or happens to others too: a line each."""
    coupling = analysis.coupling
    if not removed.any():
        yield "the masks remove no unit: nothing was cut"
    if apart.any():
        yield f"the masks disagree about {counted(int(apart.sum()), 'unit')}, of which " + (
            "all leave" if removed[apart].all() else "none leaves"
        )
    partly = [analysis.nothing_removed, *(ballot.part for ballot in ballots)]
    part = ~removed & np.any(partly, axis=0)
    if part.any():
        yield (
            f"{counted(int(part.sum()), 'unit that the masks remove in part stays', PARTLY)} whole"
        )
    yield from _pinned(coupling, found)
    if found.unstructured:
        yield (
            f"{counted(len(found.unstructured), 'mask has', 'masks have')} zeros that fill no "
            f"index of an axis, first {found.unstructured[0]}: nothing leaves for these"
        )
    masked = {name for name, _ in found.axes}
    beside = [
        (name, group)
        for group in coupling.groups
        if removed[group.units].any() and group.index not in found.units
        for name, index in group.signature
        if role_of(coupling, coupling.relations.slots.tensors[name][index]) is Role.PRODUCER
        and name not in masked
    ]
    if beside:
        writers = len({name for name, _ in beside})
        yield (
            f"what {counted(writers, 'weight without a mask writes', WRITE)} to the same units "
            f"leaves too, first {beside[0][0]}"
        )


def _pinned(coupling: Coupling, found: Wanted) -> Iterator[str]:
    held: Counter[str] = Counter()
    for (name, index), gone in found.axes.items():
        axis = coupling.relations.slots.tensors[name][index]
        if role_of(coupling, axis) not in SPOKEN:
            continue
        stuck = axis.slots[gone & (coupling.unit_of(axis.slots) < 0)]
        pins = [coupling.pin_of(int(slot)) for slot in stuck]
        held.update("not reached" if pin is None else pin.reason for pin in pins)
    for reason, count in held.most_common(MOST_REASONS):
        yield f"{counted(count, 'index that the masks remove stays as it is', STUCK)}: {reason}"
    if len(held) > MOST_REASONS:
        yield f"and {len(held) - MOST_REASONS} more such reasons"
