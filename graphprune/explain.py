"""Answer `explain`: what an axis or a slot is tied to, or the path that pins it."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from itertools import groupby

import numpy as np

from graphprune.analysis import Analysis, inexact
from graphprune.coupling import Group, describe
from graphprune.errors import UsageError
from graphprune.model import label
from graphprune.slots import Axis
from graphprune.wording import counted

LONGEST_LIST = 30


@dataclass(frozen=True)
class Place:
    """A tensor, perhaps one of its axes, perhaps one index along it."""

    tensor: str
    axis: int | None = None
    index: int | None = None


def parse_place(analysis: Analysis, text: str) -> Place:
    """``TENSOR[:AXIS[:INDEX]]``; a tensor's own colons are understood."""
    known = analysis.relations.slots.tensors
    pieces = text.split(":")
    for numbers in range(3):
        name = ":".join(pieces[: len(pieces) - numbers])
        rest = pieces[len(pieces) - numbers :]
        if name in known and all(part.isdigit() for part in rest):
            place = Place(name, *(int(part) for part in rest))
            _check(place, analysis)
            return place
    alike = [name for name in known if pieces[0] in name] or get_close_matches(text, list(known))
    raise UsageError(
        f"no tensor is called {text!r}",
        hint=f"Perhaps {', '.join(alike[:5] or list(known)[:3])}.",
    )


def _check(place: Place, analysis: Analysis) -> None:
    shape = analysis.relations.slots.tensors[place.tensor].shape
    if place.axis is not None and place.axis >= len(shape):
        hint = f"They are counted from 0; its sizes are {list(shape)}."
        raise UsageError(
            f"{place.tensor!r} has {counted(len(shape), 'axis', 'axes')}, no axis {place.axis}",
            hint=hint,
        )
    if place.index is not None and place.axis is not None and place.index >= shape[place.axis]:
        size = shape[place.axis]
        raise UsageError(
            f"axis {place.axis} of {place.tensor!r} has {size} indices, no index {place.index}",
            hint=f"They are 0 to {size - 1}.",
        )


def explain(analysis: Analysis, place: Place) -> str:
    """Text: one paragraph per axis asked for."""
    tensor = analysis.relations.slots.tensors[place.tensor]
    axes = list(tensor) if place.axis is None else [tensor[place.axis]]
    return "\n\n".join(_explain_axis(analysis, axis, place.index) for axis in axes)


def _explain_axis(analysis: Analysis, axis: Axis, index: int | None) -> str:
    coupling = analysis.coupling
    slots = axis.slots if index is None else axis.slots[index : index + 1]
    count = counted(len(axis), "slot")
    name = f"{axis} ({count})" if index is None else f"{axis}:{index}"
    units = coupling.unit_of(slots)
    free = units[units >= 0]
    lines = []
    if len(free):
        groups = [g for g in coupling.groups if set(free.tolist()) & set(g.units.tolist())]
        for group in groups:
            mine = set(free.tolist()) & set(group.units.tolist())
            lines.append(f"{name} is in {group}: {counted(len(mine), 'unit')} of it")
            lines += _shifts(analysis, mine)
            lines += _ties(analysis, axis, group, mine if index is not None else set())
    stuck = slots[units < 0]
    seen: set[int] = set()
    for slot in stuck.tolist():
        component = int(coupling.labels[slot])
        if component in seen:
            continue
        seen.add(component)
        lines += [line for line in _why_pinned(analysis, axis, slot, name) if line not in lines]
        if len(seen) >= 3 and len(stuck) > 3:
            lines.append(f"  ({len(stuck)} slots of this axis stay)")
            break
    return "\n".join(lines) or f"{name}: no parameter lies along this axis, so nothing to remove"


def _shifts(analysis: Analysis, units: set[int]) -> list[str]:
    """What takes statistics over them, where that was allowed."""
    removed = analysis.nothing_removed
    removed[sorted(units)] = True
    return [f"  inexact: {e.reason} ({e.where})" for e in inexact(analysis, removed)]


def _ties(analysis: Analysis, axis: Axis, group: Group, units: set[int]) -> list[str]:
    """What an axis is tied to; for single units also which indices there go with them."""
    lines = []
    for tensor, index in group.signature[:LONGEST_LIST]:
        if (tensor, index) == (axis.tensor, axis.index):
            continue
        other = analysis.relations.slots.tensors[tensor][index]
        mine = np.isin(analysis.coupling.unit_of(other.slots), sorted(units))
        which = f" at {_ranges(np.flatnonzero(mine).tolist())}" if units else ""
        lines.append(
            f"  tied to {tensor}:{index}{which}{_through(analysis, axis, {(tensor, index)})}"
        )
    if len(group.signature) > LONGEST_LIST:
        lines.append(f"  … and {len(group.signature) - LONGEST_LIST} more")
    return lines


def _ranges(indices: list[int]) -> str:
    """0, 1, 2, 5 as 0-2, 5."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def _why_pinned(analysis: Analysis, axis: Axis, slot: int, name: str) -> list[str]:
    coupling = analysis.coupling
    pin = coupling.pin_of(slot)
    if pin is None:
        return [f"{name}: no parameter lies along this axis, so nothing to remove"]
    ends = {
        (other.tensor, other.index)
        for other in coupling.relations.slots.axes
        if len(other) and other.slots[0] <= pin.slots[0] <= other.slots[-1]
    }
    line = f"{name} is pinned: {describe(analysis.model, pin)}"
    return [line + _through(analysis, axis, ends)]


def _through(analysis: Analysis, axis: Axis, ends: set[tuple[str, int]]) -> str:
    steps = analysis.coupling.path((axis.tensor, axis.index), ends)
    passed = [label(analysis.model.nodes[node]) for _, _, node in steps if node >= 0]
    nodes = [name for name, _ in groupby(passed)]
    shown = nodes if len(nodes) <= 8 else [*nodes[:4], "…", *nodes[-3:]]
    return f"\n    through {' -> '.join(shown)}" if nodes else ""
