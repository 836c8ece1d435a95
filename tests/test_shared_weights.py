"""Weights that several operators read (heads over levels, siamese towers, layers run again): one
least squares for all uses, taken at once where it can be and use by use where they feed each other.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import Builder
from onnx import numpy_helper
from repair_forms import content, damaged, draw, error, group_of, halves, samples

from graphprune import api
from graphprune.linear import shared
from graphprune.options import Options
from graphprune.pooled import about, pooled
from graphprune.prepared import Prepared
from graphprune.repair.reconstruct import AFFINE, BIAS, reconstruct, with_biases
from graphprune.repair.turns import turns
from graphprune.runtime import run_session, session
from graphprune.statistics import Sums
from graphprune.thin import Thin

under_test = import_module("graphprune.repair.reconstruct")  # the package names its function so too

HEAD = '<ir_version: 8, opset_import: ["": 17]> g (float[n,12] x) => '
LEVELS = f"""{HEAD} (float[n,5] y, float[n,5] z)
{{ a = MatMul(x, A) p = Relu(a) b = MatMul(x, B) q = Relu(b) u = MatMul(p, T) v = MatMul(q, T)
   r = Relu(u) s = Relu(v) y = MatMul(r, HEAD) z = MatMul(s, HEAD) }}"""
AGAIN = f"""{HEAD} (float[n,5] y)
{{ h0 = MatMul(x, IN) u0 = MatMul(h0, U) t0 = Tanh(u0) d0 = MatMul(t0, D) h1 = Add(h0, d0)
   u1 = MatMul(h1, U) t1 = Tanh(u1) d1 = MatMul(t1, D) h2 = Add(h1, d1)
   u2 = MatMul(h2, U) t2 = Tanh(u2) d2 = MatMul(t2, D) h3 = Add(h2, d2) y = MatMul(h3, OUT) }}"""
SIZES = {
    LEVELS: {"A": (12, 16), "B": (12, 16), "T": (16, 16), "HEAD": (16, 5)},
    AGAIN: {"IN": (12, 8), "U": (8, 24), "D": (24, 8), "OUT": (8, 5)},
}
OPTIONS = {"round_to": 1, "samples": 64, "measure": False, "cache": False, "criterion": "l1"}


def made(text: str, **changes: Any) -> onnx.ModelProto:
    model = onnx.parser.parse_model(text)
    for seed, (name, shape) in enumerate(SIZES[text].items()):
        weight = changes.get(name, draw(*shape, seed=seed) / np.sqrt(shape[0]))
        model.graph.initializer.append(numpy_helper.from_array(weight.astype(np.float32), name))
    return model


def low_rank(rows: int, columns: int, rank: int) -> Any:
    """Columns that any ``rank`` of them say all of."""
    return draw(rows, rank, seed=5) @ draw(rank, columns, seed=6) / np.sqrt(rows)


# --- the sum of several least squares


@pytest.mark.parametrize("wide", [False, True])
def test_moments_add_up_to_one_least_squares(wide: bool) -> None:
    """Each use about its own means, and weighed by its rows."""
    d, rows = (2200, 30) if wide else (6, 40)
    xs = [draw(1, rows + 7 * k, d, seed=k) + k for k in range(3)]
    ts = [draw(1, rows + 7 * k, 2, seed=10 + k) - k for k in range(3)]
    parts = []
    for x, t in zip(xs, ts, strict=True):
        sums = Sums.empty(x, t)
        sums.add(x, t)
        parts.append(sums.centred())
    found = pooled([pooled(parts[:2]), parts[2]])
    assert isinstance(found.xx, Thin) == wide
    centred = [(a[0] - a[0].mean(0)).astype(np.float64) for a in xs]
    targets = [(a[0] - a[0].mean(0)).astype(np.float64) for a in ts]
    whole, wanted = np.concatenate(centred), np.concatenate(targets)
    gram = found.xx.rows[0].T @ found.xx.rows[0] if isinstance(found.xx, Thin) else found.xx[0]
    np.testing.assert_allclose(gram, whole.T @ whole / len(whole), atol=1e-6)
    np.testing.assert_allclose(found.tx[0], wanted.T @ whole / len(whole), atol=1e-6)
    np.testing.assert_allclose(found.tt[0], np.square(wanted).mean(0), atol=1e-6)


def test_what_an_affine_map_leaves_of_other_rows() -> None:
    fit, other = (Sums.empty(x, t) for x, t in [(draw(1, 50, 4), draw(1, 50, 2))] * 2)
    rows = [(draw(1, 50, 4, seed=s) + s, draw(1, 50, 2, seed=s + 9) - s) for s in range(2)]
    fit.add(*rows[0])
    other.add(*rows[1])
    matrix = draw(1, 2, 4).astype(np.float64)
    first = fit.centred()
    found = about(other.centred(), first)
    bias = first.mean_t - np.einsum("gmd,gd->gm", matrix, first.mean_x)
    off = rows[1][0][0] @ matrix[0].T + bias[0] - rows[1][1][0]
    own = np.einsum("gmd,gde,gme->", matrix, found.xx, matrix)
    left = own - 2 * (matrix * found.tx).sum() + found.tt.sum()
    assert np.square(off).mean(0).sum() == pytest.approx(left, rel=1e-5)


# --- in which order


def nodes_of(prepared: Prepared) -> list[list[str]]:
    model = with_biases(prepared.analysis.model, shared(prepared.analysis.model))
    return [[u.weight for u in uses] for uses in turns(model, shared(model))]


def test_uses_beside_each_other_are_one_step() -> None:
    """The second layer of a head waits for the first one of all levels."""
    assert nodes_of(api.prepare(made(LEVELS))) == [["T", "T"], ["HEAD", "HEAD"]]


def test_uses_that_feed_each_other_take_turns() -> None:
    assert nodes_of(api.prepare(made(AGAIN))) == [["U"], ["D"], ["U"], ["D"], ["U"], ["D"]]


def test_crossed_uses_take_turns() -> None:
    """P before Q on one side, Q before P on the other."""
    b = Builder()
    p, q = b.weight(6, 6), b.weight(6, 6)
    y = b.add("MatMul", b.add("MatMul", "x", p), q)
    z = b.add("MatMul", b.add("MatMul", "x", q), p)
    found = nodes_of(api.prepare(b.model({"x": ["n", 6]}, {y: ["n", 6], z: ["n", 6]})))
    assert sorted(map(len, found)) == [1, 1, 1, 1]


def test_what_is_read_in_another_way_too_is_no_such_weight() -> None:
    """A tied embedding, another orientation, another scale."""
    for other in ("Gather", "Gemm", "scaled"):
        b = Builder()
        w = b.weight(6, 6)
        y = b.add("Gemm", "x", w)
        if other == "Gather":
            z = b.add("Gather", w, b.ints(0, 3))
        else:
            z = b.add("Gemm", "x", w, **({"transB": 1} if other == "Gemm" else {"alpha": 2.0}))
        prepared = api.prepare(b.model({"x": [2, 6]}, {y: [2, 6], z: [2, 6]}))
        assert shared(prepared.analysis.model) == []


# --- repairs


@pytest.mark.parametrize("form", [AFFINE, BIAS])
@pytest.mark.parametrize("text", [LEVELS, AGAIN])
def test_an_unpruned_model_stays_as_it_is(text: str, form: str) -> None:
    damage = damaged(api.prepare(made(text)), {})
    model, reports = reconstruct(damage, form)
    assert reports == ()
    assert content(model) == content(damage.pruned)


def test_predicted_error_is_the_measured_one() -> None:
    """Of the head's two uses: the mean of their errors over the variance of their targets."""
    prepared = api.prepare(made(LEVELS))
    feeds = samples(prepared, 4, 32)
    damage = damaged(prepared, {group_of(prepared, "T").index: [1, 5, 6]}, feeds)
    damage = damaged(prepared, {g: u[:3] for g, u in halves(prepared).items()}, feeds)
    model, reports = reconstruct(damage)
    (report,) = (r for r in reports if r.weight == "HEAD")
    for errors, result in ((report.before, None), (report.after, model)):
        assert errors is not None
        assert errors == pytest.approx(measured(damage, model, result), abs=1e-8, rel=1e-5)


