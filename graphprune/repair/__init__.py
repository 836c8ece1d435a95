"""Weights adjusted after a cut, so that outputs match the original's again."""

from __future__ import annotations

from functools import partial

from graphprune.repair import moments, udfc
from graphprune.repair.damage import Damage, Repair, Repaired
from graphprune.repair.reconstruct import AFFINE, BIAS, reconstruct

__all__ = ["REPAIRS", "Damage", "Repair", "Repaired"]

REPAIRS = (
    Repair("obs", partial(reconstruct, form=AFFINE), doc="affine least squares, layer by layer"),
    Repair("moments", moments.compensate, needs_inputs=False, doc="activations by their moments"),
    Repair("udfc", udfc.compensate, needs_inputs=False, doc="lost filters from kept ones"),
    Repair("bias", partial(reconstruct, form=BIAS), doc="mean outputs alone"),
)
