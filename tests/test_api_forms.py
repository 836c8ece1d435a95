"""The Python interface takes what the command line takes, and says what form it wants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from graphs import Builder

import graphprune
from graphprune import Options
from graphprune.errors import UsageError


def test_texts_and_seeds_as_on_the_command_line() -> None:
    options = Options.of(units="channels,heads", protect="stem*", only="a*", seed=3)
    assert options.units == ("channels", "heads")
    assert options.protect == ("stem*",)
    assert options.only == ("a*",)
    assert options.scoring.seed == 3


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"calib": {"x": 1}}, "calib is a dict"),
        ({"input_shapes": "x:1,3"}, "input_shapes is a str"),
        ({"eval_data": 3}, "eval_data is a int"),
    ],
)
def test_other_forms_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Options.of(**given)


def test_a_plan_is_applied_from_its_file(tmp_path: Path) -> None:
    b = Builder()
    y = b.add("MatMul", b.add("Relu", b.add("MatMul", "x", b.weight(8, 32))), b.weight(32, 4))
    model = b.model({"x": [1, 8]}, {y: [1, 4]})
    done = graphprune.prune(model, flops=0.5, fast=True, measure=False, round_to=1)
    path = tmp_path / "plan.json"
    path.write_text(done.plan.to_json())
    assert graphprune.apply(model, path).model == done.model
    assert {"prune", "apply", "Options"} <= set(dir(graphprune))
