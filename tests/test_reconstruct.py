"""Repair by reconstruction: what was cut away and can be said by the rest is said by it."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import Builder, attention, random_cnn
from onnx import numpy_helper
from repair_forms import content, damaged, draw, error, group_of, halves, samples

from graphprune import api
from graphprune.distortion import relative_error
from graphprune.model import Array
from graphprune.repair import Repaired
from graphprune.repair.reconstruct import AFFINE, BIAS, dirty_tensors, reconstruct, with_biases
from graphprune.runtime import random_inputs, run_session, session

under_test = import_module("graphprune.repair.reconstruct")  # the package names its function so too


# --- nothing to repair


@pytest.mark.parametrize("form", [AFFINE, BIAS])
def test_an_unpruned_model_stays_as_it_is(form: str, chain: onnx.ModelProto) -> None:
    for proto in (chain, attention(), random_cnn(1), random_cnn(4)):
        prepared = api.prepare(proto)
        damage = damaged(prepared, {})
        model, reports = reconstruct(damage, form)
        assert reports == ()
        assert content(model) == content(damage.pruned)
        assert [n.SerializeToString() for n in model.nodes] == [
            n.SerializeToString() for n in damage.pruned.nodes
        ]


def test_what_is_not_downstream_stays(chain: onnx.ModelProto) -> None:
    """Two networks beside each other: only the pruned one is touched."""
    b = Builder(3)
    ends = {}
    for name in ("x", "z"):
        h = b.add("Relu", b.add("MatMul", name, b.weight(6, 8)))
        ends[b.add("MatMul", h, b.weight(8, 4))] = ["n", 4]
    prepared = api.prepare(b.model({"x": ["n", 6], "z": ["n", 6]}, ends))
    damage = damaged(prepared, {0: [1, 4]})
    model, reports = reconstruct(damage)
    assert len(reports) == 1
    before, after = content(damage.pruned), content(model)
    assert sum(before[name] != after[name] for name in before) == 1


def test_dirty_tensors() -> None:
    b = Builder()
    a = b.add("Relu", b.add("MatMul", "x", b.constant(draw(6, 8), "a")))
    c = b.add("MatMul", "x", b.constant(draw(6, 4), "c"))
    y = b.add("Add", b.add("MatMul", a, b.constant(draw(8, 4), "b")), c)
    prepared = api.prepare(b.model({"x": ["n", 6]}, {y: ["n", 4]}))
    damage = damaged(prepared, {group_of(prepared, "a").index: [0]})
    dirty = dirty_tensors(damage.original, damage.pruned)
    assert {"a", "b", a, y} <= dirty
    assert not {"x", "c", c} & dirty


def test_dirt_reaches_through_control_flow() -> None:
    """A body that captures a damaged tensor makes another one."""
    proto = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
    g (float[n, 6] x, bool c) => (float[n, 4] y) {
        a = MatMul(x, u)
        r = Relu(a)
        b = MatMul(r, v)
        z = If (c) <then_branch = t () => (float[n, 5] p) { p = Relu(b) },
                    else_branch = e () => (float[n, 5] p) { p = Neg(b) }>
        y = MatMul(z, w)
    }""")
    weights = {"u": draw(6, 8), "v": draw(8, 5), "w": draw(5, 4)}
    proto.graph.initializer.extend(numpy_helper.from_array(w, n) for n, w in weights.items())
    prepared = api.prepare(proto)
    damage = damaged(prepared, {group_of(prepared, "u").index: [0, 3]}, [])
    assert {"b", "z", "y"} <= dirty_tensors(damage.original, damage.pruned)


# --- linear networks: everything can be restored


def mixed(outputs: int, inputs: int, lost: int, seed: int) -> Array:
    """Rows of which the last ``lost`` are linear combinations of the others."""
    w = draw(outputs, inputs, seed=seed)
    w[-lost:] = draw(lost, outputs - lost, seed=seed + 1) @ w[:-lost] / 2
    return w


