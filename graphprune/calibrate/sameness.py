"""Samples that say less than their number promises: rows that are all equal."""

from __future__ import annotations

from graphprune.calibrate.samples import Samples, batched_inputs
from graphprune.lookups import index_bounds
from graphprune.model import Model
from graphprune.runtime import input_dtype
from graphprune.shapes import Shapes

ROWS = 64  # read together


def sameness(samples: Samples, model: Model, shapes: Shapes) -> tuple[str, ...]:
    """A note on rows that are all equal, or on inputs that are the same in every row. Masks,
    types and lengths may well be."""
    if samples.count < 2:
        return ()
    batched = batched_inputs(model)
    constant = set(batched)
    first = samples.read(0, 1)
    for start in range(0, samples.count, ROWS):  # stops early: as a rule the first rows differ
        if not constant:
            return ()
        rows = samples.read(start, min(start + ROWS, samples.count))
        constant = {name for name in constant if (rows[name] == first[name]).all()}
    if constant == batched:
        return (f"all {samples.count} calibration inputs are equal: they are worth one",)
    telling = {
        value.name
        for value in model.inputs
        if value.name in constant
        and (input_dtype(value).kind == "f" or index_bounds(model, shapes, value.name))
    }
    named = ", ".join(repr(value.name) for value in model.inputs if value.name in telling)
    return (f"the same in all {samples.count} calibration inputs: {named}",) if telling else ()
