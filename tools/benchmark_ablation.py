"""What each ingredient of accuracy without training is worth: take one away, prune, evaluate.

    python tools/benchmark_ablation.py MODEL.onnx --calib FILE.npz --eval FILE.npz [--only A,B]

The first row is the default on the given samples. Every other row changes one thing. Ingredients
that are no options of the program are taken away here, by replacing a function of it.
"""

from __future__ import annotations

import argparse
import importlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from rich.console import Console
from rich.table import Table

from graphprune import api
from graphprune.calibrate import synthesise
from graphprune.calibrate.taps import tapped
from graphprune.least_squares import Ridged, offset
from graphprune.linear import linears
from graphprune.oracle import sliced
from graphprune.repair import sites
from graphprune.repair.damage import Damage
from graphprune.runtime import run_session, session

module = importlib.import_module("graphprune.repair.reconstruct")
Patches = Callable[[], Any]


@contextmanager
def without_sum() -> Iterator[None]:
    """Operators before a residual sum match their own output, not the sum."""
    site_of = module.site_of

    def own(model: Any, shapes: Any, linear: Any, *rest: Any) -> Any:
        found = site_of(model, shapes, linear, *rest)
        return replace(found, target=linear.y, stream=None)

    with patch.object(module, "site_of", own):
        yield


@contextmanager
def without_relu() -> Iterator[None]:
    """Targets below zero are matched like all others."""
    site_of = module.site_of
    with patch.object(module, "site_of", lambda *a: replace(site_of(*a), rectified=False)):
        yield


@contextmanager
def ridge_to_zero() -> Iterator[None]:
    """The ridge pulls weights towards zero, not towards the sliced weights."""
    solved, best = Ridged.solved, module.best_ridge
    with (
        patch.object(Ridged, "solved", lambda self, m, w: solved(self, m, 0 * w)),
        patch.object(module, "best_ridge", lambda f, h, w: best(f, h, 0 * w)),
    ):
        yield


@contextmanager
def fixed_ridge() -> Iterator[None]:
    """One ridge for all operators, none chosen on samples held out."""
    with patch.object(module, "best_ridge", lambda f, h, w: 1e-2):
        yield


@contextmanager
def statistics_matched() -> Iterator[None]:
    """Outputs get the variance of the original's, which a least-squares fit shrinks."""
    solved = Ridged.solved

    def rescaled(self: Ridged, moments: Any, weights: Any) -> Any:
        matrix, _ = solved(self, moments, weights)
        variance = np.einsum("gmd,gmd->gm", matrix @ moments.xx, matrix)
        matrix = matrix * np.sqrt(moments.tt / np.maximum(variance, 1e-12))[:, :, None]
        return matrix, offset(moments, matrix)

    with patch.object(Ridged, "solved", rescaled):
        yield


@contextmanager
def without_bias() -> Iterator[None]:
    """Weights alone are solved: inputs and targets are not centred."""
    old: list[Any] = []

    def raw(moments: Any) -> Any:
        return replace(
            moments,
            xx=moments.xx + moments.mean_x[:, :, None] * moments.mean_x[:, None, :],
            tx=moments.tx + (moments.mean_t - old[-1])[:, :, None] * moments.mean_x[:, None, :],
        )

    class Plain(Ridged):
        def __init__(self, moments: Any, ridge: float) -> None:
            super().__init__(raw(moments), ridge)

        def solved(self, moments: Any, weights: Any) -> Any:
            return super().solved(raw(moments), weights)[0], old[-1]

    repaired = module._repaired

    def noting(damage: Any, work: Any, site: Any, *rest: Any) -> Any:
        matrix = site.linear.matrix(work)
        old.append(site.linear.offset(work, matrix.shape[0] * matrix.shape[1]))
        return repaired(damage, work, site, *rest)

    with patch.object(module, "Ridged", Plain), patch.object(module, "_repaired", noting):
        yield


@contextmanager
def symmetric() -> Iterator[None]:
    """Inputs are those of the original, sliced: errors from upstream are not seen."""
    rows, seen = sites.rows_of, {}

    def original_inputs(damage: Damage) -> dict[str, list[Any]]:
        if id(damage) not in seen:
            names = sorted({linear.x for linear in linears(damage.original)})
            inner = [n for n in names if n in damage.original.producer]
            runner = session(tapped(damage.original, inner, damage.shapes))
            outputs = [run_session(runner, damage.feeds[i]) for i in range(len(damage.feeds))]
            seen[id(damage)] = dict(zip(inner, zip(*outputs, strict=True), strict=True))
        return seen[id(damage)]

    class Original:
        """Stands in for the pruned model's frontier."""

        def __init__(self, damage: Damage, after: Any) -> None:
            self.damage, self.after, self.chunks = damage, after, after.chunks

        def __getitem__(self, name: str) -> Any:
            found = original_inputs(self.damage).get(name)
            if found is None:
                return self.after[name]
            d = self.damage
            return [sliced({name: a}, d.coupling, d.alive)[name] for a in found]

    def replaced(damage: Damage, site: Any, before: Any, after: Any, chunk: int) -> Any:
        plain = replace(site, target=site.linear.y, stream=None)
        return rows(damage, plain, before, Original(damage, after), chunk)

    with without_sum(), patch.object(sites, "rows_of", replaced):
        yield


