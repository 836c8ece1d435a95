"""Repair by reconstruction of residual sums, of what a Relu hides, and of every operator."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import Builder
from onnx import numpy_helper
from repair_forms import damaged, draw, error, group_of, halves

from graphprune import api
from graphprune.model import Model
from graphprune.prepared import Prepared
from graphprune.repair import Damage
from graphprune.repair.reconstruct import reconstruct
from graphprune.runtime import run_session, session

under_test = import_module("graphprune.repair.reconstruct")  # the package names its function so too


# --- the sum, and the Relu behind it


def residual(seed: int = 0, relu: bool = False) -> tuple[Prepared, dict[int, list[int]]]:
    """A stream that is pruned and repaired, and a branch with a hidden layer that is wide enough to
    correct what went wrong on the stream."""
    b = Builder(seed)
    stream = b.add("Relu", b.add("MatMul", "x", b.constant(draw(6, 16, seed=seed), "s0")))
    stream = b.add("MatMul", stream, b.constant(draw(16, 4, seed=seed), "s1"))
    branch = b.add("Relu", b.add("MatMul", "x", b.constant(draw(6, 24, seed=seed), "b0")))
    branch = b.add("MatMul", branch, b.constant(draw(24, 4, seed=seed), "b1"))
    y = b.add("Add", stream, branch)
    y = b.add("Relu", y) if relu else y
    prepared = api.prepare(b.model({"x": ["n", 6]}, {y: ["n", 4]}))
    groups = {group_of(prepared, "s0").index: list(range(12)), group_of(prepared, "b0").index: [0]}
    return prepared, groups


@pytest.mark.parametrize("seed", range(4))
def test_matching_the_sum_also_corrects_the_stream(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared, groups = residual(seed)
    feeds = [{"x": draw(64, 6, seed=k)} for k in range(6)]
    damage = damaged(prepared, groups, feeds)
    with_sum, _ = reconstruct(damage)
    monkeypatch.setattr(under_test.Frontier, "reaches", lambda *_: False)
    alone, _ = reconstruct(damage)
    assert error(damage, with_sum) < 0.9 * error(damage, alone)


def convolutional_residual(b: Builder, x: str, channels: int, middle: int) -> str:
    hidden = b.add("Relu", b.conv(x, channels, middle))
    return str(b.add("Relu", b.add("Add", x, b.conv(hidden, middle, channels))))


def test_a_deep_residual_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    b = Builder(4)
    x = b.add("Relu", b.conv("x", 3, 8))
    for _ in range(4):
        x = convolutional_residual(b, x, 8, 12)
    y = b.add("GlobalAveragePool", x)
    prepared = api.prepare(b.model({"x": ["n", 3, 6, 6]}, {y: ["n", 8, 1, 1]}))
    damage = damaged(prepared, halves(prepared))
    with_sum, _ = reconstruct(damage)
    monkeypatch.setattr(under_test.Frontier, "reaches", lambda *_: False)
    alone, _ = reconstruct(damage)
    assert error(damage, with_sum) < error(damage, alone) < error(damage, damage.pruned)


@pytest.mark.parametrize("op", ["Conv", "MatMul"])
def test_a_sum_that_is_larger_than_the_operators_output(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A global context is added to a whole map: the operator's rows are not the sum's rows."""
    b = Builder(1)
    if op == "Conv":
        h = b.add("Relu", b.conv(b.add("GlobalAveragePool", "x"), 4, 12, 1))
        y = b.add("Add", b.conv(h, 12, 4, 1), "x")
        model = b.model({"x": ["n", 4, 5, 5]}, {y: ["n", 4, 5, 5]})
    else:
        h = b.add("ReduceMean", "x", axes=[1], keepdims=1)
        h = b.add("Relu", b.add("MatMul", h, b.weight(4, 12)))
        y = b.add("Add", b.add("MatMul", h, b.weight(12, 4)), "x")
        model = b.model({"x": ["n", 5, 4]}, {y: ["n", 5, 4]})
    prepared = api.prepare(model)
    size = (16, 4, 5, 5) if op == "Conv" else (16, 5, 4)
    feeds = [
        {"x": draw(*size, seed=k) + draw(16, *[1] * (len(size) - 1), seed=k)} for k in range(6)
    ]
    damage = damaged(prepared, {0: [0, 3, 4]}, feeds)
    repaired, _ = reconstruct(damage)
    monkeypatch.setattr(under_test.Frontier, "reaches", lambda *_: False)
    alone, _ = reconstruct(damage)
    assert error(damage, alone) < error(damage, damage.pruned)
    assert error(damage, repaired) <= 1.05 * error(damage, alone)


def test_a_stream_that_is_smaller_than_the_sum() -> None:
    """The other way round: a vector for each sample is added to the operator's map."""
    b = Builder(1)
    pooled = b.conv(b.add("Relu", b.conv(b.add("GlobalAveragePool", "x"), 4, 8, 1)), 8, 4, 1)
    branch = b.conv(b.add("Relu", b.conv("x", 4, 8)), 8, 4)
    y = b.add("Add", branch, pooled)
    prepared = api.prepare(b.model({"x": ["n", 4, 5, 5]}, {y: ["n", 4, 5, 5]}))
    damage = damaged(prepared, halves(prepared))
    repaired, _ = reconstruct(damage)
    assert error(damage, repaired) < error(damage, damage.pruned)


