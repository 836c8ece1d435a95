"""Repair of quantised models: of what they are spelled out (``graphprune.spelled``), and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from graphprune.coupling import Coupling
from graphprune.distortion import distortion
from graphprune.interface import fitted
from graphprune.model import Model
from graphprune.repair.damage import Damage, Repair, Repaired
from graphprune.repair.reconstruct import with_biases
from graphprune.repair.refine import Lesson, Refined, refine
from graphprune.repair.softened import hardened, softened
from graphprune.runtime import run_session, session
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


def refined_integers(
    model: Model, lesson: Lesson, steps: int, progress: Callable[[float], None]
) -> tuple[Model, Refined]:
    """``refine`` for a model of any operators: integers are tuned as the numbers that they stand
    for, without the rounding of activations, and must be better with it too."""
    plain = spelled(model)
    if not any(node.op_type == "QuantizeLinear" for node in model.nodes) and not plain.replaced:
        return refine(model, lesson, steps, progress)
    whole = with_biases(plain.model)
    soft = softened(whole)
    tuned, report = refine(soft, lesson, steps, progress)
    if tuned is soft:
        return model, report
    hard = hardened(whole, tuned)
    if hard is None:
        return model, Refined(why="its weights are read in several ways")
    result = plain.back(hard)
    before, after = _errors(lesson, (model, result))
    if not after < before:
        why = f"with rounding the error of the outputs was {after:.3g}, before {before:.3g}"
        return model, Refined(why=why)
    return result, report


def _errors(lesson: Lesson, models: Sequence[Model]) -> Sequence[float]:
    """Distortion of each model's outputs on all inputs; the original runs once."""
    teacher, runners = session(lesson.original), [session(model) for model in models]
    names = [value.name for value in lesson.original.outputs]
    found = []
    for chunk in range(len(lesson.feeds)):
        feed = lesson.feeds[chunk]
        given = dict(zip(names, run_session(teacher, feed), strict=True))
        found.append(
            [
                distortion(list(fitted(m, given).values()), run_session(runner, fitted(m, feed)))
                for m, runner in zip(models, runners, strict=True)
            ]
        )
    return [float(error) for error in np.mean(found, axis=0)]


def known_to(coupling: Coupling, plain: Spelled) -> Coupling:
    """The coupling with the tensors of the spelled model among its own."""
    slots = plain.slots(coupling.relations.slots)
    return replace(coupling, relations=replace(coupling.relations, slots=slots))