@pytest.mark.parametrize("op", ["Conv", "MatMul", "Gemm", "ConvTranspose"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "bare"])
def test_linear_combinations_are_restored(op: str, bias: bool) -> None:
    """Eight channels, three of them said by the other five; nothing between the layers."""
    b = Builder()
    rows = mixed(8, 4, 3, 1)
    more = [b.constant(draw(8), "c")] if bias else []
    last = [b.constant(draw(3), "d")] if bias and op != "MatMul" else []
    shape: list[Any] = ["n", 4, 5, 5]
    if op == "Conv":
        h = b.add("Conv", "x", b.constant(rows[:, :, None, None], "a"), *more)
        y = b.add("Conv", h, b.constant(draw(3, 8, 3, 3), "b"), *last)
    elif op == "ConvTranspose":
        h = b.add("ConvTranspose", "x", b.constant(rows.T.copy()[:, :, None, None], "a"), *more)
        kernel = 1 if bias else 3  # a constant spreads unevenly over overlapping windows
        weight = b.constant(draw(8, 3, kernel, kernel), "b")
        y = b.add("ConvTranspose", h, weight, *last, strides=[1, 1] if bias else [2, 2])
    elif op == "Gemm":
        shape = ["n", 4]
        h = b.add("Gemm", "x", b.constant(rows, "a"), *more, transB=1)
        y = b.add("Gemm", h, b.constant(draw(3, 8), "b"), *last, transB=1, alpha=0.5, beta=3.0)
    else:
        shape = ["n", 7, 4]
        h = b.add("MatMul", "x", b.constant(rows.T.copy(), "a"))
        h = b.add("Add", h, *more) if bias else h
        y = b.add("MatMul", h, b.constant(draw(8, 3), "b"))
    sizes = ["n", 7, 3] if op == "MatMul" else ["n", 3, *[None] * (len(shape) - 2)]
    prepared = api.prepare(b.model({"x": shape}, {y: sizes}))
    damage = damaged(prepared, {group_of(prepared, "a").index: [5, 6, 7]})
    assert error(damage, damage.pruned) > 0.1
    model, reports = reconstruct(damage)
    assert error(damage, model) < 1e-5
    (report,) = reports
    assert report.before is not None and report.after is not None
    assert report.after < 1e-6 < report.before
    fresh = samples(prepared, chunks=9)[6:]  # it holds for inputs that were not seen too
    assert error(damage, model, fresh) < 1e-3
    onnx.checker.check_model(model.assemble(), full_check=True)


def test_the_ridge_holds_what_the_samples_say_nothing_about() -> None:
    """Fewer samples than columns: nothing is divided by zero, and it is no worse than the cut."""
    b = Builder()
    h = b.add("Relu", b.add("MatMul", "x", b.constant(draw(6, 40), "a")))
    y = b.add("MatMul", h, b.constant(draw(40, 5), "b"))
    prepared = api.prepare(b.model({"x": ["n", 6]}, {y: ["n", 5]}))
    feeds = [{"x": draw(2, 6, seed=k)} for k in range(5)]
    damage = damaged(prepared, {0: list(range(10))}, feeds)
    model, _ = reconstruct(damage)
    fresh = [{"x": draw(200, 6, seed=77)}]
    assert error(damage, model) < error(damage, damage.pruned)
    assert error(damage, model, fresh) < error(damage, damage.pruned, fresh)


@pytest.mark.parametrize("value", [0.0, 3.0])
@pytest.mark.parametrize("form", [AFFINE, BIAS])
def test_constant_inputs_stay_finite(value: float, form: str) -> None:
    """Nothing varies: only the mean can be matched, and one sample is enough for that."""
    b = Builder()
    h = b.add("Relu", b.conv("x", 2, 8))
    y = b.conv(h, 8, 3)
    prepared = api.prepare(b.model({"x": ["n", 2, 4, 4]}, {y: ["n", 3, 4, 4]}))
    for chunks in (1, 6):
        feeds = [{"x": np.full((2, 2, 4, 4), value, np.float32)} for _ in range(chunks)]
        damage = damaged(prepared, {0: [0, 3]}, feeds)
        model, repairs = reconstruct(damage, form)
        assert all(np.isfinite(model.array(name)).all() for name in model.initializers)
        assert np.isfinite(error(damage, model))
        errors = [repair.before for repair in repairs if repair.before is not None]
        assert max(errors, default=0.0) < 1e6  # none is relative to nothing but rounding


# --- networks with activations


@pytest.mark.parametrize("seed", range(8))
def test_random_networks_come_nearer(seed: int) -> None:
    """All groups lose half; the outputs are nearer to the original's than after the cut alone."""
    prepared = api.prepare(random_cnn(seed))
    if not prepared.analysis.coupling.groups:
        pytest.skip("nothing to prune")
    damage = damaged(prepared, halves(prepared))
    model, reports = reconstruct(damage)
    assert reports
    before, after = error(damage, damage.pruned), error(damage, model)
    assert after <= before * (1 + 1e-6)
    assert error(damage, model, samples(prepared, 9)[6:]) <= 1.2 * before
    onnx.checker.check_model(model.assemble(), full_check=True)
    assert [v.name for v in model.outputs] == [v.name for v in damage.original.outputs]


def test_attention_comes_nearer() -> None:
    for packed in (False, True):
        prepared = api.prepare(attention(packed=packed))
        damage = damaged(prepared, halves(prepared), samples(prepared, chunks=40))
        model, _ = reconstruct(damage)
        assert error(damage, model) < error(damage, damage.pruned)


