"""Repairs from weights alone: identities, moments of known distributions, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from graphs import Builder, attention, random_cnn

from graphprune.model import Array, Model
from graphprune.plan import make_plan
from graphprune.prepared import prepare
from graphprune.repair import moments, udfc
from graphprune.repair.damage import Damage, Repaired
from graphprune.repair.propagate import propagate
from graphprune.repair.rows import Rows
from graphprune.runtime import opened, random_inputs

Compensate = Callable[[Damage], tuple[Model, tuple[Repaired, ...]]]
REPAIRS: list[Compensate] = [moments.compensate, udfc.compensate]


def damaged(proto: onnx.ModelProto, share: float = 0.3, last: bool = False) -> Damage:
    """The model less a random (or the last) share of each group's units."""
    prepared = prepare(proto)
    analysis = prepared.analysis
    removed = analysis.nothing_removed
    rng = np.random.default_rng(0)
    for group in analysis.coupling.groups:
        count = int(share * len(group))
        gone = group.units[-count:] if last else rng.permutation(group.units)[:count]
        removed[gone[:count]] = True
        alive = analysis.coupling.alive(removed)
        if not all(alive[axis.slots].any() for axis in analysis.relations.slots.axes):
            removed[gone[:count]] = False  # an axis keeps something
    plan = make_plan(analysis, removed, np.zeros(len(removed)), {}, "test")
    cut = prepared.registry.passes["remove_channels"](plan).run(analysis.model, prepared.context)
    return Damage(
        analysis.model,
        prepared.folded(analysis.model),
        prepared.folded(cut.model),
        analysis.shapes,
        analysis.coupling,
        analysis.coupling.alive(removed),
    )


def outputs(damage: Damage, *models: Model) -> list[Array]:
    feeds = random_inputs(damage.normal, damage.shapes, seed=5)
    return [opened(model)(feeds)[0] for model in models]


def errors(damage: Damage, repaired: Model) -> tuple[float, float]:
    """Distance from the original's outputs before and after the repair."""
    wanted, cut, mended = outputs(damage, damage.original, damage.pruned, repaired)
    size = np.linalg.norm(wanted)
    return float(np.linalg.norm(cut - wanted) / size), float(np.linalg.norm(mended - wanted) / size)


def redundant(kind: str = "", activation: str = "Identity") -> onnx.ModelProto:
    """The last three of twelve channels are combinations of the others, biases included."""
    b = Builder(2)
    flat = kind in ("matmul", "gemm")
    shape = (4, 12) if flat else (12, 4, 1, 1)
    mixing = b.rng.standard_normal((3, 9))
    rows = b.rng.standard_normal((9, 4)) * 0.5
    offsets = b.rng.standard_normal(9)
    rows, offsets = np.vstack([rows, mixing @ rows]), np.append(offsets, mixing @ offsets)
    weight = b.constant((rows.T if flat else rows).reshape(shape).astype(np.float32))
    bias = b.constant(offsets.astype(np.float32))
    if flat:
        x = b.add(activation, b.add("Add", b.add("MatMul", "x", weight), bias))
        if kind == "matmul":
            y = b.add("MatMul", x, b.weight(12, 5))
        else:
            y = b.add("Gemm", x, b.weight(5, 12), transB=1, alpha=0.5)
        return b.model({"x": [2, 4]}, {y: [2, 5]})
    x = b.add(activation, b.add("Conv", "x", weight, bias))
    if kind == "flatten":
        y = b.add("Gemm", b.add("Flatten", x), b.weight(48, 5))
        return b.model({"x": [1, 4, 2, 2]}, {y: [1, 5]})
    if kind == "transposed":
        y = b.add("ConvTranspose", x, b.weight(12, 5, 2, 2), strides=[2, 2])
        return b.model({"x": [1, 4, 2, 2]}, {y: [1, 5, 4, 4]})
    y = b.add("Conv", x, b.weight(5, 12, 3, 3))
    return b.model({"x": [1, 4, 5, 5]}, {y: [1, 5, 3, 3]})


KINDS = ["conv", "matmul", "gemm", "flatten"]


@pytest.mark.parametrize("kind", KINDS)
def test_moments_restore_combinations_of_kept_channels(kind: str) -> None:
    damage = damaged(redundant(kind), last=True)
    model, reports = moments.compensate(damage, ridges=[1e-9])
    before, after = errors(damage, model)
    assert before > 0.05
    assert after < 1e-3
    assert "moments" in reports[0].how


@pytest.mark.parametrize("kind", [*KINDS, "transposed"])
def test_udfc_restores_combinations_of_kept_channels(kind: str) -> None:
    damage = damaged(redundant(kind), last=True)
    model, reports = udfc.compensate(damage, offsets=1.0, ridge=1e-9)
    before, after = errors(damage, model)
    assert before > 0.05
    assert after < 1e-3
    assert "0% of the lost filters unexplained" in reports[0].how


@pytest.mark.parametrize("compensate", REPAIRS)
def test_a_model_that_lost_nothing_stays_as_it_is(compensate: Compensate) -> None:
    damage = damaged(redundant(), share=0.0)
    model, reports = compensate(damage)
    assert model.sha256 == damage.pruned.sha256
    assert reports == ()


