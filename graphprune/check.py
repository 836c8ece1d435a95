"""Test any rule with law 3: f(slice(x)) == slice(f(zero(x))), for every free choice of slots.

``check_rule`` is the one line of test that a new rule needs; it takes ONNX text, a model, or a
one-operator model with its data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import parser

from graphprune.choices import standing, too_few
from graphprune.coupling import USUAL_UNITS, Coupling, Mask, couple, describe
from graphprune.cut import cut
from graphprune.errors import ModelError
from graphprune.model import Array, Model
from graphprune.oracle import Open, law_error
from graphprune.pipeline import Context, Pipeline
from graphprune.plugins import collect, installed
from graphprune.rules import BUILTIN, Rules, relate
from graphprune.runtime import Feeds, opened, random_inputs
from graphprune.shapes import infer
from graphprune.storage import load

TOLERANCE = 1e-4
LOW_PRECISION = {10, 16}
MOST_TRIES = 6


@dataclass(frozen=True)
class Checked:
    """What a check tried: removals that held, or why everything is pinned."""

    removals: int
    worst: float
    pinned: str  # why nothing could be removed; empty where something could

    @property
    def passed(self) -> bool:
        return self.removals > 0


class LawBrokenError(AssertionError):
    """A rule describes an operator wrongly: the cut model differs from the zeroed original."""


def check_rule(
    source: str | onnx.ModelProto,
    feeds: Mapping[str, Array] | None = None,
    rules: Rules = BUILTIN,
    seed: int = 0,
    open_model: Open = opened,
    units: Sequence[str] = USUAL_UNITS,
    inexact: bool = False,
) -> Checked:
    """Remove free slots in several ways and hold each result against law 3.

    Inputs and outputs are not pinned here: they lose slots with everything else. With ``inexact``
    so do slots that statistics are taken over. Raises ``LawBrokenError`` where a rule is wrong.
    Returns what was tried; nothing free is no error.
    """
    loaded = load(parser.parse_model(source) if isinstance(source, str) else source)
    model = Pipeline(collect(installed()).prepare).run(loaded, Context(rules)).model
    shapes = infer(model, {name: array.shape for name, array in (feeds or {}).items()})
    relations = relate(model, shapes, rules, pin_interface=False)
    coupling = couple(model, shapes, relations, units=units, inexact=inexact)
    inputs = dict(feeds) if feeds is not None else random_inputs(model, shapes, seed)
    removals, worst = 0, 0.0
    low = LOW_PRECISION & {shapes.dtype[v.name] for v in (*model.inputs, *model.outputs)}
    limit = 2e-2 if low else TOLERANCE
    for alive in _choices(coupling, np.random.default_rng(seed)):
        result, _ = cut(model, shapes, coupling, alive)
        try:
            error = law_error(model, result, shapes, coupling, alive, inputs, open_model)
        except ModelError as refused:
            open_model(model)(inputs)  # a model that never ran is not the rule's fault
            raise LawBrokenError(f"the cut model does not run: {refused}") from refused
        if not error <= limit:
            left = {
                str(a): np.flatnonzero(~alive[a.slots]).tolist()
                for a in relations.slots.axes
                if not alive[a.slots].all()
            }
            raise LawBrokenError(f"relative error {error:.2e} after removing {left}")
        removals, worst = removals + 1, max(worst, error)
    return Checked(removals, worst, "" if removals else _why(model, coupling))


def _choices(coupling: Coupling, rng: np.random.Generator) -> Iterator[Mask]:
    """Slot masks: single components, then a random half; never one that empties an axis."""
    axes = [axis.slots for axis in standing(coupling.relations)]
    if not axes:
        return
    parts = [part for fold in coupling.relations.folds for part in fold.parts]
    seen = np.unique(coupling.labels[np.concatenate(axes)])
    free = np.array([c for c in seen.tolist() if c not in coupling.reason], dtype=np.int64)
    if not len(free):
        return
    singles = [np.array([c]) for c in rng.permutation(free)[: MOST_TRIES - 2]]
    halves = [rng.permutation(free)[: max(1, len(free) // 2)] for _ in range(2)]
    for chosen in [*singles, *halves]:
        gone = np.zeros(len(np.unique(coupling.labels)), dtype=bool)
        for component in chosen.tolist():
            more = gone.copy()
            more[component] = True
            more = coupling.follow.closed(more)
            short = too_few(coupling.relations, ~more[coupling.labels])
            if short is None and not any(
                more[coupling.labels[slots]].all() for slots in (*axes, *parts)
            ):
                gone = more
        if gone.any():
            yield np.asarray(~gone[coupling.labels])


def _why(model: Model, coupling: Coupling) -> str:
    reasons = dict.fromkeys(describe(model, pin) for pin in coupling.pins if len(pin.slots))
    return next(iter(reasons), "no axis has a slot to spare")


def constants_from(model: onnx.ModelProto, inputs: list[Array]) -> tuple[onnx.ModelProto, Feeds]:
    """Small integer inputs (shapes, axes, indices) and scales become initialisers, as exported."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model)
    feeds: dict[str, Array] = {}
    for i, (value, array) in enumerate(zip(model.graph.input, inputs, strict=False)):
        lists = isinstance(array, np.ndarray) and array.ndim <= 1 and i > 0
        scales = any(node.op_type in ("Resize", "Upsample") for node in model.graph.node)
        if lists and (array.dtype.kind in "iub" or scales):
            proto.graph.initializer.append(onnx.numpy_helper.from_array(array, value.name))
        else:
            feeds[value.name] = array
    return proto, feeds
