"""A plan's options, checked, as the options of a run that makes the same model again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from graphprune.coupling import USUAL_UNITS
from graphprune.criteria import Scoring
from graphprune.errors import UsageError
from graphprune.options import Options
from graphprune.planning import FALLBACK


def replayed(given: Mapping[str, Any], options: Options) -> tuple[Options, Mapping[str, Any]]:
    """``options`` with what the plan's own say instead, and the calibration inputs that its repair
    used; empty where it used none."""
    _check(given)
    shapes = {name: tuple(sizes) for name, sizes in given.get("input_shapes", {}).items()}
    inputs = _inputs(given)
    chosen = replace(
        options,
        criterion=FALLBACK,  # nothing is scored again: only the repair may need inputs
        repair=str(given.get("repair", "none")),
        refine=given.get("refine", 0),  # older plans say nothing of it
        samples=inputs.get("samples"),
        preprocess=inputs.get("preprocess"),
        scoring=Scoring(seed=int(given.get("seed", 0))),
        protect=tuple(given.get("protect", ())),
        only=tuple(given.get("only", ())),
        units=tuple(given.get("units", USUAL_UNITS)),
        allow_interface_change=bool(given.get("allow_interface_change")),
        allow_inexact=bool(given.get("allow_inexact")),
        unconstrained=bool(given.get("unconstrained")),
        lossless=bool(given.get("lossless")),  # older plans say nothing of it
        input_shapes=shapes,
        aligned=bool(given.get("aligned", True)),
    )
    if not given.get("ranks"):
        units = tuple(name for name in chosen.units if name != "ranks")
        chosen = replace(chosen, units=units or chosen.units)
    if chosen.repair == "none" and not (given.get("ranks") or given.get("refine")):
        return replace(chosen, calib=None, preprocess=None), {}
    if not inputs.get("synthesised", True) and chosen.calib is None:
        raise UsageError(
            f"the plan was repaired on {inputs['source']}",
            hint="Give the same inputs with --calib.",
        )
    return chosen, inputs


def _check(given: Mapping[str, Any]) -> None:
    """Options that a plan repeats are of the types that the program writes."""
    lists = [given.get(key, []) for key in ("protect", "only", "units")]
    ranks = given.get("ranks", {})
    shapes = given.get("input_shapes", {})
    numbers = [given.get("seed", 0), given.get("refine", 0)]
    if not isinstance(ranks, dict):
        raise UsageError("the plan's ranks are malformed", hint="Make a new plan.")
    numbers += ranks.values()
    sound = isinstance(shapes, dict) and all(isinstance(sizes, list) for sizes in shapes.values())
    if sound:
        numbers += [size for sizes in shapes.values() for size in sizes]
    sound = sound and all(isinstance(names, list | tuple) for names in lists)
    sound = sound and all(isinstance(name, str) for names in lists for name in names)
    flags = ("unconstrained", "lossless")
    sound = sound and all(isinstance(given.get(flag, False), bool) for flag in flags)
    if not sound or not all(type(n) is int and n >= 0 for n in numbers):
        raise UsageError("the plan's options are malformed", hint="Make a new plan.")


def _inputs(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The calibration inputs that a plan names, checked; empty where it names none."""
    inputs = given.get("calibration")
    if not inputs:
        return {}
    wanted = {"source": str, "key": str, "samples": int, "synthesised": bool}
    if not isinstance(inputs, dict) or not all(
        isinstance(inputs.get(key), kind) for key, kind in wanted.items()
    ):
        raise UsageError("the plan's calibration inputs are malformed", hint="Make a new plan.")
    return inputs
