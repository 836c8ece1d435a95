"""The command that looks at residual blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from graphprune.commands.group import cli
from graphprune.flags import (
    cache_option,
    calib_option,
    input_shape_option,
    only_option,
    output_options,
    protect_option,
    run_options,
    samples_option,
    seed_option,
)
from graphprune.voice import Voice


@cli.command()
@click.argument("model", type=click.Path(path_type=Path))
@calib_option
@samples_option
@seed_option
@protect_option
@only_option
@input_shape_option
@click.option(
    "--measure/--no-measure", default=True, show_default=True, help="The latency of every block."
)
@cache_option
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
