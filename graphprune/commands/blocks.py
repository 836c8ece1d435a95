"""The command that looks at residual blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from graphprune.commands.group import cli
from graphprune.flags import SEED, Shape, output_options, run_options
from graphprune.voice import Voice


@cli.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--calib",
    metavar="FILE.npz|FOLDER|none",
    help="Calibration inputs, as for prune.  [default: none: made up from the model]",
)
@click.option("--samples", type=click.IntRange(1), help="How many of them.")
@click.option("--seed", default=0, show_default=True, type=SEED, help="For what is made up.")
@click.option("--protect", multiple=True, metavar="PATTERN", help="Keep these blocks.")
@click.option("--only", multiple=True, metavar="PATTERN", help="Nothing but these may leave.")
@click.option("--input-shape", multiple=True, type=Shape(), help="Sizes for symbolic inputs.")
@click.option("--measure/--no-measure", default=True, help="The latency of every block.")
@click.option("--cache/--no-cache", default=True, help="Keep statistics beside the model.")
@run_options
@output_options
def blocks(model: Path, **given: Any) -> None:
    """List the residual blocks of MODEL: what each costs and what the outputs lose without it.

    \b
    graphprune blocks model.onnx --calib samples.npz
    graphprune model.onnx --units channels,heads,blocks --target-latency 0.7
    """
    from graphprune.criteria import Scoring
    from graphprune.depth import depth
    from graphprune.options import Options
    from graphprune.report.blocks import blocks_document, blocks_table

    say = Voice(given)
    calib = given["calib"]
    options = Options(
        calib=None if calib in (None, "none") else Path(calib),
        samples=given["samples"],
        scoring=Scoring(seed=given["seed"]),
        protect=given["protect"],
        only=given["only"],
        criterion="obspa",  # what looks at inputs
        units=("blocks",),
        input_shapes=dict(given["input_shape"]),
        measure=given["measure"],
        cache=given["cache"],
        threads=given["threads"],
        provider=given["provider"],
    )
    found = depth(model, options, stage=say.stage)
    say.content(blocks_table(found), blocks_document(found, model))
