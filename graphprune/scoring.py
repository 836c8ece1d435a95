"""Accuracy of a model: on labelled arrays from a file, or by a function of the user's."""

from __future__ import annotations

import importlib
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx

from graphprune.calibrate.numbers import as_numbers, rounded, taken_whole
from graphprune.calibrate.trial import refused, tried
from graphprune.errors import ModelError, UsageError
from graphprune.interface import fitted
from graphprune.model import Array, Model
from graphprune.runtime import Feeds, input_dtype, run_session, session
from graphprune.shapes import Shapes
from graphprune.sizes import check_samples, declared
from graphprune.wording import lengths_text

DAMAGED = (zipfile.BadZipFile, zlib.error)
Scorer = Callable[[Model, int, str], float]  # model, threads, provider → more is better
Run = Callable[[Feeds], list[Array]]
A_SCORE = "A function that gets run(feeds) -> outputs, and gives a number: more is better."
CHUNK = 64  # labelled samples per run where the batch is free


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
            f"the file holds {', '.join(sorted(data)) or 'nothing'}",
            str(path),
            f"It needs one array for each of {', '.join(sorted(wanted))}.",
        )
    for value in model.inputs:
        data[value.name] = _as_input(data[value.name], value, path)
    return {name: array for name, array in data.items() if name in wanted}


def _as_input(array: Array, value: onnx.ValueInfoProto, path: Path) -> Array:
    """The array in the input's type; its shape must fit what the input declares."""
    where = f"array {value.name!r} of {path}"
    numbers = as_numbers(array, input_dtype(value), where)
    check_samples(array.shape, value, where)
    return numbers


def check_eval(given: str | Path, original: Model, shapes: Shapes) -> tuple[str, ...]:
    """What to say of ``--eval``; raises what is wrong with it now, not after minutes."""
    scorer_of(given, original)
    notes: tuple[str, ...] = ()
    if Path(given).is_file():
        with np.load(given, allow_pickle=False) as archive:
            stored = {value.name: (archive[value.name], value) for value in original.inputs}
        notes = tuple(
            taken_whole(name, Path(given))
            for name, (array, value) in stored.items()
            if rounded(array, input_dtype(value))
        )
        labelled = read_labelled(Path(given), original)
        runner = session(original, optimise=False)
        tried(runner, original, shapes, [*chunks(original, labelled)], f"--eval {given}")
    return notes


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

    def top_1(model: Model, threads: int, provider: str) -> float:
        run = running(model, threads, provider)
        try:
            return accuracy(original, run, labelled)
        except ModelError as error:
            if model is not original:
                raise
            raise refused(error, f"--eval {given}") from error

    return top_1


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
        said = lengths_text(lengths)
        hint = "Each array has an entry for each sample, and there is one at least."
        raise UsageError(f"arrays of different lengths: {said}", str(path), hint)
    return data


def accuracy(model: Model, run: Run, labelled: Mapping[str, Array]) -> float:
    """Top-1 of the first output over its last axis, in [0, 1]; ``labelled`` is for ``model``."""
    labels = labelled["labels"].reshape(-1)
    batch = _batch(model)
    hits = 0
    for start, feeds in zip(range(0, len(labels), batch), chunks(model, labelled), strict=True):
        answer = run(feeds)[0]
        truth = labels[start : start + batch]
        guess = answer.reshape(len(answer), -1, answer.shape[-1]).argmax(-1)[: len(truth), -1]
        hits += int((guess == truth).sum())
    return hits / len(labels)


def chunks(model: Model, labelled: Mapping[str, Array]) -> Iterator[dict[str, Array]]:
    """The samples in the batches that the model takes; the last one is filled up where it must."""
    batch = _batch(model)
    for start in range(0, labelled["labels"].size, batch):
        feeds = {}
        for value in model.inputs:
            chunk = labelled[value.name][start : start + batch]
            short = batch - len(chunk) if declared_batch(model) else 0
            feeds[value.name] = np.concatenate([chunk, chunk[:1].repeat(short, axis=0)])
        yield feeds


def declared_batch(model: Model) -> int | None:
    """The fixed batch size that the first input declares, ``None`` where it is free."""
    dims = declared(model.inputs[0])
    return dims[0] if dims else None


def _batch(model: Model) -> int:
    return declared_batch(model) or CHUNK
