"""The user's samples tried on the model, so that what is wrong with them is said of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from graphprune.errors import ModelError, UsageError
from graphprune.lookups import index_bounds
from graphprune.model import Model
from graphprune.runtime import Feeds, run_session
from graphprune.shapes import Shapes


def tried(runner: Any, model: Model, shapes: Shapes, feeds: Sequence[Feeds], where: str) -> None:
    """Run a session of the model, which runs on random inputs, on the first of ``feeds`` and on
    those with ids beyond its tables. Raises ``UsageError`` where it cannot."""
    for i, hint in _suspects(model, shapes, feeds):
        try:
            run_session(runner, feeds[i])
        except ModelError as error:
            raise refused(error, where, hint) from error


def refused(error: ModelError, where: str, hint: str = "") -> UsageError:
    """What ONNX Runtime said of samples, said of them."""
    said = error.what.split(": ", 1)[-1][:300]
    return UsageError(
        f"the model does not run on these samples: {said}",
        where,
        hint or "Give samples as the model takes them: their sizes, and ids below its tables'.",
    )


def _suspects(model: Model, shapes: Shapes, feeds: Sequence[Feeds]) -> Iterable[tuple[int, str]]:
    """Which feeds to run, and what is likely to be wrong where they fail."""
    bounds = {
        value.name: min(found)
        for value in model.inputs
        if (found := index_bounds(model, shapes, value.name))
    }
    first = ""
    for i in range(len(feeds) if bounds else min(len(feeds), 1)):
        largest = {name: int(np.max(feeds[i][name], initial=0)) for name in bounds}
        over = [name for name, most in largest.items() if most >= bounds[name]]
        for name in over:
            first = (
                f"{name!r} holds ids up to {largest[name]}, and the table that they look up has "
                f"{bounds[name]} rows: ids count from 0."
            )
        if i == 0 or over:
            yield i, first if over else ""