def measured(damage: Any, repaired: Any, head: Any) -> float:
    """Mean relative error of the outputs behind what is repaired, with the head as it was cut
    (``None``) or as it is."""
    model = repaired
    if head is None:
        tensors = {**repaired.initializers}
        for name, tensor in tensors.items():
            if name.startswith("HEAD"):
                array = damage.pruned.array(name) if name == "HEAD" else np.zeros(5, np.float32)
                tensors[name] = numpy_helper.from_array(array, tensor.name)
        model = repaired.with_graph(repaired.nodes, tensors.values())
    first, second = session(damage.original, 1), session(model, 1)
    runs = [(run_session(first, f), run_session(second, f)) for f in damage.feeds]
    found = []
    for place in range(2):
        wanted = np.concatenate([a[place] for a, _ in runs]).astype(np.float64)
        got = np.concatenate([b[place] for _, b in runs]).astype(np.float64)
        found.append(np.square(wanted - got).sum() / np.square(wanted - wanted.mean(0)).sum())
    return float(np.mean(found))


def test_what_can_be_said_by_the_rest_is_restored() -> None:
    """A head of rank 5 on features of rank 5, in a linear network of two levels."""
    b = Builder()
    features = b.constant(low_rank(12, 16, 5).astype(np.float32), "A")
    other = b.constant((draw(12, 12) @ low_rank(12, 16, 5)).astype(np.float32), "B")
    head = b.constant(draw(16, 4), "HEAD")
    ends = [b.add("MatMul", b.add("MatMul", "x", name), head) for name in (features, other)]
    prepared = api.prepare(b.model({"x": ["n", 12]}, {name: ["n", 4] for name in ends}))
    gone = {group_of(prepared, "HEAD").index: list(range(0, 16, 2))}
    damage = damaged(prepared, gone, samples(prepared, 10, 32))
    model, (report,) = reconstruct(damage)
    assert (report.weight, report.uses) == ("HEAD", 2)
    assert error(damage, damage.pruned) > 0.1
    assert error(damage, model) < 1e-3
    assert {t.dims[0] for name, t in model.initializers.items() if name == "HEAD"} == {8}


