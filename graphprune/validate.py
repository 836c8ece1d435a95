"""The result against the original: law 3 proved; outputs, latency and accuracy measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from graphprune.analysis import Analysis
from graphprune.branches import Branches, forced, rewritten_branches, smaller_branches
from graphprune.coupling import Mask
from graphprune.errors import ModelError, VerificationError
from graphprune.interface import fitted
from graphprune.likeness import likeness
from graphprune.model import Array, Model
from graphprune.operators import Operator, profiled_sessions
from graphprune.oracle import Open, compared, law_errors, with_outputs
from graphprune.runtime import (
    LARGE,
    Feeds,
    opened,
    random_inputs,
    session,
    time_interleaved,
)
from graphprune.scoring import Scorer
from graphprune.shapes import Shape, Shapes
from graphprune.sizes import larger
from graphprune.survivors import bound_to_sizes, shifted_nodes
from graphprune.unrounded import rounds, unrounded

TOLERANCE = 1e-4  # relative, float32; measured noise of real models is around 1e-6
LOW_PRECISION_TOLERANCE = 2e-2  # float16 and bfloat16 models


@dataclass(frozen=True)
class Verdict:
    """What was measured; ``None`` where nothing was asked for. Latencies in milliseconds."""

    relative_error: float | None = None
    passed: bool | None = None
    rounding: float | None = None  # the error with rounding, where it was proved without
    shift: float | None = None  # the error where the original takes its statistics over all slots
    output_difference: float | None = None
    compared_on: str | None = None  # the inputs it is of
    unexplained: float | None = None  # of the outputs' variance on them; see ``Likeness``
    constant: tuple[str, ...] = ()  # outputs that are, and were not
    latency: tuple[float, float] | None = None
    latency_ratio: tuple[float, float, float] | None = None  # median and quartiles
    accuracy: tuple[float, float] | None = None
    operators: tuple[Operator, ...] = ()  # where the time went, by type

    def __str__(self) -> str:
        if self.passed is None:
            return "not verified"
        word = "verified" if self.passed else "FAILED"
        return f"{word} (error {self.relative_error:.1e}{self.remark})"

    @property
    def remark(self) -> str:
        """What the proof left out, and how much that is."""
        text = ""
        if self.rounding is not None:
            text += f" without rounding to integers, whose steps make {self.rounding:.1e} of it"
        if self.shift is not None:
            text += f"; inexact: statistics over what stays move the outputs by {self.shift:.1e}"
        return text


@dataclass(frozen=True)
class Compared:
    """Inputs on which outputs are compared, and what they are."""

    on: str
    feeds: Sequence[Feeds]


@dataclass(frozen=True)
class Proof:
    """The relative error of law 3; ``rounding`` is that with rounding, where it had to be left out:
    a quantiser of activations can turn the noise of another order of sums into a whole step.
    ``shift`` is that with the original's own statistics, where slots left that these are taken
    over: not noise, but what such a removal does beyond zeroing."""

    error: float
    rounding: float | None = None
    shift: float | None = None


def verify(analysis: Analysis, result: Model, removed: Mask, seed: int = 0) -> Proof:
    """Law 3 on random inputs; where sizes are symbolic also at others that the original takes,
    unless statistics are taken over an axis that has its survivors elsewhere then.
    Bodies of control flow that the cut rewrites, and random inputs might pass by, are made to run.

    A quantised model that fails is compared again without rounding, and has to hold the same limit.
    Raises ``VerificationError`` beyond the tolerance.
    """
    alive = analysis.coupling.alive(removed)
    shapes = analysis.shapes
    others = [] if bound_to_sizes(analysis.relations, alive) else other_sizes(shapes)
    sizes = [shapes.inputs, *others]
    several = [random_inputs(analysis.model, replace(shapes, inputs=s), seed) for s in sizes]
    models = analysis.model, result, shapes, analysis.coupling, alive, several
    branches = rewritten_branches(analysis.model, shapes, analysis.coupling, alive)

    def worst(open_model: Open) -> float:
        found = law_errors(*models, open_model, must_be_finite=True)
        forced = _forced_errors(analysis, result, alive, branches, seed, open_model)
        return max([*found, *forced])

    error = worst(opened)
    limit = tolerance(analysis)
    rounding = None
    if not error <= limit and rounds(analysis.model):
        rounding, error = error, _without_rounding(worst, error)
    if not error <= limit:
        raise VerificationError(
            f"the pruned model differs from the zeroed original by {error:.2e} (limit {limit:g})",
            hint="Nothing was written. This is a defect of graphprune: please report the model's "
            "structure (`graphprune inspect MODEL --json`); --protect PATTERN may work around it.",
        )
    shift = None
    if shifted_nodes(analysis.relations, alive):
        shift = law_errors(*models[:-1], several[:1], statistics=False)[0]
    return Proof(error, rounding, shift)


def _without_rounding(worst: Callable[[Open], float], error: float) -> float:
    """The error without rounding, or as it was where the model cannot be read so."""
    try:
        return worst(lambda model: opened(unrounded(model)))
    except ModelError:
        return error


def _forced_errors(
    analysis: Analysis,
    result: Model,
    alive: Mask,
    branches: Branches,
    seed: int,
    open_model: Open,
) -> list[float]:
    """One error for each set of bodies forced together; where the original cannot run with them,
    for each body alone. It must run at some of the sizes tried, and the result wherever it does."""
    model, shapes = analysis.model, analysis.shapes
    sizes = [shapes.inputs, *other_sizes(shapes), *_smaller_sizes(shapes)]
    if bound_to_sizes(analysis.relations, alive):
        sizes = sizes[:1]
    several = [random_inputs(model, replace(shapes, inputs=s), seed) for s in sizes]

    def error_of(taken: frozenset[str]) -> float | None:
        try:
            found = law_errors(
                model, result, shapes, analysis.coupling, alive, several, open_model, True, taken
            )
        except ModelError:
            return None
        return max(found, default=None)

    errors = []
    for taken, covered in branches.together():
        error = error_of(taken)
        singly = {path: error_of(frozenset(path)) for path in covered if error is None}
        for path, alone in singly.items():
            if alone is None:
                raise VerificationError(
                    "a body of control flow holds weights that would be cut, and does not run, or "
                    "gives nothing but NaN",
                    f"body {path[-1]!r}",
                    "Give sizes that it takes with --input-shape, or leave it whole with "
                    "--protect PATTERN.",
                )
        errors += [e for e in (error, *singly.values()) if e is not None]
    return errors


def _smaller_sizes(shapes: Shapes) -> list[dict[str, Shape]]:
    """The same inputs with half of their symbolic sizes, the batch excepted."""
    halved = {
        name: tuple(
            max(1, size // 2) if axis and axis in shapes.symbolic.get(name, ()) else size
            for axis, size in enumerate(shape)
        )
        for name, shape in shapes.inputs.items()
    }
    return [] if halved == shapes.inputs else [halved]


def verify_normal(original: Model, analysis: Analysis, seed: int = 0) -> None:
    """A model whose weights were rewritten as it was prepared must compute what it did before; so
    must bodies of control flow in which that was done, where they run with these inputs.

    Raises ``VerificationError`` beyond the tolerance.
    """
    what = "the prepared model differs from the given one"
    _same(original, analysis.model, analysis, what, seed)
    for taken, covered in smaller_branches(original, analysis.model, analysis.shapes).together():
        if _same(original, analysis.model, analysis, what, seed, taken=taken):
            continue
        for path in covered:  # together they do not run
            if not _same(original, analysis.model, analysis, what, seed, taken=frozenset(path)):
                raise VerificationError(
                    "the clean-up rewrote a body of control flow, and that does not run",
                    f"body {path[-1]!r}",
                    "Give sizes that it takes with --input-shape, or leave it out: --no-lossless.",
                )


def verify_same(model: Model, reordered: Model, analysis: Analysis, seed: int = 0) -> None:
    """Channels in another order must compute what they did before. Raises ``VerificationError``."""
    what = "the model in another order differs"
    _same(model, reordered, analysis, what, seed, any_order=True)


def _same(
    before: Model,
    after: Model,
    analysis: Analysis,
    what: str,
    seed: int,
    any_order: bool = False,
    taken: frozenset[str] = frozenset(),
) -> bool:
    """The outputs and what their activations read must agree: that ``any_order``, where channels
    may have moved on the way. Bodies of ``taken`` are forced to run: whether they did at all."""
    shapes = analysis.shapes
    sizes = [shapes.inputs, *other_sizes(shapes)]
    several = [random_inputs(after, replace(shapes, inputs=each), seed) for each in sizes]
    told = compared(before, shapes, after)
    taps = [*told.taps.values()]
    ran: set[int] = set()

    def difference(open_model: Open) -> float:
        models = (with_outputs(forced(m, taken), taps, shapes) for m in (before, after))
        first, second = map(open_model, models)
        worst = 0.0
        for i, feeds in enumerate(several):
            try:
                expected = first(fitted(before, feeds))
            except ModelError:
                if i == 0 and not taken:
                    raise
                continue  # sizes that the model does not take
            actual = second(fitted(after, feeds))
            ran.add(i)
            if any_order:
                expected, actual = (_in_order(found, len(taps)) for found in (expected, actual))
            worst = max(worst, told.error(expected, actual))
        return worst

    error = difference(opened)
    if not error <= tolerance(analysis) and rounds(after):
        error = _without_rounding(difference, error)
    if not error <= tolerance(analysis):
        raise VerificationError(
            f"{what} by {error:.2e}",
            hint="Nothing was written. This is a defect of graphprune: please report the model.",
        )
    return bool(ran)


def _in_order(arrays: list[Array], last: int) -> list[Array]:
    """The arrays, the ``last`` of them with their numbers sorted."""
    ends = len(arrays) - last
    return [*arrays[:ends], *(np.sort(array, axis=None) for array in arrays[ends:])]


def other_sizes(shapes: Shapes) -> list[dict[str, Shape]]:
    """The same inputs at other sizes, if their declarations leave some open."""
    return [larger(shapes.inputs, shapes.symbolic)] if any(shapes.symbolic.values()) else []


def tolerance(analysis: Analysis) -> float:
    low = any(analysis.shapes.dtype.get(a.tensor) in (10, 16) for a in analysis.coupling.parameters)
    return LOW_PRECISION_TOLERANCE if low else TOLERANCE


def openable(result: Model) -> None:
    """Raise where ONNX Runtime, which ran the original, refuses the result: the graph may be right,
    and an optimisation of its own fail on it."""
    try:
        session(result, optimise=result.weight_bytes <= LARGE)
    except ModelError as error:
        raise VerificationError(
            f"ONNX Runtime runs the original, but refuses the result: {error.what}",
            hint="Nothing was written. Another share or other --units leave another graph.",
        ) from error


def measure(
    original: Model,
    result: Model,
    shapes: Shapes,
    compared: Compared | None = None,
    *,
    seed: int = 0,
    threads: int = 1,
    provider: str = "cpu",
    rounds: int = 21,
    scorer: Scorer | None = None,
) -> Verdict:
    """Output difference on the inputs to be ``compared`` on, interleaved latency on random ones, as
    a whole and by operator, and ``scorer``'s accuracy."""
    feeds = random_inputs(original, shapes, seed)
    operators: tuple[Operator, ...] = ()
    if rounds:
        runners, operators = profiled_sessions([original, result], feeds, threads, provider)
    else:
        runners = [session(model, threads, provider) for model in (original, result)]
    compared = compared or Compared("random inputs", [feeds])
    like = likeness(original, result, runners, compared.feeds)
    latency, ratio = None, None
    if rounds:
        timing = time_interleaved(runners, [feeds, fitted(result, feeds)], rounds)
        before, after = timing.median
        latency, ratio = (float(before), float(after)), timing.ratio(1)
    scores = None
    if scorer is not None:
        scores = tuple(scorer(model, threads, provider) for model in (original, result))
    return Verdict(
        output_difference=like.difference,
        compared_on=compared.on,
        unexplained=like.unexplained,
        constant=like.constant,
        latency=latency,
        latency_ratio=ratio,
        accuracy=None if scores is None else (scores[0], scores[1]),
        operators=operators,
    )
