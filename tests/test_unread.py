"""What a Split, a Slice or a Gather leaves out, and what leads nowhere else, is worth nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from graphs import Builder
from idle_forms import cleaned, counts, widths
from onnx import numpy_helper

from graphprune import api
from graphprune.analysis import Scope, analyse
from graphprune.coupling import Mask
from graphprune.criteria import Scoring, score
from graphprune.cut import cut
from graphprune.oracle import law_error
from graphprune.prepared import Prepared
from graphprune.runtime import random_inputs, run_session, session
from graphprune.storage import load
from graphprune.unread import unread_units

HEAD = '<ir_version: 8, opset_import: ["": 17]> g (float[2,3,5,5] x) => (float[2,4,5,5] y)'
FIRST = "h = Conv(x, A, B) r = Relu(h)"
WIDE = {"A": (16, 3, 1, 1), "B": (16,), "V": (4, 8, 1, 1)}
FOUR = {**WIDE, "V": (4, 4, 1, 1)}
# name → text, weights; how many of the first convolution's outputs nobody reads, and the operators
# that are left once these have gone
FORMS: dict[str, tuple[str, dict[str, Any], int, str]] = {
    "split": (
        f"<int64[2] s = {{8, 8}}> {{ {FIRST} a, b = Split<axis=1>(r, s) y = Conv(a, V) }}",
        WIDE,
        8,
        "Conv Relu Conv",
    ),
    "middle piece": (
        f"<int64[3] s = {{4, 8, 4}}> {{ {FIRST} a, b, c = Split<axis=1>(r, s) y = Conv(b, V) }}",
        WIDE,
        8,
        "Conv Relu Conv",
    ),
    "two pieces of three": (
        f"<int64[3] s = {{4, 8, 4}}> "
        f"{{ {FIRST} a, b, c = Split<axis=1>(r, s) d = Add(a, c) y = Conv(d, V) }}",
        FOUR,
        8,
        "Conv Relu Split Add Conv",
    ),
    "slice": (
        "<int64[1] s = {4}, int64[1] e = {12}, int64[1] i = {1}> "
        f"{{ {FIRST} a = Slice(r, s, e, i) y = Conv(a, V) }}",
        WIDE,
        8,
        "Conv Relu Conv",
    ),
    "end": (
        "<int64[1] s = {-8}, int64[1] e = {99}, int64[1] i = {1}> "
        f"{{ {FIRST} a = Slice(r, s, e, i) y = Conv(a, V) }}",
        WIDE,
        8,
        "Conv Relu Conv",
    ),
    "gather": (
        f"<int64[4] i = {{3, 12, 7, 0}}> {{ {FIRST} a = Gather<axis=1>(r, i) y = Conv(a, V) }}",
        FOUR,
        12,
        "Conv Relu Gather Conv",
    ),
    "gather in order": (
        f"<int64[4] i = {{1, 5, 7, 12}}> {{ {FIRST} a = Gather<axis=1>(r, i) y = Conv(a, V) }}",
        FOUR,
        12,
        "Conv Relu Conv",
    ),
    "chain": (
        "<int64[1] s = {0}, int64[1] e = {12}, int64[1] i = {1}, int64[2] t = {8, 4}> "
        "{ h = Conv(x, A, B) p = Slice(h, s, e, i) r = Relu(p) a, b = Split<axis=1>(r, t) "
        "y = Conv(a, V) }",
        WIDE,
        8,
        "Conv Relu Conv",
    ),
}


def made(text: str, weights: dict[str, Any]) -> onnx.ModelProto:
    model = onnx.parser.parse_model(f"{HEAD} {text}")
    rng = np.random.default_rng(0)
    for name, shape in weights.items():
        array = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    return model


def unread(prepared: Prepared) -> Mask:
    return unread_units(prepared.analysis.model, prepared.analysis.coupling)


@pytest.mark.parametrize("name", FORMS)
def test_what_nobody_reads_leaves_and_so_does_the_copy(name: str) -> None:
    text, weights, gone, operators = FORMS[name]
    prepared = cleaned(made(text, weights))
    assert counts(prepared) == (gone, 0, 0)
    assert widths(prepared, "A", "V") == [(16 - gone, 3, 1, 1), weights["V"]]
    assert " ".join(node.op_type for node in prepared.analysis.model.nodes) == operators


@pytest.mark.parametrize("name", FORMS)
def test_law_3_holds_without_them(name: str) -> None:
    """Not a contraction is masked: the cut model must be the original itself."""
    text, weights, gone, _ = FORMS[name]
    found = analyse(load(made(text, weights)))
    removed = unread_units(found.model, found.coupling)
    assert removed.sum() == gone
    alive = found.coupling.alive(removed)
    smaller, _ = cut(found.model, found.shapes, found.coupling, alive)
    feeds = random_inputs(found.model, found.shapes)
    assert law_error(found.model, smaller, found.shapes, found.coupling, alive, feeds) < 1e-6


def test_what_is_only_read_by_something_unread() -> None:
    """The second branch is computed, put beside the first, and cut away; one channel of every axis
    stays."""
    text = """<int64[1] s = {0}, int64[1] e = {8}, int64[1] i = {1}>
    { h = Conv(x, A) p = Conv(x, C) q = Relu(p) k = Conv(q, D) c = Concat<axis=1>(h, k)
      a = Slice(c, s, e, i) y = Conv(a, V) }"""
    first, other = (8, 3, 1, 1), (8, 8, 1, 1)
    model = made(text, {"A": first, "C": first, "D": other, "V": (4, 8, 1, 1)})
    assert unread(api.prepare(model, Scope(lossless=False))).sum() == 16
    prepared = cleaned(model)
    assert counts(prepared) == (14, 0, 0)
    assert widths(prepared, "A", "C", "D") == [first, (1, 3, 1, 1), (1, 1, 1, 1)]


def test_counts_of_a_convolution_stay_multiples() -> None:
    """Of 16 outputs 5 are not read: 12 stay, and a Split of what is read."""
    text, weights, _, _ = FORMS["split"]
    odd = made(text.replace("{8, 8}", "{11, 5}"), {**weights, "V": (4, 11, 1, 1)})
    prepared = cleaned(odd)
    assert counts(prepared) == (4, 0, 0)
    assert widths(prepared, "A") == [(12, 3, 1, 1)]


def test_statistics_and_outputs_are_readers() -> None:
    b = Builder(0)
    h = b.add("MatMul", "x", b.weight(6, 8))
    a, c = b.add("Split", h, b.ints(4, 4), outputs=2, axis=1)
    y = b.add("Softmax", a, axis=1)
    z = b.add("Add", b.add("ReduceMean", h, axes=[1]), b.add("ReduceMax", c, axes=[1]))
    prepared = api.prepare(b.model({"x": [2, 6]}, {y: [2, 4], z: [2, 1]}), Scope(lossless=False))
    assert not unread(prepared).any()


@pytest.mark.parametrize("name", ["random", "l1", "l2", "fpgm", "lamp", "bn-scale", "dfpc"])
def test_every_criterion_on_weights_puts_them_first(name: str) -> None:
    for text, weights, gone, _ in FORMS.values():
        prepared = api.prepare(made(text, weights), Scope(lossless=False))
        analysis = prepared.analysis
        criterion = prepared.registry.criterion(name)
        for normalise in (None, "standardise"):
            scoring = Scoring(normalise=normalise)
            scores = score(analysis.model, analysis.coupling, criterion, scoring)
            first = np.argsort(scores, kind="stable")[:gone]
            assert unread(prepared)[first].all()
            assert scores[unread(prepared)].max() <= scores[~unread(prepared)].min(initial=0.0)


@pytest.mark.parametrize("criterion", ["l1", "obspa", "wanda"])
def test_they_leave_first_on_inputs_and_weights(criterion: str) -> None:
    """A budget that they alone can meet takes nothing else, and changes nothing."""
    text, weights, _, _ = FORMS["slice"]
    found = api.prune(
        made(text, weights),
        flops=0.75,
        criterion=criterion,
        repair="none",
        round_to=1,
        min_channels=1,
        samples=16,
        measure=False,
        cache=False,
        lossless=False,
    )
    shapes = {t.name: tuple(t.dims) for t in found.model.graph.initializer}
    assert shapes["V"] == weights["V"]
    assert shapes["A"][0] < weights["A"][0]


def test_dead_ends_hold_nothing_in_place() -> None:
    """Nodes that lead nowhere, the second by way of the first, and a use of a shared weight."""
    b = Builder(0)
    h = b.add("Relu", b.conv("x", 3, 16))
    weight = b.weight(8, 16, 1, 1)
    y = b.add("Conv", h, weight)
    b.add("Relu", b.add("Conv", h, weight))
    model = b.model({"x": [2, 3, 5, 5]}, {y: [2, 8, 5, 5]})
    for lossless in (True, False):
        prepared = api.prepare(model, Scope(lossless=lossless))
        assert len(prepared.analysis.model.nodes) == 3
        assert [len(group) for group in prepared.analysis.coupling.groups] == [16]
    assert not prepared.moved


LENGTHS = """<ir_version: 8, opset_import: ["": 17]> g (float[b,n,8] x) => (float[b,n,4] y)
<int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] two = {{2}}> {{
  shape = Shape(x) n = Slice(shape, one, two) {steps} rows = {rows}
  turned = Transpose<perm = [1, 0]>(rows) near = MatMul(x, turned) sum = MatMul(near, rows)
  hidden = MatMul(sum, A) r = Relu(hidden) y = MatMul(r, B)
}}"""


@pytest.mark.parametrize(
    ("steps", "rows"),
    [
        ("", "Slice(table, zero, n, zero)"),
        ("twice = Mul(n, two)", "Slice(table, n, twice, zero)"),
        ("less = Neg(n)", "Slice(table, less, all, zero)"),
        ("less = Sub(all, n) sizes = Concat<axis=0>(n, less) rows, rest = Split(table, sizes)", ""),
    ],
)
def test_rows_that_other_lengths_read_stay(steps: str, rows: str) -> None:
    """A table of positions, of which the length of the input decides the part that is read."""
    text = LENGTHS if rows else LENGTHS.replace("rows = {rows}", "")
    proto = onnx.parser.parse_model(text.format(steps=steps, rows=rows))
    rng = np.random.default_rng(0)
    sizes = {"table": (128, 8), "A": (8, 32), "B": (32, 4)}
    arrays: dict[str, Any] = {n: rng.normal(size=s).astype("f4") for n, s in sizes.items()}
    arrays["all"] = np.array([128])
    proto.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in arrays.items())
    clean, pruned = (
        load(api.prune(proto, share, criterion="l1", repair="none", measure=False).model)
        for share in (None, 0.7)
    )
    x = rng.normal(size=(2, 50, 8)).astype("f4")
    (expected,) = run_session(session(load(proto)), {"x": x})
    np.testing.assert_allclose(run_session(session(clean), {"x": x})[0], expected, rtol=1e-4)
    assert run_session(session(pruned), {"x": x})[0].shape == (2, 50, 4)
