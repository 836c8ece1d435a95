"""The plan: what leaves and why, as a reviewable JSON document tied to one model."""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from graphprune.analysis import Analysis
from graphprune.choices import standing, too_few
from graphprune.coupling import Coupling, Mask, Signature
from graphprune.errors import UsageError
from graphprune.slots import Axis

SCHEMA = "graphprune.plan/1"
ANEW = "Make a new plan with --plan-out."  # what to do about one that cannot be applied
A_PLAN = "graphprune apply MODEL PLAN: the plan is the file that --plan-out has written."


@dataclass(frozen=True)
class PlannedGroup:
    """One group's decision: ordinals of the units that leave, and every unit's score."""

    name: str
    axes: Signature
    scores: tuple[float, ...]
    removed: tuple[int, ...]
    reason: str

    def __str__(self) -> str:
        return (
            f"{self.name}: {len(self.scores) - len(self.removed)} of {len(self.scores)} units kept"
        )


@dataclass(frozen=True)
class PlannedBlock:
    """One residual block's decision: the tensor that its branch ends with, what it reads and what
    sum it is part of, what it is, its score, and whether it leaves."""

    name: str
    entry: str
    exit: str
    kind: str
    score: float
    removed: bool

    def __str__(self) -> str:
        return f"{self.kind} {self.name}: {'leaves' if self.removed else 'stays'}"


@dataclass(frozen=True)
class Plan:
    """What leaves one model. ``kept`` lists the surviving indices of every parameter axis."""

    model_sha256: str
    options: Mapping[str, Any]
    groups: tuple[PlannedGroup, ...]
    kept: Mapping[str, Mapping[str, list[int]]]
    blocks: tuple[PlannedBlock, ...] = ()

    def document(self) -> dict[str, Any]:
        body: dict[str, Any] = {
            "schema": SCHEMA,
            "model_sha256": self.model_sha256,
            "options": dict(self.options),
            "groups": [
                {
                    "name": group.name,
                    "axes": [list(axis) for axis in group.axes],
                    "units": len(group.scores),
                    "scores": list(group.scores),
                    "removed": list(group.removed),
                    "reason": group.reason,
                }
                for group in self.groups
            ],
            "kept": {name: dict(axes) for name, axes in self.kept.items()},
        }
        if self.blocks:
            body["blocks"] = [asdict(block) for block in self.blocks]
        return {**body, "sha256": _digest(body)}

    def to_json(self) -> str:
        return json.dumps(self.document(), indent=1) + "\n"

    def __str__(self) -> str:
        chosen = [*(b for b in self.blocks if b.removed), *(g for g in self.groups if g.removed)]
        return "\n".join(map(str, chosen))


def make_plan(
    analysis: Analysis, removed: Mask, scores: Any, options: Mapping[str, Any], reason: str
) -> Plan:
    """Write down a decision (bool per unit) for ``analysis``'s model."""
    coupling = analysis.coupling
    groups = []
    for group in coupling.groups:
        gone = np.flatnonzero(removed[group.units])
        groups.append(
            PlannedGroup(
                group.name,
                group.signature,
                tuple(float(f"{value:.6g}") for value in scores[group.units]),
                tuple(int(i) for i in gone),
                reason if len(gone) else "kept whole",
            )
        )
    kept = _kept(analysis, removed)
    return Plan(
        analysis.model.sha256, options, tuple(groups), kept, _blocks(analysis, removed, scores)
    )


def check_model(plan: Plan, analysis: Analysis) -> None:
    """Refuse a plan that was made for another model."""
    if plan.model_sha256 != analysis.model.sha256:
        raise UsageError(
            "the plan belongs to another model",
            f"plan {plan.model_sha256[:12]}, model {analysis.model.sha256[:12]}",
            "Make a new plan for this model with --plan-out; so too where an earlier "
            "graphprune, which prepared models otherwise, made it.",
        )


