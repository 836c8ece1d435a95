"""Commands about hardware targets: listed, and measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from graphprune.commands.group import cli
from graphprune.flags import output_options, run_options, scope_options
from graphprune.given import scope_of
from graphprune.version import __version__
from graphprune.voice import Voice
from graphprune.wording import counted


@cli.group(invoke_without_command=True)
@output_options
@click.pass_context
def targets(context: click.Context, /, **given: Any) -> None:
    """List the hardware targets; `auto` is this machine's.

    \b
    graphprune targets
    graphprune targets measure -o my-board.toml
    """
    if context.invoked_subcommand is not None:
        return
    from dataclasses import asdict, replace

    from graphprune import api
    from graphprune.targets import detect

    known = api.registry().targets
    lines = [f"{'*' if name == detect() else ' '} {target}" for name, target in known.items()]
    document = {
        "schema": "graphprune.targets/1",
        "graphprune": __version__,
        "auto": detect(),
        "targets": [asdict(replace(target, latency={})) for target in known.values()],
    }
    Voice(given).content("\n".join([*lines, "* what `auto` means here"]), document)


@targets.command()
@click.argument("models", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="The target file."
)
@click.option(
    "--target-hardware",
    "hardware",
    default="auto",
    show_default=True,
    metavar="NAME|FILE.toml",
    help="Whose channel counts to take; its latency_command measures, where it has one.",
)
@scope_options
@run_options
@output_options
def measure(models: tuple[Path, ...], output: Path, hardware: str, **given: Any) -> None:
    """Time the pieces of MODELS (without any: of networks of usual shapes) at the channel counts of
    a grid, and write that as a target file: plans are then made without the device.

    \b
    graphprune targets measure -o my-board.toml
    graphprune targets measure model.onnx -o my-board.toml
    graphprune model.onnx --target-latency 0.5 --target-hardware my-board.toml
    """
    from dataclasses import replace

    import onnx

    from graphprune import api
    from graphprune.output import check_outputs, written_beside
    from graphprune.pace import device_of
    from graphprune.survey import survey
    from graphprune.targets import as_toml, choose

    voice = Voice(given)
    check_outputs(onnx.ModelProto(), output, None)
    for model in models:
        check_outputs(model, output, None)
    base = choose(api.registry().targets, hardware)
    device = device_of(replace(base, latency={}), given["threads"], given["provider"])
    named = [(path.name, str(path)) for path in models]
    found = survey(named, base, device, scope_of(given), voice.stage)
    found = replace(found, name=output.stem, description=device.key)
    with written_beside(output, as_toml(found)):
        pass
    pieces = sum(map(len, found.latency.values()))
    document = {
        "schema": "graphprune.measure/1",
        "graphprune": __version__,
        "output": str(output),
        "entries": pieces,
    }
    forms = counted(len(found.latency), "form")
    voice.content(f"{counted(pieces, 'latency', 'latencies')} of {forms}: {output}", document)
