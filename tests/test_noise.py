"""What draws random numbers at run time can be proved all the same."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from graphs import Builder

from graphprune.api import prune
from graphprune.noise import stilled
from graphprune.runtime import opened, random_inputs
from graphprune.shapes import infer
from graphprune.storage import load

MEAN, SPREAD = 3.0, 0.5


def noisy(operator: str, **attributes: object) -> onnx.ModelProto:
    """A hidden layer of which the model adds noise to the outputs."""
    b = Builder()
    h = b.add("Relu", b.add("Gemm", "x", b.weight(8, 32), b.weight(32)))
    y = b.add("Gemm", h, b.weight(32, 16), b.weight(16))
    noise = b.add(operator, *([y] if operator.endswith("Like") else []), **attributes)
    return b.model({"x": [4, 8]}, {b.add("Add", y, noise): [4, 16]})


FORMS = {
    "RandomNormalLike": {"mean": MEAN, "scale": SPREAD},
    "RandomUniformLike": {"low": MEAN - SPREAD, "high": MEAN + SPREAD},
    "RandomNormal": {"mean": MEAN, "scale": SPREAD, "shape": [4, 16]},
    "RandomUniform": {"low": MEAN - SPREAD, "high": MEAN + SPREAD, "shape": [4, 16]},
}


@pytest.mark.parametrize("operator", FORMS)
def test_half_of_the_work_leaves(operator: str) -> None:
    model = noisy(operator, **FORMS[operator])
    result = prune(model, flops=0.5, round_to=1, min_channels=1, fast=True, measure=False)
    assert result.verdict.passed
    assert operator in [node.op_type for node in result.model.graph.node]


@pytest.mark.parametrize("operator", FORMS)
def test_the_numbers_are_the_same_twice(operator: str) -> None:
    model = load(noisy(operator, **FORMS[operator]))
    shapes = infer(model)
    still = stilled(model, shapes.dtype)
    feeds = random_inputs(model, shapes, 0)
    first, second = opened(still)(feeds)[0], opened(still)(feeds)[0]
    assert np.array_equal(first, second)
    quiet = load(noisy(operator, **{**FORMS[operator], **silence(operator)}))
    noise = first - opened(stilled(quiet, shapes.dtype))(feeds)[0]
    assert np.abs(noise - MEAN).max() <= SPREAD + 1e-5
    assert noise.std() > SPREAD / 2


def silence(operator: str) -> dict[str, float]:
    normal = {"mean": 0.0, "scale": 0.0}
    return normal if "Normal" in operator else {"low": 0.0, "high": 0.0}


def test_without_noise_nothing_changes() -> None:
    b = Builder()
    model = load(b.model({"x": [1, 3, 4, 4]}, {b.conv("x", 3, 4): [1, 4, 4, 4]}))
    assert stilled(model, {}) is model