def test_moments_help_behind_an_activation() -> None:
    damage = damaged(redundant(activation="Relu"), last=True)
    before, after = errors(damage, moments.compensate(damage)[0])
    assert after < 0.6 * before


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("compensate", REPAIRS)
def test_random_networks_run_after_their_repair(compensate: Compensate, seed: int) -> None:
    damage = damaged(random_cnn(seed), share=0.5)
    model, reports = compensate(damage)
    again, _ = compensate(damage)
    assert model.sha256 == again.sha256
    wanted, got = outputs(damage, damage.original, model)
    assert got.shape == wanted.shape
    assert np.isfinite(got).all()
    assert all(isinstance(report, Repaired) for report in reports)


@pytest.mark.parametrize("packed", [False, True])
def test_what_attention_reads_is_known(packed: bool) -> None:
    damage = damaged(attention(packed=packed), share=0.5)
    model, reports = moments.compensate(damage)
    assert reports
    assert all("moments" in report.how for report in reports)
    assert np.isfinite(outputs(damage, model)[0]).all()


def rows_of(proto: onnx.ModelProto) -> dict[str, Rows | str]:
    analysis = prepare(proto).analysis
    return dict(propagate(analysis.model, analysis.shapes, analysis.coupling, rows=20000))


def test_rows_have_the_moments_of_a_product_and_its_activation() -> None:
    b = Builder(4)
    a = b.add("MatMul", "x", b.weight(6, 3))
    y = b.add("Relu", a)
    found = rows_of(b.model({"x": [1, 6]}, {y: [1, 3]}))
    weight = onnx.numpy_helper.to_array(b.initializers[0]).astype(np.float64)
    covariance = weight.T @ weight
    before, after = found[a], found[y]
    assert isinstance(before, Rows)
    assert isinstance(after, Rows)
    np.testing.assert_allclose(before.values.mean(0), 0, atol=0.05)
    np.testing.assert_allclose(np.cov(before.values.T), covariance, atol=0.1)
    deviation = np.sqrt(np.diag(covariance))
    np.testing.assert_allclose(after.values.mean(0), deviation / np.sqrt(2 * np.pi), atol=0.05)


def test_batch_normalization_sets_the_stored_moments() -> None:
    b = Builder(5)
    a = b.norm(b.conv("x", 3, 4), 4)
    y = b.add("AveragePool", b.add("Identity", a), kernel_shape=[2, 2])
    found = rows_of(b.model({"x": [1, 3, 4, 4]}, {y: [1, 4, 3, 3]}))[a]
    assert isinstance(found, Rows)
    shift, scale = (
        onnx.numpy_helper.to_array(next(t for t in b.initializers if t.name == b.nodes[1].input[i]))
        for i in (2, 1)
    )
    np.testing.assert_allclose(found.values.mean(0), shift, atol=1e-6)
    np.testing.assert_allclose(found.values.std(0), scale, rtol=1e-4)


def test_positions_of_a_pixel_layout_are_found() -> None:
    b = Builder(6)
    x = b.add("Transpose", "x", perm=[0, 3, 1, 2])
    y = b.conv(x, 3, 4)
    found = rows_of(b.model({"x": [1, 4, 4, 3]}, {y: [1, 4, 4, 4]}))
    first, last = found["x"], found[y]
    assert isinstance(first, Rows)
    assert isinstance(last, Rows)
    assert first.index.shape == (1, 1, 1, 3)
    assert last.index.shape == (1, 4, 1, 1)


def test_what_nothing_is_known_of_is_reported_and_left() -> None:
    b = Builder(7)
    x = b.add("Relu", b.conv("x", 3, 8))
    x = b.add("LRN", x, size=3)
    middle = b.conv(x, 8, 8)
    y = b.conv(b.add("Relu", middle), 8, 3)
    damage = damaged(b.model({"x": [1, 3, 4, 4]}, {y: [1, 3, 4, 4]}), share=0.5)
    model, reports = moments.compensate(damage)
    assert model.sha256 == damage.pruned.sha256
    assert all("not repaired: LRN" in report.how for report in reports)


def test_udfc_leaves_a_residual_stream_alone() -> None:
    b = Builder(8)
    x = b.conv("x", 3, 8)
    x = b.add("Add", x, b.conv(b.add("Relu", x), 8, 8))
    y = b.conv(b.add("Relu", x), 8, 3)
    damage = damaged(b.model({"x": [1, 3, 4, 4]}, {y: [1, 3, 4, 4]}), share=0.5)
    _, reports = udfc.compensate(damage)
    assert "2 producers" in reports[-1].how
    assert "2 producers" not in reports[0].how


def test_udfc_without_a_ridge_explodes() -> None:
    """As many kept filters as they are long, two nearly alike: large weights that cancel."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((12, 6))
    rows[1] = rows[0] + 1e-4 * rng.standard_normal(6)
    kept = np.arange(12) < 6
    biases = rng.standard_normal(12)
    tame, _ = udfc.combinations(rows, biases, kept, 0.0, 1.0)
    wild, _ = udfc.combinations(rows, biases, kept, 0.0, 1e-12)
    assert np.abs(tame).max() < 2
    assert np.abs(wild).max() > 100
