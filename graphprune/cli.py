"""The command line: options in, the API, a report out. No logic of its own."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from graphprune.errors import GraphPruneError, UsageError
from graphprune.flags import (
    SEED,
    Shape,
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
from graphprune.version import __version__
from graphprune.voice import Voice

if TYPE_CHECKING:
    from graphprune.options import Options

INTERRUPTED = 130


class PruneByDefault(click.Group):
    """`graphprune model.onnx …` means `graphprune prune model.onnx …`."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.commands:
            args = ["prune", *args]
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own = {"--help", "-h", "--version"}
        if args and args[0].startswith("-") and args[0] not in own:
            args = ["prune", *args]
        return super().parse_args(ctx, args)


@click.group(cls=PruneByDefault, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="graphprune")
def cli() -> None:
    """Make a trained ONNX model physically smaller and faster.

    \b
    graphprune model.onnx --target-flops 0.5

    Exit codes: 0 done; 2 usage or files; 3 invalid or unsupported model; 4 budget not reachable;
    5 verification failed; 6 accuracy gate; 7 latency gate; 8 nothing prunable.
    """


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
    """Prune MODEL to a budget and prove the result.

    \b
    graphprune model.onnx --target-flops 0.5
    graphprune model.onnx --target-flops 0.5 --calib samples.npz
    graphprune model.onnx --max-drop 0.01 --eval labelled.npz
    """
    from dataclasses import fields

    from graphprune import api

    say = Voice(given)
    output = output or _default_output(model)
    options = _prune_options(given)
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
    "MODEL.sweep.svg.  [default: the model's]",
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
    options = _prune_options(given)
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
    output = output or _default_output(model)
    made = read_plan(plan)
    options = _check_options(given)
    result = api.apply(model, made, output=output, stage=say.stage, options=options)
    say.result(result, model, output)


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

    prepared = api.prepare(model, _scope(given))
    say = Voice(given)
    say.content(
        inspection(prepared.analysis),
        inspection_document(prepared.analysis, model, prepared.original_bytes),
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

    analysis = api.prepare(model, _scope(given)).analysis
    text = explain_place(analysis, parse_place(analysis, place))
    document = {"schema": "graphprune.explain/1", "place": place, "lines": text.splitlines()}
    Voice(given).content(text, document)


@cli.command()
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option("--inputs", type=click.Path(path_type=Path), metavar="FILE.npz", help="Given inputs.")
@click.option("--input-shape", multiple=True, type=Shape(), help="Sizes for symbolic inputs.")
@click.option("--seed", default=0, show_default=True, type=SEED, help="For random inputs.")
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
@click.option("--rounds", default=51, show_default=True, type=click.IntRange(5))
@click.option("--input-shape", multiple=True, type=Shape(), help="Sizes for symbolic inputs.")
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
    found = survey(named, base, device, _scope(given), voice.stage)
    found = replace(found, name=output.stem, description=device.key)
    with written_beside(output, as_toml(found)):
        pass
    pieces = sum(map(len, found.latency.values()))
    document = {"schema": "graphprune.measure/1", "output": str(output), "entries": pieces}
    voice.content(f"{pieces} latencies of {len(found.latency)} forms: {output}", document)


def _default_output(model: Path) -> Path:
    return model.parent / f"{model.stem or 'model'}.pruned.onnx"


def _scope(given: dict[str, Any]) -> Any:
    from graphprune.analysis import Scope

    return Scope(
        tuple(given["protect"]),
        tuple(given["only"]),
        dict(given["input_shape"]),
        _listed(given["units"]),
        given["allow_interface_change"],
        given["allow_inexact"],
    )


def _listed(text: str) -> tuple[str, ...]:
    """Names separated by commas."""
    return tuple(filter(None, map(str.strip, text.split(","))))


def _check_options(given: dict[str, Any]) -> Options:
    from graphprune.options import Options

    names = ("verify", "measure", "eval_data", "max_accuracy_drop", "min_speedup", "memory")
    calib = given["calib"]
    if given.get("per_operator") and not given["measure"]:
        raise UsageError("--per-operator needs the latency measurement")
    return Options(
        **{name: given[name] for name in (*names, "cache")},
        calib=None if calib in (None, "none") else Path(calib),
        threads=given["threads"],
        provider=given["provider"],
    )


def _prune_options(given: dict[str, Any]) -> Options:
    from dataclasses import replace

    from graphprune.criteria import Scoring

    names = (
        "flops",
        "params",
        "size",
        "peak_memory",
        "latency",
        "latency_ms",
        "max_drop",
        "criterion",
        "repair",
        "fast",
        "samples",
        "preprocess",
        "search",
        "spread",
        "hardware",
        "round_to",
        "min_channels",
        "allow_miss",
        "allow_interface_change",
        "allow_inexact",
    )
    return replace(
        _check_options(given),
        **{name: given[name] for name in names if name in given},
        scoring=Scoring(given["reduce_"], given["aggregate"], given["normalise"], given["seed"]),
        protect=tuple(given["protect"]),
        only=tuple(given["only"]),
        units=_listed(given["units"]),
        input_shapes=dict(given["input_shape"]),
    )


def main() -> None:
    """Entry point: every expected error is one message and its exit code."""
    try:
        code = cli.main(standalone_mode=False)
        sys.stdout.flush()
        if code:
            sys.exit(code)
    except GraphPruneError as error:
        notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", ()))
        click.echo(f"graphprune: error: {error}{notes}", err=True)
        sys.exit(error.exit_code)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.Abort:
        click.echo("graphprune: interrupted; nothing was written", err=True)
        sys.exit(INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(UsageError.exit_code)
    except BrokenPipeError:  # the reader has seen enough; Python's own flush must not complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        sys.stdout = None  # its flush at exit would fail once more
        click.echo(f"graphprune: error: cannot write the report: {error.strerror}", err=True)
        sys.exit(UsageError.exit_code)
    except MemoryError:
        click.echo("graphprune: error: out of memory", err=True)
        sys.exit(GraphPruneError.exit_code)


if __name__ == "__main__":
    main()
