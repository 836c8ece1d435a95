"""Repair of operators on integers: weights and biases on their grids, whatever form they have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from integer_forms import FORMS, read_twice, vector
from quantised_forms import NETWORKS, WAYS, quantised
from repair_forms import content, damaged, error, samples

from graphprune.api import apply, prepare, prune
from graphprune.frontier import Frontier
from graphprune.linear import repairable
from graphprune.model import Model
from graphprune.options import Options
from graphprune.repair import REPAIRS, Damage, integers
from graphprune.repair.integers import mended, refined_integers
from graphprune.repair.refine import Lesson
from graphprune.repair.sites import site_of
from graphprune.runtime import random_inputs, run_session, session
from graphprune.shapes import infer
from graphprune.spelling import spelled
from graphprune.storage import load

REPAIR = {repair.name: repair for repair in REPAIRS}


def half_gone(source: onnx.ModelProto) -> Damage:
    """Every second unit of each group."""
    prepared = prepare(source)
    groups = prepared.analysis.coupling.groups
    gone = {group.index: range(0, len(group), 2) for group in groups}
    return damaged(prepared, gone, samples(prepared, chunks=40))


def kinds(model: Model) -> dict[str, int]:
    return {name: tensor.data_type for name, tensor in model.initializers.items()}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("network", NETWORKS)
def test_repaired_as_they_are_stored(network: str, way: str, tmp_path: Path) -> None:
    """The error falls to a fraction; operators, types and shapes are those of the cut model."""
    damage = half_gone(quantised(network, way, tmp_path))
    result, reports = mended(REPAIR["obs"], damage)
    assert error(damage, result) < 0.3 * error(damage, damage.pruned)
    assert all(r.after is not None and r.after < r.before for r in reports)
    was, now = kinds(damage.pruned), kinds(result)
    assert {name: now[name] for name in was} == was
    assert [n.op_type for n in result.nodes] == [n.op_type for n in damage.pruned.nodes]


@pytest.mark.parametrize("form", ["obs", "bias"])
@pytest.mark.parametrize("way", ["QOperator asymmetric", "dynamic asymmetric per channel"])
def test_nothing_cut_is_nothing_repaired(way: str, form: str, tmp_path: Path) -> None:
    prepared = prepare(quantised("convolutional", way, tmp_path))
    damage = damaged(prepared, {})
    result, reports = mended(REPAIR[form], damage)
    assert not reports
    assert content(result) == content(damage.pruned)
    assert result.skeleton == damage.pruned.skeleton


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("network", NETWORKS)
def test_spelled_out_it_computes_the_same(network: str, way: str, tmp_path: Path) -> None:
    """To the rounding of what a DynamicQuantizeLinear makes; and put back it is what it was."""
    model = load(quantised(network, way, tmp_path))
    plain = spelled(model)
    feeds = random_inputs(model, infer(model))
    expected, actual = (run_session(session(m, 1), feeds)[0] for m in (model, plain.model))
    near = 0.05 if "dynamic" in way else 1e-5
    assert np.abs(expected - actual).max() <= near * np.abs(expected).max()
    assert not [n for n in plain.model.nodes if n.op_type.startswith(("QLinear", "QGemm"))]
    assert plain.back(replace(plain.model)).assemble() == model.assemble()


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_repaired(form: str) -> None:
    """A bias that is not there is added where that can be; types stay."""
    source = FORMS[form]()
    damage = half_gone(source)
    result, reports = mended(REPAIR["obs"], damage)
    assert error(damage, result) < 0.8 * error(damage, damage.pruned)
    assert all("not repaired" not in str(report) for report in reports)
    was, now = kinds(damage.pruned), kinds(result)
    assert {name: now[name] for name in was} == was
    operators = [
        [n.op_type for n in m.nodes if n.op_type != "Add"] for m in (damage.pruned, result)
    ]
    assert operators[0] == operators[1]
    assert not prepare(source).quantised_notes


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_spelled_out(form: str) -> None:
    model = load(FORMS[form]())
    plain = spelled(model)
    feeds = random_inputs(model, infer(model))
    expected, actual = (run_session(session(m, 1), feeds)[0] for m in (model, plain.model))
    assert np.abs(expected - actual).max() <= 0.05 * np.abs(expected).max()
    assert plain.back(replace(plain.model)).assemble() == model.assemble()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("network", NETWORKS)
def test_from_weights_alone(network: str, way: str, tmp_path: Path) -> None:
    """Moments walk through integers as through the numbers that they stand for."""
    damage = half_gone(quantised(network, way, tmp_path))
    result, reports = mended(REPAIR["moments"], damage)
    assert error(damage, result) < 0.6 * error(damage, damage.pruned)
    assert all(r.after is not None and r.after < r.before for r in reports)
    assert kinds(result) == kinds(damage.pruned)


@pytest.mark.parametrize("way", ["QDQ", "QOperator asymmetric"])
def test_filters_are_found_behind_integers(way: str, tmp_path: Path) -> None:
    damage = half_gone(quantised("convolutional", way, tmp_path))
    result, reports = mended(REPAIR["udfc"], damage)
    assert ["udfc" in report.how for report in reports] == [True, True, False, False, True]
    assert content(result) != content(damage.pruned)


@pytest.mark.parametrize("way", ["QDQ", "QOperator asymmetric"])
def test_sums_are_matched_behind_rounding(way: str, tmp_path: Path) -> None:
    """The sum that a convolution is added to, and Relus that integers stand for."""
    model = spelled(load(quantised("convolutional", way, tmp_path))).model
    shapes = infer(model)
    known = Frontier(model, [random_inputs(model, shapes)])
    found = repairable(model)
    known.advance([found[2].x])
    left = {linear.node for linear in found[2:]}
    sites = [site_of(model, shapes.shape, linear, known, left, {}) for linear in found]
    sums = [model.nodes[model.producer[site.target or ""]].op_type for site in sites]
    assert sums == ["Conv", "Conv", "Add", "Conv", "Conv", "Gemm"]
    assert [site.rectified for site in sites] == [True, True, True, False, False, False]


@pytest.mark.parametrize("form", ["QLinearConv without a bias", "DynamicQuantizeLSTM"])
def test_a_plan_gives_the_same_bytes(form: str) -> None:
    source = FORMS[form]()
    first = prune(source, flops=0.6, samples=16, measure=False, cache=False)
    assert first.verdict.passed
    again = apply(source, first.plan, options=Options(measure=False, cache=False))
    assert again.model.SerializeToString() == first.model.SerializeToString()


@pytest.mark.parametrize("way", ["QDQ per channel", "QOperator asymmetric", "dynamic"])
def test_tuned_as_a_whole(way: str, tmp_path: Path) -> None:
    """By gradient through what is not rounded; kept only where it is better with rounding."""
    damage = half_gone(quantised("convolutional", way, tmp_path))
    lesson = Lesson(damage.original, damage.feeds, None, 0)
    result, report = refined_integers(damage.pruned, lesson, 60, lambda share: None)
    assert report.steps == 60, str(report)
    assert error(damage, result) < 0.9 * error(damage, damage.pruned)
    assert kinds(result) == kinds(damage.pruned)
    assert [n.op_type for n in result.nodes] == [n.op_type for n in damage.pruned.nodes]


def test_what_rounding_undoes_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damage = half_gone(quantised("convolutional", "QOperator asymmetric", tmp_path))
    monkeypatch.setattr(integers, "_errors", lambda lesson, models: [1.0] * len(models))
    lesson = Lesson(damage.original, damage.feeds, None, 0)
    result, report = integers.refined_integers(damage.pruned, lesson, 2, lambda share: None)
    assert result is damage.pruned
    assert "with rounding" in str(report)


@pytest.mark.parametrize("form", ["QGemm", "MatMulIntegerToFloat"])
def test_biases_make_up_for_rounded_weights(form: str) -> None:
    """Mean outputs are the original's, for the weights as they are stored."""
    damage = half_gone(FORMS[form]())
    result, _ = mended(REPAIR["obs"], damage)
    runners = session(damage.original, 1), session(result, 1)
    wanted, found = (
        np.concatenate([run_session(runner, feed)[0] for feed in damage.feeds])
        for runner in runners
    )
    assert np.abs((found - wanted).mean(axis=0)).max() < 2e-3 * wanted.std()


@pytest.mark.parametrize("make", [read_twice, vector])
def test_what_cannot_be_said_in_floats_is_named(make: Callable[[], onnx.ModelProto]) -> None:
    """It stays as it was cut, and a note says so."""
    source = make()
    assert not spelled(load(source)).replaced
    result = prune(source, flops=0.6, round_to=1, samples=16, measure=False, cache=False)
    assert result.verdict.passed
    assert "1 operator with quantised weights is not repaired" in result.notes