@pytest.mark.parametrize("text", [LEVELS, AGAIN])
def test_other_inputs_gain(text: str) -> None:
    prepared = api.prepare(made(text))
    feeds = samples(prepared, 20, 32)
    damage = damaged(prepared, {g: u[::2] for g, u in halves(prepared).items()}, feeds[:16])
    for form, share in ((AFFINE, 0.75), (BIAS, 1.02)):
        model, reports = reconstruct(damage, form)
        assert {r.uses for r in reports if r.weight} == {2 if text is LEVELS else 3}
        assert error(damage, model, feeds[16:]) < share * error(damage, damage.pruned, feeds[16:])


def test_each_use_has_its_own_normalisation_behind_it() -> None:
    """They differ, so none of them is folded; the convolution is repaired before them."""
    b = Builder(3)
    shared_weight = b.weight(16, 12, 3, 3)
    ends = {}
    for _ in range(2):
        x = b.add("Relu", b.conv("x", 3, 12))
        x = b.add("Relu", b.norm(b.add("Conv", x, shared_weight, pads=[1] * 4), 16))
        ends[b.conv(x, 16, 4, kernel=1)] = ["n", 4, 6, 6]
    prepared = api.prepare(b.model({"x": ["n", 3, 6, 6]}, ends))
    feeds = samples(prepared, 12, 8)
    damage = damaged(prepared, {g: u[::2] for g, u in halves(prepared).items()}, feeds[:8])
    model, reports = reconstruct(damage)
    assert sum(node.op_type == "BatchNormalization" for node in model.nodes) == 2
    assert [r.uses for r in reports if r.weight] == [2]
    assert error(damage, model, feeds[8:]) < 0.5 * error(damage, damage.pruned, feeds[8:])


def test_without_room_for_waiting_matrices_means_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(under_test, "ROOM", 6 * 8 * 8**2)  # for U alone
    prepared = api.prepare(made(AGAIN))
    damage = damaged(prepared, {group_of(prepared, "U").index: [0, 3, 4]})
    _, reports = reconstruct(damage)
    assert [r.how == "bias" for r in reports if r.weight == "D"] == [True]


# --- in the product


@pytest.mark.parametrize("repair", ["obs", "bias", "moments", "none"])
def test_what_no_repair_makes_up_for_is_said(repair: str) -> None:
    result = api.prune(made(LEVELS), flops=0.5, repair=repair, **OPTIONS)
    assert result.verdict.passed
    said = [note for note in result.notes if "whose weights others read" in note]
    assert len(said) == (repair == "moments")
    assert {r.weight for r in result.repairs} >= ({"HEAD"} if repair in ("obs", "bias") else set())


@pytest.mark.parametrize("text", [LEVELS, AGAIN])
def test_a_plan_gives_the_same_bytes_again(text: str) -> None:
    model = made(text)
    first = api.prune(model, flops=0.5, **OPTIONS)
    again = api.apply(model, first.plan, options=Options(measure=False, cache=False))
    assert first.repairs
    assert first.model.SerializeToString(True) == again.model.SerializeToString(True)
