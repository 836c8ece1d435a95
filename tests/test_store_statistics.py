"""Weights that the graph normalises keep the norms that they were given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import Builder

from graphprune.analysis import Scope
from graphprune.api import prepare, prune
from graphprune.model import Model
from graphprune.pipeline import Context, PassResult
from graphprune.storage import load
from graphprune_passes.store_statistics import StoreStatistics


def stored(model: onnx.ModelProto) -> PassResult:
    return StoreStatistics().run(load(model), Context())


def operators(model: Model) -> list[str]:
    return [node.op_type for node in model.nodes]


def standardised(b: Builder, c_in: int, c_out: int) -> str:
    """A weight with mean 0 and variance 1 in each filter, by a batch's statistics."""
    flat = b.add("Reshape", b.weight(c_out, c_in, 3, 3), b.ints(1, c_out, -1))
    ones = b.constant(np.full(c_out, 0.1, np.float32))
    zeros = b.constant(np.zeros(c_out, np.float32))
    parts = b.add("BatchNormalization", flat, ones, zeros, zeros, ones, outputs=3, training_mode=1)
    return str(b.add("Reshape", parts[0], b.ints(c_out, c_in, 3, 3)))


def by_its_parts(b: Builder, c_in: int, c_out: int) -> str:
    """The same by its operators."""
    weight = b.weight(c_out, c_in, 3, 3)
    centred = b.add("Sub", weight, b.add("ReduceMean", weight, axes=[1, 2, 3]))
    variance = b.add("ReduceMean", b.add("Mul", centred, centred), axes=[1, 2, 3])
    small = b.constant(np.float32(1e-5))
    length = b.add("Sqrt", b.add("Add", variance, small))
    return str(b.add("Div", centred, length))


def of_a_length(b: Builder, c_in: int, c_out: int) -> str:
    """A direction and a length for each filter."""
    weight = b.weight(c_out, c_in, 3, 3)
    unit = b.add("Div", weight, b.add("ReduceL2", weight, axes=[1, 2, 3]))
    return str(b.add("Mul", unit, b.weight(c_out, 1, 1, 1)))


FORMS = {"training mode": standardised, "parts": by_its_parts, "length": of_a_length}


def network(form: str) -> onnx.ModelProto:
    """Three convolutions of normalised weights."""
    b, x, c_in = Builder(opset=15), "x", 3
    for c_out in (16, 16, 4):
        x = b.add("Conv", x, FORMS[form](b, c_in, c_out), b.weight(c_out), pads=[1] * 4)
        x = b.add("Relu", x)
        c_in = c_out
    return b.model({"x": [1, 3, 8, 8]}, {x: [1, 4, 8, 8]})


@pytest.mark.parametrize("form", FORMS)
def test_half_of_the_work_leaves(form: str) -> None:
    result = prune(network(form), flops=0.5, round_to=1, min_channels=1, fast=True, measure=False)
    assert result.verdict.passed
    assert result.after.macs <= 0.5 * result.before.macs


@pytest.mark.parametrize("form", FORMS)
def test_what_stays_of_a_weight_is_as_it_was(form: str) -> None:
    """Kernels of the convolution in the middle, by input and output, are the original's."""
    model = network(form)
    least = {"round_to": 1, "min_channels": 1, "repair": "none", "measure": False}
    result = prune(model, flops=0.5, fast=True, **least)
    before, after = (middle(load(m)) for m in (model, result.model))
    assert after.shape[0] * after.shape[1] < before.shape[0] * before.shape[1]
    whole = before.reshape(-1, 9)
    for kernel in after.reshape(-1, 9):
        assert np.isclose(kernel, whole, rtol=1e-5, atol=1e-6).all(axis=1).any()


def middle(model: Model) -> np.ndarray:
    """The weight of the second convolution."""
    convolutions = [node for node in model.nodes if node.op_type == "Conv"]
    return model.array(convolutions[1].input[1])


def test_only_the_statistic_is_stored() -> None:
    """The weight keeps its name, for scores and masks by name."""
    done = stored(network("length"))
    assert "ReduceL2" not in operators(done.model)
    assert operators(done.model).count("Div") == len(done.changes) == 3


def test_a_weight_as_a_product_of_two_stays() -> None:
    b = Builder()
    y = b.add("MatMul", "x", b.add("MatMul", b.weight(16, 2), b.weight(2, 16)))
    assert not stored(b.model({"x": [1, 16]}, {y: [1, 16]})).modified


def test_moved_weights_stay() -> None:
    b = Builder()
    y = b.add("MatMul", "x", b.add("Transpose", b.weight(5, 16), perm=[1, 0]))
    assert not stored(b.model({"x": [1, 16]}, {y: [1, 5]})).modified


def test_what_only_moves_a_weight_stays() -> None:
    """Before and after it is standardised it is reshaped: lists of sizes say nothing of weights."""
    done = stored(network("training mode"))
    assert operators(done.model).count("Reshape") == len(done.changes)


def test_an_output_stays_computed() -> None:
    b = Builder()
    norm = b.add("ReduceSum", b.weight(4, 4), keepdims=0)
    model = b.model({"x": [4]}, {b.add("Mul", "x", norm): [4], norm: []})
    assert not stored(model).modified


def test_positions_beside_values_stay() -> None:
    """The largest of a constant, and where they are."""
    b = Builder()
    largest, where = b.add("TopK", b.weight(8), b.ints(2), outputs=2)
    y = b.add("Add", b.add("Gather", "x", where), largest)
    assert not stored(b.model({"x": [8]}, {y: [2]})).modified


def test_an_operator_without_a_rule() -> None:
    """A determinant of weights is a number."""
    b = Builder()
    y = b.add("Mul", b.conv("x", 3, 4), b.add("Det", b.weight(3, 3)))
    assert "Det" not in operators(stored(b.model({"x": [1, 3, 4, 4]}, {y: [1, 4, 4, 4]})).model)


def test_masks_follow_a_standardised_weight(tmp_path: Path) -> None:
    model = network("training mode")
    weight = model.graph.initializer[0].name
    mask = np.ones((16, 3, 3, 3))
    mask[[2, 5]] = 0
    np.savez(tmp_path / "masks.npz", **{weight: mask})
    result = prune(model, masks=tmp_path / "masks.npz", repair="none", measure=False)
    assert result.verdict.passed
    assert (2, 5) in [group.removed for group in result.plan.groups]


@pytest.mark.parametrize("named", ["square", "nowhere"])
def test_a_pattern_may_name_a_node_that_is_gone(named: str) -> None:
    """It stands for what it read: the weight that a norm is of, what a dead end looked at."""
    b = Builder()
    weight = b.weight(8, 24)
    norm = b.add("ReduceSum", b.add("Mul", weight, weight), b.ints(0))
    h = b.add("MatMul", "x", b.add("Div", weight, b.add("Sqrt", norm)))
    b.add("Exp", h)
    y = b.add("MatMul", b.add("Relu", h), b.weight(24, 4))
    model = b.model({"x": [2, 8]}, {y: [2, 4]})
    for node in model.graph.node:
        node.name = {"Mul": "square", "Exp": "nowhere"}.get(node.op_type, node.name)
    assert "Exp" not in operators(prepare(model).analysis.model)
    assert prepare(model).analysis.coupling.groups
    assert not prepare(model, Scope(protect=(named,))).analysis.coupling.groups
    assert not prepare(model, Scope(only=(named,))).analysis.coupling.groups
