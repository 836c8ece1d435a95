"""Commands that make models smaller: prune, sweep, apply."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from graphprune.commands.group import cli
from graphprune.flags import (
    Shares,
    budget_options,
    check_options,
    drop_option,
    output_options,
    place_options,
    plan_options,
    run_options,
    scope_options,
)
from graphprune.given import default_output, options_of
from graphprune.voice import Voice


@cli.command()
@click.argument("model", type=click.Path(path_type=Path))
@budget_options
@drop_option
@plan_options
@scope_options
@place_options
@check_options
@run_options
@output_options
@click.option("--plan-out", type=click.Path(path_type=Path), help="Write the plan as JSON.")
def prune(model: Path, output: Path | None, plan_out: Path | None, **given: Any) -> None:
    """Prune MODEL to a budget and prove the result. Without one only what does nothing leaves.

    \b
    graphprune model.onnx --target-flops 0.5
    graphprune model.onnx --target-flops 0.5 --calib samples.npz
    graphprune model.onnx
    graphprune model.onnx --max-drop 0.01 --eval labelled.npz
    """
    from dataclasses import fields

    from graphprune import api

    say = Voice(given)
    output = output or default_output(model)
    options = options_of(given)
    keywords = {f.name: getattr(options, f.name) for f in fields(options)}
    result = api.prune(model, output=output, plan_out=plan_out, stage=say.stage, **keywords)
    say.result(result, model, output)


@cli.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--targets", type=Shares(), required=True, help="Shares that may remain.")
@click.option(
    "--by",
    default="flops",
    show_default=True,
    type=click.Choice(["flops", "params", "size", "memory", "latency"]),
    help="Of what; the options --target-… hold for every plan besides.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Of the models MODEL.pruned-R.onnx, the table MODEL.sweep.csv and the plot "
    "MODEL.sweep.svg; of other kinds than flops MODEL.pruned-KIND-R.onnx, MODEL.sweep-KIND.csv and "
    "so on.  [default: the model's]",
)
@budget_options
@plan_options
@scope_options
@check_options
@run_options
@output_options
def sweep(
    model: Path,
    targets: tuple[float, ...],
    by: str,
    output: Path | None,
    **given: Any,
) -> int:
    """Prune MODEL to several budgets from one analysis, and compare.

    One set of calibration inputs and statistics serves all. A target out of reach, or stopped by a
    gate, is a row of its own; the others are made, and the exit code is the first one's.

    \b
    graphprune sweep model.onnx --targets 0.3,0.5,0.7
    """
    from dataclasses import fields

    from graphprune.report.sweep import sweep_document, sweep_table
    from graphprune.sweep import sweep as make

    say = Voice(given)
    options = options_of(given)
    keywords = {f.name: getattr(options, f.name) for f in fields(options)}
    folder = model.parent if output is None else output
    made = make(model, targets, by, output=folder, stage=say.stage, **keywords)
    say.content(sweep_table(made), sweep_document(made, model))
    return made.exit_code


@cli.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("plan", type=click.Path(path_type=Path))
@place_options
@check_options
@run_options
@output_options
def apply(model: Path, plan: Path, output: Path | None, **given: Any) -> None:
    """Cut MODEL as PLAN says; a plan made for another model is refused.

    \b
    graphprune model.onnx --target-flops 0.5 --plan-out plan.json
    graphprune apply model.onnx plan.json -o smaller.onnx
    """
    from graphprune import api
    from graphprune.plan import read_plan

    say = Voice(given)
    output = output or default_output(model)
    made = read_plan(plan)
    options = options_of(given)
    result = api.apply(model, made, output=output, stage=say.stage, options=options)
    say.result(result, model, output)
