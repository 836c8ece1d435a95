"""Parameters are counted as they are stored, once, and the same way before and after."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from command_line import FINE, WEIGHTS, Run, read_json
from graphs import Builder
from onnx import TensorProto, helper

from graphprune import api

FLOATS = (TensorProto.FLOAT,)
LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"


def stored(model: onnx.ModelProto) -> int:
    """Elements of float tensors in the file: initialisers, Constant nodes, bodies of both."""

    def of(graph: onnx.GraphProto) -> int:
        total = sum(int(np.prod(t.dims)) for t in graph.initializer if t.data_type in FLOATS)
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("t") and attribute.t.data_type in FLOATS:
                    total += int(np.prod(attribute.t.dims))
                if attribute.HasField("g"):
                    total += of(attribute.g)
        return total

    return of(model.graph)


def one_vector_for_all() -> onnx.ModelProto:
    """Three layers of 64 channels share one bias: each layer is cut otherwise."""
    b = Builder()
    bias = b.weight(64)
    x = "x"
    for _ in range(3):
        x = b.add("Relu", b.add("Add", b.add("MatMul", x, b.weight(64, 64)), bias))
    y = b.add("MatMul", x, b.weight(64, 8))
    return b.model({"x": ["n", 64]}, {y: ["n", 8]})


def constants() -> onnx.ModelProto:
    """The same with weights in Constant nodes."""
    model = one_vector_for_all()
    nodes = [helper.make_node("Constant", [], [t.name], value=t) for t in model.graph.initializer]
    nodes += model.graph.node
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    return model


@pytest.mark.parametrize("make", [one_vector_for_all, constants])
@pytest.mark.parametrize("lossless", ["--lossless", "--no-lossless"])
@pytest.mark.parametrize("share", [1, 0.6, 0.3])
def test_a_budget_holds_by_what_is_reported_and_stored(
    run: Run, tmp_path: Path, make: Callable[[], onnx.ModelProto], lossless: str, share: float
) -> None:
    model = make()
    path, out = tmp_path / "model.onnx", tmp_path / "out.onnx"
    onnx.save(model, path)
    asked = ("--target-params", share, lossless, *WEIGHTS, *FINE)
    ran = run(path, *asked, "-o", out, "--no-measure", "--json")
    document = read_json(ran.out)
    assert document["before"]["params"] == stored(model)
    assert document["after"]["params"] == stored(onnx.load(out))
    assert document["ratio"]["params"] <= share
    inspected = read_json(run("inspect", path, "--no-lossless", "--json").out)
    compared = read_json(run("compare", path, out, "--json").out)
    assert inspected["params"] == compared["a"]["params"] == stored(model)
    assert compared["b"]["params"] == stored(onnx.load(out))


def test_a_repair_that_adds_biases_stays_within_the_budget(run: Run, tmp_path: Path) -> None:
    """Layers without a bias gain one: what the file then holds counts."""
    b = Builder()
    x = "x"
    for _ in range(4):
        x = b.add("Relu", b.add("MatMul", x, b.weight(16, 16)))
    y = b.add("MatMul", x, b.weight(16, 8))
    path, out = tmp_path / "model.onnx", tmp_path / "out.onnx"
    onnx.save(b.model({"x": ["n", 16]}, {y: ["n", 8]}), path)
    for share in (0.4, 0.5, 0.6, 0.7):
        asked = ("--target-params", share, *FINE, "--samples", 64)
        document = read_json(run(path, *asked, "-o", out, "--no-measure", "--json").out)
        assert document["after"]["params"] == stored(onnx.load(out))
        assert document["ratio"]["params"] <= share


def test_weights_that_are_filled_in_count() -> None:
    path = LIGHT / "light_squeezenet.onnx"
    if not path.is_file():
        pytest.skip("this onnx package has no light models")
    result = api.prune(path, flops=0.5, fast=True, measure=False)
    assert result.before.params > 1e6
    assert 0.2 < result.after.params / result.before.params < 0.9
