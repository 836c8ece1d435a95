"""The options of the commands, declared once: names, types, defaults and help."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    NamedSizes = click.ParamType[tuple[str, tuple[int, ...]]]
    Numbers = click.ParamType[tuple[float, ...]]
else:  # before click 8.4 it is no generic
    NamedSizes = Numbers = click.ParamType


class Shape(NamedSizes):
    name = "NAME:1,3,224,224"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, tuple[int, ...]]:
        name, _, sizes = str(value).rpartition(":")
        if not name:
            self.fail(f"{value!r} is not NAME:1,3,224,224", param, ctx)
        try:
            return name, tuple(int(size) for size in sizes.split(","))
        except ValueError:
            self.fail(f"{value!r} is not NAME:1,3,224,224", param, ctx)


class Number(click.FloatRange):
    name = "number"


class Shares(Numbers):
    name = "R,R,…"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[float, ...]:
        try:
            shares = tuple(float(share) for share in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not like 0.3,0.5,0.7", param, ctx)
        if not all(0 < share <= 1 for share in shares):
            self.fail(f"{value!r}: shares are above 0 and at most 1", param, ctx)
        return shares


def _options(*decorators: Callable[..., Any]) -> Callable[..., Any]:
    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


def _share(option: str, name: str, what: str) -> Callable[..., Any]:
    return click.option(option, name, type=Number(0, 1, min_open=True), metavar="R", help=what)


# Options that several commands have.
protect_option = click.option(
    "--protect", multiple=True, metavar="PATTERN", help="Keep nodes or tensors whole; repeatable."
)
only_option = click.option(
    "--only", multiple=True, metavar="PATTERN", help="Prune nothing but these; repeatable."
)
input_shape_option = click.option(
    "--input-shape", multiple=True, type=Shape(), help="Sizes for symbolic inputs; repeatable."
)
seed_option = click.option(
    "--seed",
    default=0,
    show_default=True,
    type=click.IntRange(0),
    help="For random scores and inputs.",
)
calib_option = click.option(
    "--calib",
    metavar="FILE.npz|FOLDER|none",
    help="Calibration inputs without labels: arrays named by graph input, or a folder of "
    "pictures.  [default: none: made up from the model]",
)
samples_option = click.option(
    "--samples",
    type=click.IntRange(1),
    metavar="N",
    help="Calibration inputs at most.  [default: 64 to 512, by the model's MACs]",
)
cache_option = click.option(
    "--cache/--no-cache", default=True, show_default=True, help="Keep statistics beside the model."
)

scope_options = _options(
    protect_option,
    only_option,
    click.option(
        "--units",
        default="channels,heads",
        show_default=True,
        metavar="KIND,…",
        help="What may leave. heads: whole attention heads (of grouped queries a KV head with its "
        "query heads); head-dims: the same positions of every head, wherever whole heads do not "
        "leave; blocks: residual blocks y = x + F(x), of which x stays; ranks: layers may become "
        "two of a lower rank where that does less damage; experts: those of mixtures, with their "
        "place in the router; channels: all else.",
    ),
    input_shape_option,
    click.option(
        "--allow-interface-change",
        is_flag=True,
        help="Let states among the graph's inputs and outputs lose slots: KV caches, recurrent "
        "states. These are inputs of what weights of the model otherwise make, and outputs tied to "
        "such; the first input and the first output never change, nor what is tied to them.",
    ),
    click.option(
        "--allow-inexact",
        is_flag=True,
        help="Let slots leave that a normalisation or the like takes statistics over, such as the "
        "width of a transformer: removing them is not the same as zeroing them.",
    ),
    click.option(
        "--lossless/--no-lossless",
        default=True,
        show_default=True,
        help="First remove what does nothing: dead, constant and duplicate channels, heads and "
        "hidden units, branches of zeros. Without a budget that is all.",
    ),
)
run_options = _options(
    click.option(
        "--threads",
        default=1,
        show_default=True,
        type=click.IntRange(0, 256),
        help="ONNX Runtime threads; 0: its own choice.",
    ),
    click.option("--provider", default="cpu", show_default=True, help="Execution provider."),
)
output_options = _options(
    click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout."),
    click.option("--quiet", is_flag=True, help="Nothing but errors."),
)
place_options = _options(
    click.option(
        "-o", "--output", type=click.Path(path_type=Path), help="Default: MODEL.pruned.onnx."
    ),
    click.option(
        "--per-operator", is_flag=True, help="Also a table of the time by type of operator."
    ),
)
check_options = _options(
    click.option(
        "--verify/--no-verify",
        default=True,
        show_default=True,
        help="Prove the cut in ONNX Runtime.",
    ),
    click.option(
        "--measure/--no-measure",
        default=True,
        show_default=True,
        help="Latency and output difference.",
    ),
    click.option(
        "--eval",
        "eval_data",
        metavar="FILE.npz",
        help="Arrays named by graph input, and `labels`: top-1 before and after. Or the score of a "
        "Python MODULE:FUNCTION that gets run(feeds) -> outputs.",
    ),
    calib_option,
    click.option(
        "--memory",
        default=4.0,
        show_default=True,
        type=Number(0.05),
        metavar="GB",
        help="Of activations held at a time; more goes to disk.",
    ),
    cache_option,
    click.option(
        "--max-accuracy-drop",
        type=Number(0),
        metavar="POINTS",
        help="Gate: else exit 6.",
    ),
    click.option("--min-speedup", type=float, metavar="X", help="Gate: exit 7 below it."),
)

budget_options = _options(
    _share("--target-flops", "flops", "Share of the MACs that may remain."),
    _share("--target-params", "params", "Share of the parameters."),
    _share("--target-size", "size", "Share of the file's bytes."),
    _share("--target-memory", "peak_memory", "Share of the activations' bytes in use at once."),
    _share(
        "--target-latency",
        "latency",
        "Share of the latency, with --provider, --threads and --input-shape; measured against "
        "the original and within 3 %, else exit 7 (too slow) or 4.",
    ),
    click.option(
        "--target-latency-ms",
        "latency_ms",
        type=Number(0, min_open=True),
        metavar="X",
        help="The same in milliseconds.",
    ),
)
drop_option = _options(
    click.option(
        "--max-drop",
        type=Number(0, min_open=True),
        metavar="D",
        help="Instead of a share: the smallest model that loses at most D of the --eval score "
        "(0.01: one point), or of the outputs (relative error) without it.",
    ),
)
plan_options = _options(
    click.option(
        "--criterion",
        help="obspa, wanda, flap, variance (on calibration inputs), l1, l2, fpgm, lamp, bn-scale, "
        "dfpc, random (on weights), or a plug-in's.  [default: obspa; l1 with --fast]",
    ),
    click.option(
        "--scores",
        type=click.Path(path_type=Path),
        metavar="FILE.npz",
        help="Scores instead of a criterion: an array for each parameter, or for each group of "
        "`graphprune inspect` one number for each unit.",
    ),
    click.option(
        "--masks",
        type=click.Path(path_type=Path),
        metavar="FILE.npz",
        help="Masks instead of a criterion and a budget: 1 stays, 0 leaves; named as --scores.",
    ),
    click.option(
        "--resolve",
        metavar="HOW",
        help="Where masks of one unit disagree: it leaves if any says so (union), only if all do "
        "(intersection), or that is an error.  [default: error]",
    ),
    click.option(
        "--repair",
        help="obs, bias (on calibration inputs), moments, udfc (on weights), none, or a plug-in's."
        "  [default: obs; moments with --fast]",
    ),
    click.option(
        "--refine",
        type=click.IntRange(0),
        metavar="STEPS",
        help="After the repair, tune scales and shifts of all layers together by so many steps of "
        "gradient towards the original's outputs.  [default: 80 with --calib and --repair obs but "
        "for very large models, else 0]",
    ),
    click.option("--fast", is_flag=True, help="Look at weights alone: seconds, less accurate."),
    samples_option,
    click.option(
        "--preprocess",
        metavar="TEXT",
        help='From pixels to inputs: "mean=0.485,0.456,0.406;std=...;scale=1/255;layout=nchw;'
        'size=224".  [default: inferred from the model]',
    ),
    click.option(
        "--unconstrained",
        is_flag=True,
        help="Let each reader of a shared tensor (a residual stream, a concatenation, Q and K and "
        "V) keep its own channels, where that gives up less than one set for all; else refused.",
    ),
    click.option(
        "--search",
        default=0,
        show_default=True,
        type=click.IntRange(0),
        metavar="N",
        help="Also try N plans near the optimum on inputs held out; keep the best.",
    ),
    click.option(
        "--reduce",
        "reduce_",
        default="sum",
        show_default=True,
        help="Elements to a unit: sum, mean, l1, l2.",
    ),
    click.option(
        "--aggregate",
        default="mean",
        show_default=True,
        help="Weights of a group: sum, mean, max, prod, producers, consumers.",
    ),
    click.option(
        "--normalise",
        help="Across groups: none, sum, mean, max, standardise, lamp.  [default: the criterion's]",
    ),
    click.option(
        "--spread",
        default="auto",
        show_default=True,
        help="Solve for the least distortion (solved), or rank steps by score (global), by share "
        "taken (uniform), by both (balanced). auto: solved where inputs are looked at.",
    ),
    click.option(
        "--target-hardware",
        "hardware",
        default="auto",
        show_default=True,
        help="Grid of channel counts: auto, a name of `graphprune targets`, or FILE.toml.",
    ),
    click.option("--round-to", type=click.IntRange(1), metavar="N", help="Multiples of N instead."),
    click.option(
        "--min-channels", type=click.IntRange(1), metavar="N", help="Every layer keeps at least N."
    ),
    click.option(
        "--allow-miss",
        is_flag=True,
        help="Come as near as possible where a budget is out of reach.",
    ),
    seed_option,
)