@pytest.mark.parametrize("form", [AFFINE, BIAS])
def test_two_runs_are_the_same(form: str) -> None:
    prepared = api.prepare(random_cnn(3))
    first, again = (reconstruct(damaged(prepared, halves(prepared)), form) for _ in range(2))
    assert first[0].assemble().SerializeToString() == again[0].assemble().SerializeToString()
    assert first[1] == again[1]


def test_little_memory_gives_the_same() -> None:
    prepared = api.prepare(random_cnn(3))
    damage = damaged(prepared, halves(prepared))
    wanted, _ = reconstruct(damage)
    found, _ = reconstruct(replace(damage, memory=0.0))
    assert content(found) == content(wanted)


def test_the_damage_is_not_changed_by_its_repair() -> None:
    prepared = api.prepare(random_cnn(3))
    damage = damaged(prepared, halves(prepared))
    before = content(damage.original), content(damage.pruned)
    reconstruct(damage)
    assert (content(damage.original), content(damage.pruned)) == before


# --- the bias form


def test_the_bias_form_changes_biases_alone() -> None:
    b = Builder(2)
    x = b.add("Relu", b.conv("x", 3, 8))
    x = b.add("Relu", b.add("Conv", x, b.constant(draw(6, 8, 3, 3), "w")))
    x = b.add("Flatten", b.add("GlobalAveragePool", x))
    y = b.add("Gemm", x, b.constant(draw(5, 6), "v"), b.weight(5), transB=1, alpha=0.3)
    prepared = api.prepare(b.model({"x": ["n", 3, 6, 6]}, {y: ["n", 5]}))
    feeds = [{"x": draw(8, 3, 6, 6, seed=k) + 1} for k in range(6)]
    damage = damaged(prepared, halves(prepared), feeds)
    model, reports = reconstruct(damage, BIAS)
    assert [report.how for report in reports] == ["bias", "bias"]
    for name, tensor in damage.pruned.initializers.items():
        if len(tensor.dims) > 1:
            assert model.array(name).tobytes() == damage.pruned.array(name).tobytes()
    assert error(damage, model) < error(damage, damage.pruned)


def test_the_bias_form_matches_means() -> None:
    b = Builder(2)
    x = b.add("Relu", b.add("MatMul", "x", b.weight(6, 8)))
    y = b.add("MatMul", x, b.weight(8, 4))
    prepared = api.prepare(b.model({"x": ["n", 6]}, {y: ["n", 4]}))
    damage = damaged(prepared, {0: [0, 5]})
    model, _ = reconstruct(damage, BIAS)
    means = []
    for each in (damage.original, damage.pruned, model):
        runner = session(each, 1)
        means.append(np.concatenate([run_session(runner, f)[0] for f in damage.feeds]).mean(axis=0))
    assert np.abs(means[1] - means[0]).max() > 0.01
    assert np.allclose(means[2], means[0], atol=1e-5)


def test_a_product_without_a_bias_gains_one() -> None:
    b = Builder(2)
    x = b.add("Relu", b.add("MatMul", "x", b.weight(6, 8)))
    y = b.add("MatMul", x, b.weight(8, 4))
    prepared = api.prepare(b.model({"x": ["n", 6]}, {y: ["n", 4]}))
    damage = damaged(prepared, {0: [0, 5]})
    model, _ = reconstruct(damage)
    assert [n.op_type for n in damage.pruned.nodes] == ["MatMul", "Relu", "MatMul"]
    assert [n.op_type for n in model.nodes] == ["MatMul", "Relu", "MatMul", "Add"]
    assert model.nodes[-1].output[0] == y
    onnx.checker.check_model(model.assemble(), full_check=True)
    again = api.prepare(model.assemble())  # what was repaired can be pruned and repaired once more
    twice = damaged(again, {0: [0, 1]})
    once_more, _ = reconstruct(twice)
    assert [n.op_type for n in once_more.nodes] == ["MatMul", "Relu", "MatMul", "Add"]
    assert error(twice, once_more) < error(twice, twice.pruned)


def test_with_biases_changes_no_output() -> None:
    for seed in range(4):
        prepared = api.prepare(random_cnn(seed))
        model = prepared.analysis.model
        feeds = random_inputs(model, prepared.analysis.shapes)
        expected, actual = (run_session(session(m, 1), feeds) for m in (model, with_biases(model)))
        assert relative_error(expected, actual) < 1e-5


def test_an_operator_too_wide_gets_its_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(under_test, "WIDEST", 6)
    b = Builder(2)
    x = b.add("Relu", b.add("MatMul", "x", b.weight(6, 16)))
    y = b.add("MatMul", x, b.weight(16, 4))
    prepared = api.prepare(b.model({"x": ["n", 6]}, {y: ["n", 4]}))
    _, (report,) = reconstruct(damaged(prepared, {0: [0]}))
    assert report == Repaired(report.node, "bias")
