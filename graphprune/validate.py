"""Measure the result against the original: law 3, outputs, latency, accuracy."""

from __future__ import annotations

import importlib
import sys
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from graphprune.analysis import Analysis
from graphprune.branches import Branches, rewritten_branches
from graphprune.coupling import Mask
from graphprune.errors import ModelError, UsageError, VerificationError
from graphprune.interface import fitted
from graphprune.model import Array, Model
from graphprune.operators import Operator, profiled_sessions
from graphprune.oracle import Open, compared, law_errors, relative_error, with_outputs
from graphprune.runtime import (
    Feeds,
    input_dtype,
    opened,
    random_inputs,
    run_session,
    session,
    time_interleaved,
)
from graphprune.shapes import Shape, Shapes, declared
from graphprune.survivors import bound_to_sizes, shifted_nodes
from graphprune.unrounded import rounds, unrounded

TOLERANCE = 1e-4  # relative, float32; measured noise of real models is around 1e-6
LOW_PRECISION_TOLERANCE = 2e-2  # float16 and bfloat16 models
LARGER = 32  # a second size for symbolic axes, where the first was small
DAMAGED = (zipfile.BadZipFile, zlib.error)
Scorer = Callable[[Model, int, str], float]  # model, threads, provider → more is better
Run = Callable[[Feeds], list[Array]]
A_SCORE = "A function that gets run(feeds) -> outputs, and gives a number: more is better."
CHUNK = 64  # labelled samples per run where the batch is free


@dataclass(frozen=True)
class Verdict:
    """What was measured; ``None`` where nothing was asked for. Latencies in milliseconds."""

    relative_error: float | None = None
    passed: bool | None = None
    rounding: float | None = None  # the error with rounding, where it was proved without
    shift: float | None = None  # the error where the original takes its statistics over all slots
    output_difference: float | None = None
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
            text += f"; inexact: statistics over what is left move the outputs by {self.shift:.1e}"
        return text


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
    """A model whose weights were rewritten as it was prepared must compute what it did before.

    Raises ``VerificationError`` beyond the tolerance.
    """
    _same(original, analysis.model, analysis, "the prepared model differs from the given one", seed)


def verify_same(model: Model, reordered: Model, analysis: Analysis, seed: int = 0) -> None:
    """Channels in another order must compute what they did before. Raises ``VerificationError``."""
    what = "the model in another order differs"
    _same(model, reordered, analysis, what, seed, any_order=True)


def _same(
    before: Model, after: Model, analysis: Analysis, what: str, seed: int, any_order: bool = False
) -> None:
    """The outputs and what their activations read must agree: that ``any_order``, where channels
    may have moved on the way."""
    shapes = analysis.shapes
    sizes = [shapes.inputs, *other_sizes(shapes)]
    several = [random_inputs(after, replace(shapes, inputs=each), seed) for each in sizes]
    told = compared(before, shapes, after)
    taps = [*told.taps.values()]

    def difference(open_model: Open) -> float:
        first, second = (open_model(with_outputs(m, taps, shapes)) for m in (before, after))
        worst = 0.0
        for i, feeds in enumerate(several):
            try:
                expected = first(fitted(before, feeds))
            except ModelError:
                if i == 0:
                    raise
                continue  # sizes that the model does not take
            actual = second(fitted(after, feeds))
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


def _in_order(arrays: list[Array], last: int) -> list[Array]:
    """The arrays, the ``last`` of them with their numbers sorted."""
    ends = len(arrays) - last
    return [*arrays[:ends], *(np.sort(array, axis=None) for array in arrays[ends:])]


def other_sizes(shapes: Shapes) -> list[dict[str, Shape]]:
    """The same inputs with other values for their symbolic axes: batch 2, and larger ones."""
    if not any(shapes.symbolic.values()):
        return []

    def resized(name: str, shape: Shape) -> Shape:
        axes = shapes.symbolic[name]
        return tuple(
            size if axis not in axes else 2 if axis == 0 else max(2 * size, LARGER)
            for axis, size in enumerate(shape)
        )

    return [{name: resized(name, shape) for name, shape in shapes.inputs.items()}]


def tolerance(analysis: Analysis) -> float:
    low = any(analysis.shapes.dtype.get(a.tensor) in (10, 16) for a in analysis.coupling.parameters)
    return LOW_PRECISION_TOLERANCE if low else TOLERANCE


def compare_outputs(result: Model, runners: tuple[Any, Any], feeds: Feeds) -> float:
    """Largest difference of any output over the largest magnitude of the original's.

    ``runners`` are sessions of the original, which ``feeds`` are for, and of ``result``.
    """
    expected, actual = (
        run_session(runners[0], feeds),
        run_session(runners[1], fitted(result, feeds)),
    )
    names = [value.name for value in result.outputs]
    wanted = fitted(result, dict(zip(names, expected, strict=True)))
    return relative_error([wanted[name] for name in names], actual)


def measure(
    original: Model,
    result: Model,
    shapes: Shapes,
    *,
    seed: int = 0,
    threads: int = 1,
    provider: str = "cpu",
    rounds: int = 21,
    scorer: Scorer | None = None,
) -> Verdict:
    """Output difference on random inputs, interleaved latency, as a whole and by operator, and
    ``scorer``'s accuracy."""
    feeds = random_inputs(original, shapes, seed)
    operators: tuple[Operator, ...] = ()
    if rounds:
        runners, operators = profiled_sessions([original, result], feeds, threads, provider)
    else:
        runners = [session(model, threads, provider) for model in (original, result)]
    difference = compare_outputs(result, (runners[0], runners[1]), feeds)
    latency, ratio = None, None
    if rounds:
        timing = time_interleaved(runners, [feeds, fitted(result, feeds)], rounds)
        before, after = timing.median
        latency, ratio = (float(before), float(after)), timing.ratio(1)
    scores = None
    if scorer is not None:
        scores = tuple(scorer(model, threads, provider) for model in (original, result))
    return Verdict(
        output_difference=difference,
        latency=latency,
        latency_ratio=ratio,
        accuracy=None if scores is None else (scores[0], scores[1]),
        operators=operators,
    )


