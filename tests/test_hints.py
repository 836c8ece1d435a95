"""What is wrong, where, and how to go on: the second line of an error says the last."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import Run

PACKAGE = Path(__file__).parents[1] / "graphprune"
NEXT = {
    "a model for a plan": ("apply MODEL MODEL", ["not JSON", "MODEL PLAN", "--plan-out"]),
    "a command mistyped": ("inspct MODEL", ["no command 'inspct'", "`graphprune inspect`"]),
    "a command of nothing": ("magic MODEL", ["no command 'magic'", "graphprune --help"]),
    "no plan": ("apply MODEL nothing.json", ["cannot read the plan", "--plan-out"]),
    "other JSON": ("apply MODEL JSON", ["not a plan", "--plan-out"]),
    "an axis too many": ("explain MODEL c0:7", ["no axis 7", "[16, 3, 3, 3]"]),
    "an index too many": ("explain MODEL c0:0:16", ["no index 16", "0 to 15"]),
    "a score of no module": ("MODEL --eval nothing:score", ["--eval", "FILE.npz"]),
    "no number": ("MODEL --target-flops half", ["--target-flops", "'half' is not a valid number"]),
    "a way to sum": ("MODEL --reduce much", ["'much' is unknown", "One of: sum, mean"]),
    "a spread": ("MODEL --spread wide", ["'wide' is unknown", "One of: auto, solved"]),
    "an input shape": ("MODEL --input-shape x:1,4,8,8", ["[1, 4, 8, 8]", "x:N,3,8,8"]),
    "a gate of labels": ("MODEL --max-accuracy-drop 1", ["labelled data", "--eval FILE.npz"]),
    "a gate of time": ("MODEL --min-speedup 2 --no-measure", ["latency", "out --no-measure"]),
    "a gate of a plan": ("apply MODEL PLAN --min-speedup 2 --no-measure", ["out --no-measure"]),
    "a table of time": ("MODEL --per-operator --no-measure", ["latency", "out --no-measure"]),
    "no target file": ("MODEL --target-hardware no.toml", ["cannot read", "targets measure"]),
    "no TOML": ("MODEL --target-hardware TOML", ["not TOML", "targets measure"]),
    "strangers": ("compare MODEL OTHER", ["other inputs", "made from it"]),
    "an empty size": ("inspect MODEL --input-shape x:0,3,8,8", ["below 1", "1 or more"]),
    "no archive": (
        "compare MODEL MODEL --inputs JSON",
        ["not an .npz file", "named by graph input"],
    ),
}


@pytest.mark.parametrize("name", NEXT)
def test_how_to_go_on(run: Run, small: Path, pinned: Path, name: str) -> None:
    command, words = NEXT[name]
    document = small.with_name("other.json")
    document.write_text('{"schema": "another/1"}')
    toml, plan = small.with_name("other.toml"), small.with_name("plan.json")
    toml.write_text("[")
    if "PLAN" in command:
        assert run(small, "--plan-out", plan, "--quiet", "--no-measure").code == 0
    files = {"MODEL": small, "JSON": document, "TOML": toml, "OTHER": pinned, "PLAN": plan}
    ran = run(*(files.get(word, word) for word in command.split()), "--quiet")
    assert (ran.code, ran.out) == (2, "")
    missing = [word for word in words if word not in ran.err]
    assert not missing, f"{missing} not in {ran.err!r}"


SHOWN = (
    "sound",
    "storage",
    "options",
    "output",
    "plan",
    "plugins",
    "replay",
    "sweep",
    "tables",
    "targets",
)


def without_a_hint(source: str) -> Iterator[str]:
    """What errors raised in ``source`` say that have neither three arguments nor a hint."""
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)):
            continue
        made = node.exc
        name = ast.unparse(made.func)
        hinted = len(made.args) > 2 or any(keyword.arg == "hint" for keyword in made.keywords)
        if name in ("ModelError", "UsageError") and not hinted:
            yield ast.unparse(made.args[0])


@pytest.mark.parametrize("room", SHOWN)
def test_every_error_about_a_file_or_an_option_says_how_to_go_on(room: str) -> None:
    assert not list(without_a_hint((PACKAGE / f"{room}.py").read_text()))


def test_what_has_no_hint_is_found() -> None:
    good = "raise ModelError('a', 'b', 'c')\nraise UsageError('d', hint='e')\nraise ValueError('f')"
    assert not list(without_a_hint(good))
    assert list(without_a_hint("raise ModelError('g', 'h')")) == ["'g'"]
