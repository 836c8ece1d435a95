"""Commands that only look at models: inspect, explain, compare, bench."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from graphprune.commands.group import cli
from graphprune.flags import (
    input_shape_option,
    output_options,
    run_options,
    scope_options,
    seed_option,
)
from graphprune.given import scope_of
from graphprune.version import __version__
from graphprune.voice import Voice


@cli.command()
@click.argument("model", type=click.Path(path_type=Path))
@scope_options
@output_options
def inspect(model: Path, **given: Any) -> None:
    """Show groups, units, costs and pins of MODEL.

    \b
    graphprune inspect model.onnx
    """
    from graphprune import api
    from graphprune.report.document import inspection_document
    from graphprune.report.terminal import inspection

    prepared = api.prepare(model, scope_of(given))
    say = Voice(given)
    cleaned = prepared.cleaned if given["lossless"] else None
    say.content(
        inspection(prepared),
        inspection_document(prepared, model, cleaned),
    )


@cli.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("place", metavar="TENSOR[:AXIS[:INDEX]]")
@scope_options
@output_options
def explain(model: Path, place: str, **given: Any) -> None:
    """Say which group an axis belongs to and through what, or the path that pins it.

    \b
    graphprune explain model.onnx conv1.weight:0
    """
    from graphprune import api
    from graphprune.explain import explain as explain_place
    from graphprune.explain import parse_place

    analysis = api.prepare(model, scope_of(given)).analysis
    text = explain_place(analysis, parse_place(analysis, place))
    document = {
        "schema": "graphprune.explain/1",
        "graphprune": __version__,
        "model": str(model),
        "place": place,
        "lines": text.splitlines(),
    }
    Voice(given).content(text, document)


@cli.command()
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option("--inputs", type=click.Path(path_type=Path), metavar="FILE.npz", help="Given inputs.")
@input_shape_option
@seed_option
@output_options
def compare(a: Path, b: Path, inputs: Path | None, **given: Any) -> None:
    """Compare structure, MACs and outputs of two models on the same inputs.

    \b
    graphprune compare model.onnx model.pruned.onnx
    """
    from graphprune import comparison
    from graphprune.report.terminal import comparison_table

    rows, document = comparison.compare(
        a, b, inputs=inputs, input_shapes=dict(given["input_shape"]), seed=given["seed"]
    )
    Voice(given).content(comparison_table(rows), document)


@cli.command()
@click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--rounds", default=51, show_default=True, type=click.IntRange(5), help="Runs of each model."
)
@input_shape_option
@run_options
@output_options
def bench(models: tuple[Path, ...], rounds: int, **given: Any) -> None:
    """Time models in ONNX Runtime, interleaved; ratios are to the first one.

    \b
    graphprune bench model.onnx model.pruned.onnx --threads 1
    """
    from graphprune import comparison
    from graphprune.report.document import timing_document
    from graphprune.report.terminal import timing_table

    timing = comparison.bench(
        models,
        rounds=rounds,
        threads=given["threads"],
        provider=given["provider"],
        input_shapes=dict(given["input_shape"]),
    )
    names = [str(model) for model in models]
    Voice(given).content(timing_table(names, timing), timing_document(names, timing))