def read_inputs(path: Path, model: Model, extra: tuple[str, ...] = ()) -> dict[str, Array]:
    """Arrays named by graph input (and ``extra``) from an npz file, in the inputs' types."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            data = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, AttributeError, TypeError, EOFError, *DAMAGED) as error:
        cause = (
            error.strerror if isinstance(error, OSError) and error.strerror else "not an .npz file"
        )
        hint = "Check the path; an .npz file holds arrays named by graph input."
        raise UsageError(f"cannot read arrays from the file: {cause}", str(path), hint) from error
    wanted = {value.name for value in model.inputs} | set(extra)
    if not wanted <= set(data):
        raise UsageError(
            f"the file holds {sorted(data)}",
            str(path),
            f"It needs one array for each of {sorted(wanted)}.",
        )
    for value in model.inputs:
        data[value.name] = _as_input(data[value.name], value, path)
    return data


def _as_input(array: Array, value: onnx.ValueInfoProto, path: Path) -> Array:
    """The array in the input's type; its shape must fit what the input declares."""
    where = f"array {value.name!r} of {path}"
    if array.dtype.kind not in "biuf":
        raise UsageError(f"not numbers but {array.dtype}", where, "Save arrays of numbers.")
    dims = declared(value)
    fits = dims is None or (
        array.ndim == len(dims)
        and all(d is None or d == s for d, s in zip(dims[1:], array.shape[1:], strict=True))
    )
    if not fits:
        raise UsageError(
            f"shape {list(array.shape)} does not fit the declared {dims}",
            where,
            "The first size is the number of samples, the others are the input's.",
        )
    return array.astype(input_dtype(value))


def scorer_of(given: str | Path, original: Model) -> Scorer:
    """How a model is scored: top-1 on an .npz of labelled arrays, or ``module:function``, a Python
    function that gets ``run(feeds) -> outputs`` and returns a number where more is better.

    Raises ``UsageError`` where neither can be read.
    """
    module, colon, name = str(given).partition(":")
    if colon and name.isidentifier() and not Path(given).exists():
        score = _imported(module, name)
        return lambda model, threads, provider: _called(
            score, str(given), running(model, threads, provider)
        )
    labelled = read_labelled(Path(given), original)
    return lambda model, threads, provider: accuracy(
        original, running(model, threads, provider), labelled
    )


def running(model: Model, threads: int, provider: str) -> Run:
    """The model as a function, of feeds that may be those of the model it was cut from."""
    runner = session(model, threads, provider)
    return lambda feeds: run_session(runner, fitted(model, feeds))


def _imported(module: str, name: str) -> Callable[..., object]:
    """The user's function; modules beside the working directory are found too."""
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise UsageError(
            f"cannot import the score: {error}",
            f"--eval {module}:{name}",
            "Give FILE.npz, or MODULE:FUNCTION of a module that Python finds from this folder.",
        ) from error
    finally:
        sys.path.pop(0)
    if not callable(found):
        raise UsageError("the score is no function", f"--eval {module}:{name}", A_SCORE)
    return found  # type: ignore[no-any-return]


def _called(score: Callable[..., object], given: str, run: Run) -> float:
    value = score(run)
    if not isinstance(value, int | float | np.number):
        raise UsageError(f"the score is no number but {value!r}", f"--eval {given}", A_SCORE)
    return float(value)


def read_labelled(path: Path, model: Model) -> dict[str, Array]:
    """Arrays named by graph input, and ``labels``; all of one length."""
    data = read_inputs(path, model, ("labels",))
    if data["labels"].dtype.kind not in "iu":
        raise UsageError(
            f"labels are not whole numbers but {data['labels'].dtype}",
            str(path),
            "A label is the number of a class, counted from 0.",
        )
    lengths = {name: len(array) for name, array in data.items() if array.ndim}
    if len(set(lengths.values())) != 1 or not data["labels"].size:
        hint = "Each array has an entry for each sample, and there is one at least."
        raise UsageError(f"arrays of different lengths: {lengths}", str(path), hint)
    return data


def accuracy(model: Model, run: Run, labelled: Mapping[str, Array]) -> float:
    """Top-1 of the first output over its last axis, in [0, 1]; ``labelled`` is for ``model``."""
    labels = labelled["labels"].reshape(-1)
    batch = _batch(model)
    hits = 0
    for start in range(0, len(labels), batch):
        feeds = {}
        for value in model.inputs:
            chunk = labelled[value.name][start : start + batch]
            short = batch - len(chunk) if declared_batch(model) else 0
            feeds[value.name] = np.concatenate([chunk, chunk[:1].repeat(short, axis=0)])
        answer = run(feeds)[0]
        truth = labels[start : start + batch]
        guess = answer.reshape(len(answer), -1, answer.shape[-1]).argmax(-1)[: len(truth), -1]
        hits += int((guess == truth).sum())
    return hits / len(labels)


def declared_batch(model: Model) -> int | None:
    """The fixed batch size that the first input declares, ``None`` where it is free."""
    dims = declared(model.inputs[0])
    return dims[0] if dims else None


def _batch(model: Model) -> int:
    return declared_batch(model) or CHUNK
