"""Scores from outside, lifted to units as a criterion's are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from graphprune.coupling import Mask
from graphprune.criteria import Criterion, Part, Scores, Scoring, lifted, normalised, unit_scores
from graphprune.errors import UsageError
from graphprune.outside.files import Given, given, read
from graphprune.prepared import Prepared
from graphprune.relations import Role
from graphprune.wording import counted

WEIGHTS = frozenset({Role.PRODUCER, Role.CONSUMER, Role.SCALE})
MOST_NAMED = 3


def scores_from(
    prepared: Prepared, path: Path, criterion: Criterion, scoring: Scoring
) -> tuple[Scores, Mask, tuple[str, ...], str]:
    """Scores by unit, the units that stay because nothing was given for them, what to say of these,
    and the hash of the file."""
    arrays, digest = read(path, "--scores")
    for name, array in arrays.items():
        if array.size and array.min() < 0:
            raise UsageError(
                "negative scores",
                f"array {name!r} of {path}",
                "A score says how much a weight matters: give magnitudes, or add a constant.",
            )
    found = given(prepared, arrays, path)
    coupling = prepared.analysis.coupling
    parts = _parts(prepared, found, scoring)
    raw = np.zeros(coupling.n_units)
    unscored = np.zeros(coupling.n_units, dtype=bool)
    without = []
    for group in coupling.groups:
        mine = {axis: parts[axis] for axis in group.signature if axis in parts}
        weights = {axis: part for axis, part in mine.items() if part.role in WEIGHTS}
        if group.index in found.units:
            raw[group.units] = found.units[group.index]
        elif mine:
            raw[group.units] = unit_scores(group, weights or mine, criterion, scoring)
        else:
            unscored[group.units] = True
            without.append(group.name)
    if len(without) == len(coupling.groups) and without:
        raise UsageError(
            "the file scores nothing that can leave",
            f"--scores {path}",
            "`graphprune inspect MODEL` lists the groups; --json the weights of each.",
        )
    scored = [group for group in coupling.groups if not unscored[group.units].any()]
    return normalised(raw, scored, criterion, scoring), unscored, _note(without), digest


def _parts(prepared: Prepared, found: Given, scoring: Scoring) -> Mapping[tuple[str, int], Part]:
    """One part for every parameter axis that has scores; partly scored parameters have none."""
    coupling = prepared.analysis.coupling
    parts = {}
    for axis in coupling.parameters:
        place = axis.tensor, axis.index
        array, at = found.slots.get(place), 0
        if array is None:
            array, at = found.elements.get(axis.tensor), axis.index
        if array is None or np.isnan(array).any():
            continue
        parts[place] = lifted(coupling, axis, array, at, scoring.reduce)
    return parts


def _note(without: list[str]) -> tuple[str, ...]:
    if not without:
        return ()
    more = f" and {len(without) - MOST_NAMED} more" if len(without) > MOST_NAMED else ""
    named = ", ".join(without[:MOST_NAMED])
    return (
        f"{counted(len(without), 'group without a score stays', 'groups without a score stay')} "
        f"whole: {named}{more}",
    )
