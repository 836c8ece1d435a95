"""What was given on the command line, as what the API takes. Imports on demand: start fast."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphprune.errors import UsageError

if TYPE_CHECKING:
    from graphprune.analysis import Scope
    from graphprune.options import Options


def default_output(model: Path) -> Path:
    return model.parent / f"{model.stem or 'model'}.pruned.onnx"


def scope_of(given: dict[str, Any]) -> Scope:
    from graphprune.analysis import Scope

    return Scope(
        tuple(given["protect"]),
        tuple(given["only"]),
        dict(given["input_shape"]),
        _listed(given["units"]),
        given["allow_interface_change"],
        given["allow_inexact"],
        lossless=given["lossless"],
    )


def _listed(text: str) -> tuple[str, ...]:
    """Names separated by commas."""
    return tuple(filter(None, map(str.strip, text.split(","))))


def options_of(given: dict[str, Any]) -> Options:
    """Every option of a command that is one of ``Options``, by its name there."""
    from dataclasses import fields

    from graphprune.criteria import Scoring
    from graphprune.options import Options

    if given.get("per_operator") and not given["measure"]:
        raise UsageError(
            "--per-operator needs the latency measurement", hint="Leave out --no-measure."
        )
    chosen = {f.name: given[f.name] for f in fields(Options) if f.name in given}
    calib = given["calib"]
    chosen["calib"] = None if calib in (None, "none") else Path(calib)
    if "units" in given:
        chosen["units"] = _listed(given["units"])
        chosen["input_shapes"] = dict(given["input_shape"])
    if "reduce_" in given:
        names = ("reduce_", "aggregate", "normalise", "seed")
        chosen["scoring"] = Scoring(*(given[name] for name in names))
    return Options(**chosen)