@dataclass(frozen=True)
class Row:
    """What is changed: options, calibration inputs by kind, or a patch."""

    ingredient: str
    change: str
    options: dict[str, Any] = field(default_factory=dict)
    kind: str | None = None
    patched: Patches | None = None


ROWS = (
    Row("–", "nothing: the default without --refine"),
    Row("selection", "l1", {"criterion": "l1"}),
    Row("selection", "wanda", {"criterion": "wanda"}),
    Row("selection", "flap", {"criterion": "flap"}),
    Row("selection", "random", {"criterion": "random"}),
    Row("allocation", "ranked, balanced", {"spread": "balanced"}),
    Row("allocation", "uniform", {"spread": "uniform"}),
    Row("allocation", "also 8 plans searched", {"search": 8}),
    Row("grid", "multiples of 1", {"round_to": 1}),
    Row("repair", "none", {"repair": "none"}),
    Row("repair", "bias", {"repair": "bias"}),
    Row("repair", "moments", {"repair": "moments"}),
    Row("repair", "udfc", {"repair": "udfc"}),
    Row("asymmetric target", "inputs of the original", patched=symmetric),
    Row("affine term", "weights alone", patched=without_bias),
    Row("ridge target", "zero", patched=ridge_to_zero),
    Row("ridge", "0.01 for all", patched=fixed_ridge),
    Row("statistics of producers", "variance restored", patched=statistics_matched),
    Row("residual sums", "own outputs matched", patched=without_sum),
    Row("Relu", "all targets matched", patched=without_relu),
    Row("tuned as a whole", "80 steps", {"refine": 80}),
    Row("inputs", "white noise", kind="white"),
    Row("inputs", "1/f noise", kind="pink"),
    Row("inputs", "dead leaves", kind="dead-leaves"),
    Row("inputs", "crops of photographs", kind="crops"),
    Row("inputs", "leaves and crops", kind="mixture"),
    Row("inputs", "the default without data", kind="default"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--eval", type=Path, required=True, dest="labelled")
    parser.add_argument("--target-flops", type=float, default=0.5)
    parser.add_argument("--only", help="comma-separated ingredients; the default is always run")
    given = parser.parse_args()
    wanted = given.only.split(",") if given.only else [row.ingredient for row in ROWS]
    table = Table(title=f"{given.model.stem}, {given.target_flops:g} of the MACs, top-1 in %")
    for name in ("ingredient", "instead", "top-1", "against the default"):
        table.add_column(name, justify="left" if name in ("ingredient", "instead") else "right")
    console = Console(width=100)
    first = None
    for row in ROWS:
        if row is not ROWS[0] and row.ingredient not in wanted:
            continue
        with tempfile.TemporaryDirectory() as work:
            top = 100 * measured(given, row, Path(work))
        first = top if first is None else first
        console.print(f"{row.ingredient}: {row.change}: {top:.2f}")
        table.add_row(row.ingredient, row.change, f"{top:.2f}", f"{top - first:+.2f}")
    console.print(table)


def measured(given: argparse.Namespace, row: Row, work: Path) -> float:
    calib = made(given, row.kind, work) if row.kind else given.calib
    needs = row.options.get("repair") in ("none", "moments", "udfc") and "criterion" in row.options
    options = {"calib": None if needs else calib, "refine": 0, **row.options}
    with ExitStack() as stack:
        if row.patched is not None:
            stack.enter_context(row.patched())
        result = api.prune(
            given.model,
            flops=given.target_flops,
            eval_data=given.labelled,
            measure=False,
            verify=False,
            **options,
        )
    assert result.after.accuracy is not None
    return result.after.accuracy


def made(given: argparse.Namespace, kind: str, work: Path) -> Path | None:
    """Inputs of that kind as a file; ``None`` leaves them to the program."""
    if kind == "default":
        return None
    analysis = api.prepare(given.model).analysis
    samples = synthesise(analysis.model, analysis.shapes, 512, 0, kind)
    path = work / f"ablation_{kind}.npz"
    np.savez(path, **samples.read(0, samples.count))
    return path


if __name__ == "__main__":
    main()
