"""Means of experts that leave: exact as a cut, found by the repair, worth their place."""

from __future__ import annotations

from typing import Any
from unittest.mock import PropertyMock, patch

import expert_forms
import numpy as np
import onnx
import pytest
from expert_forms import EXPERTS, LEAVE, TOKENS, WIDTH, added
from graphs import Builder

from graphprune import api
from graphprune.analysis import Analysis, Scope
from graphprune.check import check_rule
from graphprune.cut import cut
from graphprune.options import Options
from graphprune.oracle import law_error
from graphprune.runtime import opened, random_inputs
from graphprune.stand_ins import stands_in
from graphprune.storage import load

FORMS = {name: LEAVE[name][0] for name in LEAVE if name.startswith(("dense", "apart"))}
FORMS |= {"two, scattered": LEAVE["two, scattered"][0], "two, OneHot": LEAVE["two, OneHot"][0]}
FORMS["residual"] = lambda: added(residual=True)


def in_batches(layers: int = 1) -> onnx.ModelProto:
    """Tokens [n, 4, width], flattened for the router alone; as many mixtures on a stream."""
    b = Builder(31)
    x = "x"
    for _ in range(layers):
        flat = b.add("Reshape", x, b.ints(-1, WIDTH))
        gates = b.add("Softmax", b.add("MatMul", flat, b.weight(WIDTH, EXPERTS)))
        up, down = b.weight(EXPERTS, WIDTH, 40), b.weight(EXPERTS, 40, WIDTH)
        said = b.add("MatMul", b.add("Relu", b.add("MatMul", flat, up)), down)
        said = b.add("Reshape", said, b.ints(EXPERTS, -1, 4, WIDTH))
        turned = b.add("Transpose", gates, perm=[1, 0])
        turned = b.add("Reshape", turned, b.ints(EXPERTS, -1, 4, 1))
        said = b.add("ReduceSum", b.add("Mul", said, turned), b.ints(0), keepdims=0)
        x = b.add("Add", x, said)
    return b.model({"x": ["n", 4, WIDTH]}, {x: ["n", 4, WIDTH]})


LEFT = {name: LEAVE[name][0] for name in LEAVE.keys() - FORMS.keys()}
OPTIONS: dict[str, Any] = {"units": ("experts",), "measure": False, "cache": False, "samples": 128}
SCOPE = Scope(units=("experts",), means=True)


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts beside which a mean is small."""
    monkeypatch.setattr(expert_forms, "INNER", 40)


def analysed(form: Any, **scope: Any) -> Analysis:
    return api.prepare(form(), Scope(units=("experts",), means=True, **scope)).analysis


def error(model: onnx.ModelProto, result: onnx.ModelProto) -> float:
    feeds = {"x": np.random.default_rng(5).standard_normal((TOKENS, WIDTH)).astype(np.float32)}
    wanted, got = (opened(load(m))(feeds)[0] for m in (model, result))
    return float(np.square(wanted - got).sum() / np.square(wanted - wanted.mean(axis=0)).sum())


def beside(model: onnx.ModelProto) -> int:
    return sum(stands_in(node) and node.op_type == "MatMul" for node in model.graph.node)


@pytest.mark.parametrize("name", FORMS)
def test_law(name: str) -> None:
    """Any experts but all of them leave, exactly, and the router stays as it is."""
    analysis = analysed(FORMS[name])
    groups = analysis.coupling.groups
    assert [len(group) for group in groups] == [EXPERTS]
    assert list(analysis.coupling.fewest.values()) == [1]
    rng = np.random.default_rng(0)
    feeds = random_inputs(analysis.model, analysis.shapes)
    for count in (1, 3, EXPERTS - 1):
        removed = analysis.nothing_removed
        removed[rng.permutation(groups[0].units)[:count]] = True
        alive = analysis.coupling.alive(removed)
        small, _ = cut(analysis.model, analysis.shapes, analysis.coupling, alive)
        found = law_error(analysis.model, small, analysis.shapes, analysis.coupling, alive, feeds)
        assert found < 1e-5
        assert list(small.initializers["c0"].dims) == [EXPERTS, WIDTH]
        assert len(small.assemble().SerializeToString()) < len(
            analysis.model.assemble().SerializeToString()
        )


@pytest.mark.parametrize("name", FORMS)
def test_pruned_and_made_again(name: str) -> None:
    model = FORMS[name]()
    made = api.prune(model, params=0.7, **OPTIONS)
    assert made.verdict.passed
    assert made.plan.groups[0].removed
    assert beside(made.model) == 1
    assert any("their mean outputs stay" in note for note in made.notes)
    assert made.after.params <= 0.7 * made.before.params
    assert made.before.params == api.prepare(model).before.params
    again = api.apply(model, made.plan, options=Options(measure=False, cache=False))
    assert again.model.SerializeToString() == made.model.SerializeToString()


def test_means_are_nearer() -> None:
    """At the same parameters, all forms together and most of them."""
    pairs = []
    for form in FORMS.values():
        model = form()
        made = api.prune(model, params=0.72, **OPTIONS)
        with patch.object(Options, "keeps_means", PropertyMock(return_value=False)):
            usual = api.prune(model, params=0.72, **OPTIONS)
        assert not beside(usual.model)
        pairs.append((error(model, made.model), error(model, usual.model)))
    means, without = np.array(pairs).T
    assert means.sum() < 0.6 * without.sum()
    assert (means <= without).mean() > 0.7


def test_the_mean_of_an_expert_that_says_one_thing_is_exact() -> None:
    """A constant expert leaves, and nothing is lost."""
    model = FORMS["dense"]()
    for tensor in model.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor).copy()
        if array.shape == (EXPERTS, WIDTH, 40):
            array[[1, 4]] = 0
        elif array.shape == (EXPERTS, 1, 40):
            array[[1, 4]] = np.abs(array[[1, 4]])
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    with (
        patch("graphprune.routing._ordinals", return_value=np.arange(EXPERTS)),
        patch("graphprune.routing._added", return_value=np.array([9.0, 1, 9, 9, 2, 9])),
    ):
        made = api.prune(model, params=0.72, **OPTIONS)
    assert made.plan.groups[0].removed == (1, 4)
    assert error(model, made.model) < 1e-3


@pytest.mark.parametrize("name", LEFT)
def test_looked_up_and_fused_leave_with_their_place(name: str) -> None:
    made = api.prune(LEFT[name](), params=0.7, allow_miss=True, **OPTIONS)
    assert not beside(made.model)
    assert not any("mean outputs stay" in note for note in made.notes)


@pytest.mark.parametrize(
    "given",
    [{"repair": "none"}, {"repair": "bias"}, {"unconstrained": True}, {"only_blocks": True}],
)
def test_only_where_a_repair_finds_them(given: dict[str, Any]) -> None:
    options = {"units": ("blocks",)} if given.pop("only_blocks", False) else {"units": ("experts",)}
    assert not Options.of(flops=0.5, **options, **given).scope.means
    assert Options.of(flops=0.5, units=("channels", "experts")).scope.means


def test_not_beside_small_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a mean has more than a twentieth of what an expert has."""
    monkeypatch.setattr(expert_forms, "INNER", 5)
    assert not analysed(FORMS["dense"]).relations.weighed