def rectified_error(damage: Damage, model: Model) -> float:
    """Mean squared error of the outputs, which a Relu makes."""
    first, second = session(damage.original, 1), session(model, 1)
    pairs = [(run_session(first, f)[0], run_session(second, f)[0]) for f in damage.feeds]
    return float(np.mean([np.square(a - b).mean() for a, b in pairs]))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "sum"])
def test_what_a_relu_hides_need_not_be_matched(
    seed: int, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The relaxed solution is no worse on the target that counts than the plain one."""
    if stream:
        prepared, groups = residual(seed, relu=True)
    else:
        b = Builder(seed)
        h = b.add("Relu", b.add("MatMul", "x", b.weight(6, 16)))
        y = b.add("Relu", b.add("MatMul", h, b.weight(16, 4)))
        prepared = api.prepare(b.model({"x": ["n", 6]}, {y: ["n", 4]}))
        groups = {0: [0, 2, 5, 7, 11]}
    feeds = [{"x": draw(64, 6, seed=k)} for k in range(5)]
    damage = damaged(prepared, groups, feeds)
    relaxed, _ = reconstruct(damage)
    site = under_test.site_of

    def blind(*rest: Any) -> Any:
        return replace(site(*rest), rectified=False)

    monkeypatch.setattr(under_test, "site_of", blind)
    plain, _ = reconstruct(damage)
    assert rectified_error(damage, relaxed) <= rectified_error(damage, plain) * (1 + 1e-6)


# --- operators


def test_a_grouped_convolution() -> None:
    b = Builder(1)
    h = b.add("Relu", b.conv("x", 3, 8))
    y = b.conv(h, 8, 6, group=2)
    prepared = api.prepare(b.model({"x": ["n", 3, 5, 5]}, {y: ["n", 6, 5, 5]}))
    damage = damaged(prepared, {0: [1]})
    model, (report,) = reconstruct(damage)
    assert error(damage, model) < error(damage, damage.pruned)
    assert report.after is not None and report.before is not None
    assert report.after < report.before


def test_a_depthwise_convolution_between() -> None:
    b = Builder(1)
    h = b.add("Relu", b.conv("x", 3, 8))
    h = b.add("Relu", b.conv(h, 8, 8, group=8))
    y = b.conv(h, 8, 6, 1)
    prepared = api.prepare(b.model({"x": ["n", 3, 5, 5]}, {y: ["n", 6, 5, 5]}))
    damage = damaged(prepared, {0: [1, 4, 6]})
    model, reports = reconstruct(damage)
    assert len(reports) == 2
    assert error(damage, model) < error(damage, damage.pruned)


@pytest.mark.parametrize("op", ["LSTM", "GRU"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "bare"])
def test_recurrent_input_weights(op: str, bias: bool) -> None:
    """Behind a damaged layer that cannot be repaired itself: the gates see the original's."""
    gates = {"LSTM": 4, "GRU": 3}[op]
    b = Builder(1)
    h = b.add("Relu", b.add("MatMul", "x", b.constant(draw(5, 16), "a")))
    h = b.add("Relu", b.add("MatMul", h, b.constant(draw(16, 8), "m")))
    w, r = b.weight(2, gates * 4, 8), b.weight(2, gates * 4, 4)
    more = [b.weight(2, 2 * gates * 4)] if bias else []
    y = b.add(op, h, w, r, *more, hidden_size=4, direction="bidirectional")
    prepared = api.prepare(b.model({"x": [6, "n", 5]}, {y: [6, 2, "n", 4]}))
    feeds = [{"x": draw(6, 16, 5, seed=k)} for k in range(6)]
    damage = damaged(prepared, {group_of(prepared, "a").index: list(range(8))}, feeds)
    model, (_, report) = reconstruct(damage)
    assert error(damage, model) < error(damage, damage.pruned)
    assert report.after is not None and report.before is not None
    assert report.after < report.before
    onnx.checker.check_model(model.assemble(), full_check=True)


def test_batch_normalisation_is_folded_before_the_repair() -> None:
    b = Builder(5)
    x = b.add("Relu", b.norm(b.conv("x", 3, 12), 12))
    y = b.norm(b.conv(x, 12, 4), 4)
    prepared = api.prepare(b.model({"x": ["n", 3, 5, 5]}, {y: ["n", 4, 5, 5]}))
    damage = damaged(prepared, {0: [0, 3, 4]})
    model, (report,) = reconstruct(damage)
    assert not any(n.op_type == "BatchNormalization" for n in model.nodes)
    assert error(damage, model) < error(damage, damage.pruned)
    assert report.after is not None and report.before is not None
    assert report.after < report.before


def test_float16() -> None:
    proto = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
    g (float16[n, 6] x) => (float16[n, 4] y) {
        a = MatMul(x, u)
        r = Relu(a)
        y = MatMul(r, w)
    }""")
    weights = {"u": draw(6, 16).astype("f2"), "w": draw(16, 4).astype("f2")}
    proto.graph.initializer.extend(numpy_helper.from_array(w, n) for n, w in weights.items())
    prepared = api.prepare(proto)
    feeds = [{"x": draw(16, 6, seed=k).astype("f2")} for k in range(6)]
    damage = damaged(prepared, {0: [0, 3, 4]}, feeds)
    model, _ = reconstruct(damage)
    assert {t.data_type for t in model.initializers.values()} == {onnx.TensorProto.FLOAT16}
    assert error(damage, model) < error(damage, damage.pruned)