def removed_units(plan: Plan, analysis: Analysis) -> Mask:
    """The plan's decision as a mask over the units of this analysis; refused where it is stale."""
    coupling = analysis.coupling
    check_model(plan, analysis)
    by_axes = {group.signature: group for group in coupling.groups}
    removed = np.zeros(coupling.n_units, dtype=bool)
    for entry in plan.groups:
        group = by_axes.get(entry.axes)
        if group is None or len(group) != len(entry.scores):
            cause = "the plan names a group that this version finds otherwise"
            raise UsageError(cause, entry.name, ANEW)
        if entry.removed and not 0 <= min(entry.removed) <= max(entry.removed) < len(group):
            raise UsageError("the plan names a unit that does not exist", entry.name, ANEW)
        removed[group.units[list(entry.removed)]] = True
    removed |= _removed_blocks(plan, analysis)
    axis = emptied(coupling, removed)
    if axis is not None:
        raise UsageError("the plan removes all of an axis, or too much", str(axis), ANEW)
    if _kept(analysis, removed) != {k: dict(v) for k, v in plan.kept.items()}:
        raise UsageError(
            "the plan's kept indices contradict its removed units",
            hint="Edit only `removed` or make a new plan; `kept` follows from it.",
        )
    return removed


def emptied(coupling: Coupling, removed: Mask) -> Axis | None:
    """The first axis of which nothing would stay, or less than an operator takes of it."""
    alive = coupling.alive(removed)
    short = too_few(coupling.relations, alive)
    return next(
        (
            axis
            for axis in standing(coupling.relations)
            if not alive[axis.slots].any()
            or (short is not None and np.array_equal(axis.slots, short.slots))
        ),
        None,
    )


def _blocks(analysis: Analysis, removed: Mask, scores: Any) -> tuple[PlannedBlock, ...]:
    pairs = zip(analysis.blocks, analysis.coupling.blocks.tolist(), strict=True)
    return tuple(
        PlannedBlock(
            block.name,
            block.entry,
            block.exit,
            block.kind,
            float(f"{scores[unit]:.6g}"),
            bool(removed[unit]),
        )
        for block, unit in pairs
        if unit >= 0
    )


def _removed_blocks(plan: Plan, analysis: Analysis) -> Mask:
    """The blocks that leave, as a mask over the units."""
    removed = analysis.nothing_removed
    pairs = zip(analysis.blocks, analysis.coupling.blocks.tolist(), strict=True)
    known = {(b.name, b.entry, b.exit): unit for b, unit in pairs if unit >= 0}
    for entry in plan.blocks:
        unit = known.get((entry.name, entry.entry, entry.exit))
        if unit is None:
            cause = "the plan names a block that this version finds otherwise"
            raise UsageError(cause, entry.name, ANEW)
        removed[unit] = entry.removed
    return removed


def read_plan(path: Path) -> Plan:
    """Read and check a plan file (schema and hash)."""
    try:
        document = json.loads(path.read_text())
    except OSError as error:
        cause = f"cannot read the plan: {error.strerror}"
        raise UsageError(cause, str(path), A_PLAN) from error
    except (ValueError, RecursionError) as error:
        raise UsageError("the plan is not JSON", str(path), A_PLAN) from error
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise UsageError(f"not a plan of schema {SCHEMA}", str(path), A_PLAN)
    stated = document.pop("sha256", None)
    if stated != _digest(document):
        raise UsageError(
            "the plan was changed after it was written: its hash does not fit",
            str(path),
            ANEW,
        )
    try:
        return _parsed(document)
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        cause = f"the plan's contents are malformed: {error!r}"
        raise UsageError(cause, str(path), ANEW) from error


def _parsed(document: Mapping[str, Any]) -> Plan:
    groups = tuple(
        PlannedGroup(
            str(entry["name"]),
            tuple((str(tensor), int(axis)) for tensor, axis in entry["axes"]),
            tuple(float(value) for value in entry["scores"]),
            tuple(operator.index(unit) for unit in entry["removed"]),
            str(entry["reason"]),
        )
        for entry in document["groups"]
    )
    kept = {str(name): dict(axes.items()) for name, axes in document["kept"].items()}
    blocks = tuple(
        PlannedBlock(
            str(entry["name"]),
            str(entry["entry"]),
            str(entry["exit"]),
            str(entry["kind"]),
            float(entry["score"]),
            _truth(entry["removed"]),
        )
        for entry in document.get("blocks", ())
    )
    options = dict(document["options"].items())
    return Plan(str(document["model_sha256"]), options, groups, kept, blocks)


def _truth(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{value!r} is neither true nor false")
    return value


def _kept(analysis: Analysis, removed: Mask) -> dict[str, dict[str, list[int]]]:
    alive = analysis.coupling.alive(removed)
    kept: dict[str, dict[str, list[int]]] = {}
    for axis in analysis.coupling.parameters:
        mask = alive[axis.slots]
        if not mask.all():
            kept.setdefault(axis.tensor, {})[str(axis.index)] = np.flatnonzero(mask).tolist()
    return kept


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
