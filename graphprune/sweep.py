"""Several budgets on one model: one analysis and one set of statistics, many plans, compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx

from graphprune.api import prune_each
from graphprune.clock import Clock, Stage
from graphprune.errors import GraphPruneError, UsageError
from graphprune.output import written_beside
from graphprune.report.operators import held_back_of
from graphprune.report.sweep import sweep_csv, sweep_svg
from graphprune.result import Point, Result, Summary, Sweep

OPTION = {
    "flops": "flops",
    "params": "params",
    "size": "size",
    "memory": "peak_memory",
    "latency": "latency",
}


def sweep(
    model: str | Path | onnx.ModelProto,
    targets: Sequence[float],
    by: str = "flops",
    *,
    output: str | Path | None = None,
    stage: Stage | None = None,
    **options: Any,
) -> Sweep:
    """Prune ``model`` to each of ``targets``, shares in (0, 1] of the kind of cost ``by`` (a key of
    ``OPTION``) that may remain; the other keywords are the fields of ``Options``.

    With ``output``, a folder, the models (``MODEL.pruned-0.5.onnx``, by anything but MACs
    ``MODEL.pruned-params-0.5.onnx``) are written there as they are made, then a table and a plot. A
    target that cannot be met is a point with its ``failure``;
    where not even the largest can be, that error is raised.

    >>> print(sweep("models/fashion_resnet.onnx", [0.3, 0.5, 0.7]))      # doctest: +SKIP
    """
    if by not in OPTION:
        raise UsageError(f"there is no sweep by {by!r}", hint=f"One of: {', '.join(OPTION)}.")
    field = OPTION[by]
    if options.get(field) is not None or options.get("max_drop") is not None:
        given = "--max-drop" if options.get("max_drop") is not None else f"the budget on {by}"
        raise UsageError(f"{given} is what a sweep varies", hint="Leave it out.")
    shares = sorted(set(targets), reverse=True)
    if not shares:
        raise UsageError("a sweep needs targets", hint="For example --targets 0.3,0.5,0.7.")
    folder = None if output is None else _folder(Path(output))
    stem = "model" if isinstance(model, onnx.ModelProto) else Path(model).stem or "model"
    kind = "" if by == "flops" else f"-{by}"  # or another sweep's files would be overwritten
    outputs = [folder and folder / f"{stem}.pruned{kind}-{share:.12g}.onnx" for share in shares]
    clock = Clock(stage)
    made = prune_each(model, [{field: share} for share in shares], outputs, clock, **options)
    points, some = [], None
    for share, path, (outcome, error) in zip(shares, outputs, made, strict=True):
        points.append(_point(share, path, outcome, error))
        if isinstance(outcome, Result):
            some = outcome
    if some is None:  # no plan was made at all
        raise next(point.failure for point in points if point.failure is not None)
    inputs = "random inputs" if some.calibration is None else "calibration inputs"
    shared = clock.spent(besides=sum(sum(point.seconds.values()) for point in points))
    done = Sweep(by, some.before, marked(some.before, points), inputs, shared, cleaned=some.cleaned)
    return done if folder is None else _written(done, folder / f"{stem}.sweep{kind}", stem)


def _point(
    share: float, output: Path | None, outcome: Result | GraphPruneError, error: float | None
) -> Point:
    if isinstance(outcome, GraphPruneError):
        return Point(share, failure=outcome)
    ratio = outcome.verdict.latency_ratio
    return Point(
        share,
        outcome.after,
        None if ratio is None else ratio[0],
        error,
        output,
        outcome.replaced,
        outcome.notes,
        outcome.seconds,
        held_back=held_back_of(outcome),
    )


def marked(before: Summary, points: Sequence[Point]) -> tuple[Point, ...]:
    """The points, those marked that no other one dominates: that is, is at least as fast and as
    near to the original, and better in one of the two. Accuracy says how near where it was scored,
    else the error of the outputs; MACs say how fast where nothing was timed.
    """
    places = [_place(before, point) for point in points]
    known = [place for place in places if place is not None]
    return tuple(
        replace(
            point,
            best=place is not None
            and not any(o != place and o[0] <= place[0] and o[1] <= place[1] for o in known),
        )
        for point, place in zip(points, places, strict=True)
    )


def _place(before: Summary, point: Point) -> tuple[float, float] | None:
    """(time, loss) of a point, less is better in both; ``None`` where either is unknown."""
    if point.after is None:
        return None
    time = point.latency_ratio
    if time is None:
        time = point.after.macs / max(before.macs, 1)
    loss = point.error if point.after.accuracy is None else -point.after.accuracy
    return None if loss is None else (time, loss)


def _folder(path: Path) -> Path:
    """The folder to write to; made where only itself is missing."""
    if path.exists() and not path.is_dir():
        raise UsageError("the output of a sweep is a folder", f"-o {path}", "Name a folder.")
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        cause = f"cannot make the folder: {error.strerror}"
        raise UsageError(cause, f"-o {path}", "Make it first, or name another.") from error
    return path


def _written(done: Sweep, base: Path, stem: str) -> Sweep:
    """The table and the plot beside the models."""
    texts = {".csv": sweep_csv(done), ".svg": sweep_svg(done, stem)}
    paths = []
    for suffix, text in texts.items():
        path = base.with_name(base.name + suffix)
        with written_beside(path, text):
            paths.append(path)
    return replace(done, written=tuple(paths))