def test_nothing_leaves_nothing_stays_behind() -> None:
    model = FORMS["dense"]()
    made = api.prune(model, params=1.0, **OPTIONS)
    assert not beside(made.model)
    assert len(made.model.graph.node) == len(model.graph.node)
    assert error(model, made.model) < 1e-9


@pytest.mark.parametrize("layers", [1, 3])
def test_tokens_in_batches(layers: int) -> None:
    """Shares of another rank than the sum; several mixtures."""
    model = in_batches(layers)
    made = api.prune(model, params=0.6, **OPTIONS)
    assert made.verdict.passed
    assert 0 < beside(made.model) <= layers
    assert len(analysed(lambda: model).relations.weighed) == layers
    feeds = {"x": np.random.default_rng(5).standard_normal((6, 4, WIDTH)).astype(np.float32)}
    with patch.object(Options, "keeps_means", PropertyMock(return_value=False)):
        usual = api.prune(model, params=0.6, **OPTIONS)
    wanted, got, other = (opened(load(m))(feeds)[0] for m in (model, made.model, usual.model))
    assert np.square(wanted - got).sum() < np.square(wanted - other).sum()
    again = api.apply(model, made.plan, options=Options(measure=False, cache=False))
    assert again.model.SerializeToString() == made.model.SerializeToString()


def test_with_channels() -> None:
    options = {**OPTIONS, "units": ("channels", "experts"), "round_to": 1, "min_channels": 1}
    for name in ("dense", "apart, added"):
        model = FORMS[name]()
        made = api.prune(model, params=0.5, **options)
        assert made.verdict.passed
        again = api.apply(model, made.plan, options=Options(measure=False, cache=False))
        assert again.model.SerializeToString() == made.model.SerializeToString()


def test_pruned_again() -> None:
    """Names are taken: the second run finds others, and keeps the experts there are."""
    made = api.prune(FORMS["dense"](), params=0.7, **OPTIONS)
    again = api.prune(
        made.model, params=0.8, **{**OPTIONS, "units": ("channels", "experts")}, round_to=1
    )
    assert again.verdict.passed


@pytest.mark.parametrize("inner", [5, 40])
def test_experts_come_before_channels_inside(inner: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one axis folds both, experts leave although there are more channels."""
    monkeypatch.setattr(expert_forms, "INNER", inner)
    analysis = api.prepare(LEAVE["dense, Einsum"][0](), Scope(units=("experts",))).analysis
    assert [len(group) for group in analysis.coupling.groups] == [EXPERTS]
    assert check_rule(LEAVE["dense, Einsum"][0](), units=("experts",)).passed
