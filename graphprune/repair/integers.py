"""Repair of quantised models: of what they are spelled out (``graphprune.spelled``), and back."""

from __future__ import annotations

from dataclasses import replace

from graphprune.coupling import Coupling
from graphprune.model import Model
from graphprune.repair.damage import Damage, Repair, Repaired
from graphprune.shapes import infer
from graphprune.spelled import Spelled
from graphprune.spelling import spelled


def mended(repair: Repair, damage: Damage) -> tuple[Model, tuple[Repaired, ...]]:
    """What ``repair`` makes of the cut model, whatever its operators are quantised to."""
    pruned = spelled(damage.pruned)
    if not pruned.replaced:
        return repair.run(damage)
    normal, original = spelled(damage.normal), spelled(damage.original)
    plain = replace(
        damage,
        normal=normal.model,
        original=original.model,
        pruned=pruned.model,
        shapes=infer(normal.model, damage.shapes.inputs),
        coupling=known_to(damage.coupling, original),
    )
    result, reports = repair.run(plain)
    return pruned.back(result), reports


def known_to(coupling: Coupling, plain: Spelled) -> Coupling:
    """The coupling with the tensors of the spelled model among its own."""
    slots = plain.slots(coupling.relations.slots)
    return replace(coupling, relations=replace(coupling.relations, slots=slots))
