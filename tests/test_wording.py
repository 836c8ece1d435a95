"""How messages put numbers, names and sizes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from graphprune.wording import counted, lengths_text, listed, shape_text

CHOICE = re.compile(r"\w\(e?s\)[ :;,.]")
ROOT = Path(__file__).parents[1]


def test_counted() -> None:
    assert counted(1, "unit") == "1 unit"
    assert [counted(n, "axis", "axes") for n in (0, 2)] == ["0 axes", "2 axes"]
    assert counted(12345, "unit") == "12,345 units"


def test_listed_and_shapes() -> None:
    assert (listed(["a", "b"]), listed([])) == ("a, b", "nothing")
    assert lengths_text({"ids": 4, "mask": 3}) == "ids 4, mask 3"
    assert shape_text([None, 3]) == "[N, 3]"
    assert (shape_text([]), shape_text(None)) == ("[]", "?")


def texts(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_nobody_is_left_to_choose_the_plural() -> None:
    files = [*(ROOT / "graphprune").rglob("*.py"), *(ROOT / "passes").rglob("*.py")]
    assert not [text for file in files for text in texts(file.read_text()) if CHOICE.search(text)]
