"""Facts hold: every tensor of a run lies in its bounds, and slices of one kind are equal."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from graphs import Builder, attention, random_cnn

from graphprune import api
from graphprune.analysis import Scope
from graphprune.facts import Fact, facts_of
from graphprune.facts.linear import rows_of
from graphprune.model import Array, Model
from graphprune.oracle import with_outputs
from graphprune.runtime import opened, random_inputs
from graphprune.shapes import Shapes
from graphprune.validate import verify_normal


def checked(model: onnx.ModelProto) -> int:
    """How many elements were known beforehand; what is said of them must be true."""
    analysis = api.prepare(model, Scope(lossless=False)).analysis
    facts = facts_of(analysis.model, analysis.shapes)
    known = 0
    values = _all_values(analysis.model, analysis.shapes)
    for name, value in values.items():
        if (fact := facts.of(name)) is not None:
            _check(fact, value.astype(np.float64), name)
            known += int(fact.known.sum())
    return known


def _all_values(model: Model, shapes: Shapes) -> dict[str, Array]:
    names = [n for node in model.nodes for n in node.output if n and n not in model.output_names]
    names = [n for n in names if shapes.dtype.get(n) == onnx.TensorProto.FLOAT]
    run = opened(with_outputs(model, names, shapes))
    outputs = run(random_inputs(model, shapes))
    return dict(zip([*(v.name for v in model.outputs), *names], outputs, strict=True))


def _check(fact: Fact, value: Array, name: str) -> None:
    slack = 1e-5 * max(1.0, float(np.abs(value).max(initial=0)))
    assert (value >= fact.low - slack).all(), name
    assert (value <= fact.high + slack).all(), name
    if fact.kind is None:
        return
    over = tuple(i for i, size in enumerate(fact.kind.shape) if size == 1)
    slices = np.moveaxis(value, over, range(-len(over), 0)) if over else value
    slices = slices.reshape(fact.kind.size, -1)
    kinds = fact.kind.reshape(-1)
    first = {kind: i for i, kind in reversed(list(enumerate(kinds.tolist())))}
    for i, kind in enumerate(kinds.tolist()):
        assert np.allclose(slices[i], slices[first[kind]], atol=slack), (name, i, first[kind])


def with_idle_rows(model: onnx.ModelProto, seed: int) -> onnx.ModelProto:
    """Zero and equal rows in weights and biases, as masks and clones leave them."""
    rng = np.random.default_rng(seed)
    for tensor in model.graph.initializer:
        value = onnx.numpy_helper.to_array(tensor).copy()
        if value.dtype != np.float32 or value.ndim == 0 or len(value) < 2:
            continue
        rows = rng.permutation(len(value))
        if rng.random() < 0.9:
            value[rows[0]] = 0
            value[..., -1] = 0
        if len(rows) > 2 and rng.random() < 0.7:
            value[rows[1]] = value[rows[2]]
        tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
    return model


@pytest.mark.parametrize("seed", range(24))
def test_random_networks(seed: int) -> None:
    model = with_idle_rows(random_cnn(seed), seed)
    checked(model)
    prepared = api.prepare(model)
    verify_normal(prepared.original, prepared.analysis, seed)


@pytest.mark.parametrize("packed", [False, True])
def test_attention(packed: bool) -> None:
    assert checked(with_idle_rows(attention(packed=packed), 0)) > 0


@pytest.mark.parametrize("act", ["Elu", "HardSwish", "LeakyRelu", "Neg", "Abs", "Sqrt", "Erf"])
def test_activations(act: str) -> None:
    b = Builder(3)
    x = b.add("Sigmoid", b.add("MatMul", "x", b.weight(6, 8)))
    x = b.add(act, b.add("Sub", x, b.constant(np.full(8, 0.0 if act == "Sqrt" else 0.5, "f"))))
    y = b.add("Clip", b.add("Div", x, b.constant(np.linspace(-2, 2, 8, dtype="f"))),
              b.constant(np.float32(-0.3)), b.constant(np.float32(0.4)))  # fmt: skip
    checked(b.model({"x": [3, 6]}, {y: [3, 8]}))


def test_movement() -> None:
    b = Builder(4)
    x = b.add("Sigmoid", b.conv("x", 3, 8))
    x = b.add("Concat", x, b.add("Slice", x, b.ints(2), b.ints(6), b.ints(1)), axis=1)
    x = b.add("Transpose", x, perm=[0, 2, 3, 1])
    x = b.add("Pad", x, b.ints(0, 0, 0, 1, 0, 0, 0, 1), b.constant(np.float32(0.5)))
    x = b.add("Reshape", x, b.ints(1, 64, 7, 2))
    x = b.add("Gather", x, b.ints(6, 0, 3), axis=2)
    x = b.add("ReduceMean", x, axes=[1], keepdims=0)
    y = b.add("Tile", x, b.ints(1, 2, 1))
    checked(b.model({"x": [1, 3, 8, 8]}, {y: [1, 6, 2]}))


def test_one_column_in_each_group_is_bounded_as_several() -> None:
    """Depthwise convolutions go their own way, which is quicker."""
    rng = np.random.default_rng(0)
    weight = rng.integers(-2, 3, (200, 2, 1, 3)).astype(np.float32)
    low = rng.choice([-np.inf, -3, 0, 1], (200, 1))
    high = np.maximum(low, rng.choice([0, 2, np.inf], (200, 1)))
    unread = np.zeros_like(low)
    wider = np.concatenate([weight, weight[::-1]], axis=2)
    expected = rows_of(wider, np.hstack([low, unread]), np.hstack([high, unread]))
    np.testing.assert_array_equal(rows_of(weight, low, high), expected)
