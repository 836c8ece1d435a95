"""--allow-inexact: slots leave that statistics are taken over, and the proof takes them anew."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import Ran
from graphs import Builder, attention
from onnx import numpy_helper, parser

from graphprune.analysis import Scope
from graphprune.api import apply, prepare, prune
from graphprune.check import LawBrokenError, check_rule
from graphprune.cut import cut
from graphprune.errors import VerificationError
from graphprune.explain import explain, parse_place
from graphprune.options import Options
from graphprune.rules import BUILTIN
from graphprune.rules.op import Op
from graphprune.validate import TOLERANCE, verify

Run = Callable[..., Ran]
FREE = Scope(inexact=True)
QUICK = {"allow_inexact": True, "round_to": 1, "min_channels": 1, "rounds": 5}
HEAD = '<ir_version: 8, opset_import: ["": {opset}]> g ({inputs}) => ({outputs}) '


# --- the rules: what is free with statistics obeys the law over the survivors

RULES = {  # operator: opset, inputs, outputs, body
    "LayerNormalization": (17, "float[2,3,6] x, float[6] s, float[6] b", "float[2,3,6] y",
                           "y = LayerNormalization(x, s, b)"),
    "LayerNormalization of two axes": (17, "float[2,4,6] x, float[4,6] s", "float[2,4,6] y",
                                       "y = LayerNormalization<axis=1>(x, s)"),
    "LayerNormalization all outputs": (17, "float[2,3,6] x, float[6] s",
        "float[2,3,6] y, float[2,3,1] m, float[2,3,1] d", "y, m, d = LayerNormalization(x, s)"),
    "RMSNormalization": (23, "float[2,3,6] x, float[6] s", "float[2,3,6] y",
                         "y = RMSNormalization(x, s)"),
    "InstanceNormalization": (17, "float[2,6,4] x, float[6] s, float[6] b", "float[2,6,4] y",
                              "y = InstanceNormalization(x, s, b)"),
    "GroupNormalization 18 of one group": (18, "float[1,8,4] x, float[1] s, float[1] b",
        "float[1,8,4] y", "y = GroupNormalization<num_groups=1>(x, s, b)"),
    "GroupNormalization 21 of one group": (21, "float[1,8,4] x, float[8] s, float[8] b",
        "float[1,8,4] y", "y = GroupNormalization<num_groups=1>(x, s, b)"),
    "Softmax": (13, "float[2,3,6] x", "float[2,3,6] y", "y = Softmax<axis=1>(x)"),
    "Softmax before 13": (11, "float[2,3,6] x", "float[2,3,6] y", "y = Softmax<axis=1>(x)"),
    "ReduceMean": (13, "float[2,3,6] x", "float[2,3,1] y", "y = ReduceMean<axes=[2]>(x)"),
    "ReduceMax without keepdims": (13, "float[2,3,6] x", "float[2,6] y",
                                   "y = ReduceMax<axes=[1], keepdims=0>(x)"),
    "LRN": (13, "float[3,6,2,2] x", "float[3,6,2,2] y", "y = LRN<size=3>(x)"),
    "CumSum": (14, "float[2,6] x", "float[2,6] y",
               "a = Constant<value = int64 {1}>() y = CumSum(x, a)"),
    "MeanVarianceNormalization": (13, "float[2,6,3,3] x", "float[2,6,3,3] y",
                                  "y = MeanVarianceNormalization<axes=[0,1,2,3]>(x)"),
    "decomposed": (17, "float[2,3,6] x, float[6] s", "float[2,3,6] y",
        "m = ReduceMean<axes=[-1]>(x) d = Sub(x, m) q = Mul(d, d) v = ReduceMean<axes=[-1]>(q) "
        "r = Sqrt(v) n = Div(d, r) y = Mul(n, s)"),
    "GRN": (17, "float[1,4,4,6] x, float[6] s", "float[1,4,4,6] y",
        "g = ReduceL2<axes=[1,2]>(x) m = ReduceMean<axes=[-1]>(g) n = Div(g, m) "
        "k = Mul(x, n) w = Mul(k, s) y = Add(w, x)"),
}  # fmt: skip


def text(name: str) -> str:
    opset, inputs, outputs, body = RULES[name]
    return HEAD.format(opset=opset, inputs=inputs, outputs=outputs) + "{" + body + "}"


@pytest.mark.parametrize("name", RULES)
def test_law_holds_over_the_survivors(name: str) -> None:
    assert check_rule(text(name), inexact=True).passed


def test_a_wrong_rule_is_caught() -> None:
    def careless(op: Op) -> None:
        """The scale is tied the wrong way round."""
        op.same(op.input(0), op.output())
        op.tie(op.input(1)[0].slots[::-1], op.input(0)[2])
        op.free(op.input(2)[0])
        op.shift(op.input(0)[2])

    name = "LayerNormalization"
    with pytest.raises(LawBrokenError):
        check_rule(text(name), rules={**BUILTIN, ("", name): careless}, inexact=True)

    def forgetful(op: Op) -> None:
        """The number of groups is not counted: the original keeps it, the cut model too."""
        BUILTIN["", "GroupNormalization"](op)
        op.relations.counts.clear()

    source = text("GroupNormalization 21 of one group").replace("num_groups=1", "num_groups=4")
    with pytest.raises(LawBrokenError):
        check_rule(source, rules={**BUILTIN, ("", "GroupNormalization"): forgetful}, inexact=True)


def test_statistics_that_a_rule_forgets_are_caught() -> None:
    """Without a shift nothing says that the original takes them over the survivors."""

    def exact(op: Op) -> None:
        op.same(op.input(0), op.output())
        for parameter in (1, 2):
            op.tie(op.input(parameter)[0], op.input(0)[2])

    rules = {**BUILTIN, ("", "LayerNormalization"): exact}
    with pytest.raises(LawBrokenError):
        check_rule(text("LayerNormalization"), rules=rules, inexact=True)


# --- whole models


def mlp() -> onnx.ModelProto:
    """A residual width of 24 under LayerNormalization, hidden 20, and a head of 5 classes."""
    b = Builder()
    width = b.add("MatMul", "x", b.weight(6, 24))
    scale, bias = b.weight(24), b.weight(24)
    normal = b.add("LayerNormalization", width, scale, bias)
    hidden = b.add("Relu", b.add("MatMul", normal, b.weight(24, 20)))
    width = b.add("Add", width, b.add("MatMul", hidden, b.weight(20, 24)))
    normal = b.add("LayerNormalization", width, b.weight(24), b.weight(24))
    y = b.add("MatMul", normal, b.weight(24, 5))
    return b.model({"x": ["n", 3, 6]}, {y: ["n", 3, 5]})


def grn() -> onnx.ModelProto:
    """Global response normalisation (arXiv 2301.00808, algorithm 1): every channel is under it."""
    b = Builder()
    x = b.add("Transpose", b.conv("x", 3, 24), perm=[0, 2, 3, 1])
    norm = b.add("ReduceL2", x, axes=[1, 2])
    mean = b.add("ReduceMean", norm, axes=[-1])
    scaled = b.add("Mul", x, b.add("Div", norm, mean))
    x = b.add("Add", b.add("Mul", scaled, b.weight(24)), x)
    pooled = b.add("ReduceMean", x, axes=[1, 2], keepdims=0)
    y = b.add("MatMul", pooled, b.weight(24, 5))
    return b.model({"x": ["n", 3, 6, 6]}, {y: ["n", 5]})


def group_norm(groups: int) -> onnx.ModelProto:
    b = Builder(opset=21)
    x = b.conv("x", 3, 24)
    x = b.add("Relu", b.add("GroupNormalization", x, b.weight(24), b.weight(24), num_groups=groups))
    y = b.conv(x, 24, 5)
    return b.model({"x": ["n", 3, 6, 6]}, {y: ["n", 5, 6, 6]}, ir_version=10)


def tied_decoder() -> onnx.ModelProto:
    """The table of words is read at the beginning, and transposed at the end."""
    b = Builder()
    table = b.weight(30, 24)
    x = b.add("Gather", table, b.add("Cast", "ids", to=onnx.TensorProto.INT64))
    normal = b.add("LayerNormalization", x, b.weight(24))
    x = b.add("Add", x, b.add("MatMul", b.add("Tanh", normal), b.weight(24, 24)))
    normal = b.add("LayerNormalization", x, b.weight(24))
    y = b.add("MatMul", normal, b.add("Transpose", table))
    return b.model({"ids": ["n", 4]}, {y: ["n", 4, 30]})


MODELS = {  # model → units under statistics
    "mlp": (mlp, [24]),
    "grn": (grn, [24]),
    "one group": (lambda: group_norm(1), [24]),
    "tied decoder": (tied_decoder, [24]),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", [{"fast": True}, {"samples": 64}], ids=["fast", "calibrated"])
def test_units_leave_under_statistics(name: str, way: dict[str, object]) -> None:
    make, units = MODELS[name]
    source = make()
    groups = prepare(source, FREE).analysis.coupling.groups
    assert [len(g) for g in groups if len(g) == 24] == units
    result = prune(source, flops=0.5, **QUICK, **way)
    assert result.verdict.passed
    assert result.verdict.relative_error is not None
    assert result.verdict.relative_error <= TOLERANCE
    assert result.verdict.shift is not None
    assert result.verdict.shift > 10 * TOLERANCE  # so the proof is of something
    assert sum(entry.units for entry in result.inexact) > 0
    assert "inexact" in str(result)
    assert apply(source, result.plan, options=Options(measure=False)).model == result.model


@pytest.mark.parametrize("name", MODELS)
def test_nothing_of_it_unasked(name: str) -> None:
    source = MODELS[name][0]()
    assert not [g for g in prepare(source).analysis.coupling.groups if len(g) == 24]


def test_statistics_over_symbolic_sizes() -> None:
    """Channels, height and width in one axis, whose length nobody knows before run time."""
    b = Builder()
    x = b.conv("x", 3, 24)
    rows = b.add("Reshape", x, b.ints(0, 1, -1))
    centred = b.add("Sub", rows, b.add("ReduceMean", rows, axes=[2]))
    x = b.add("Reshape", centred, b.add("Shape", x))
    y = b.conv(b.add("Relu", x), 24, 5)
    source = b.model({"x": ["n", 3, "h", "w"]}, {y: ["n", 5, "h", "w"]})
    result = prune(source, flops=0.5, **QUICK, fast=True)
    assert result.verdict.passed
    assert [entry.units for entry in result.inexact] == [12]


def test_exact_parts_leave_first() -> None:
    """Whole groups are exact: they carry the removal with the option as without."""
    for scope in (Scope(), FREE):
        coupling = prepare(group_norm(8), scope).analysis.coupling
        assert [len(group) for group in coupling.groups] == [8]
    result = prune(group_norm(8), flops=0.5, **QUICK, fast=True)
    assert result.inexact == ()
    assert result.verdict.shift is None


def test_without_statistics_the_option_changes_nothing() -> None:
    source = attention()
    bare, free = (
        prune(source, flops=0.7, fast=True, allow_inexact=on, round_to=1, measure=False)
        for on in (False, True)
    )
    assert bare.model == free.model
    assert free.inexact == ()


def test_a_wrong_cut_is_still_found() -> None:
    """The proof is of equality: another unit's weights are seen."""
    analysis = prepare(mlp(), FREE).analysis
    group = max(analysis.coupling.groups, key=len)
    removed, other = analysis.nothing_removed, analysis.nothing_removed
    removed[group.units[:4]] = True
    other[group.units[1:5]] = True
    alive = analysis.coupling.alive(other)
    model, _ = cut(analysis.model, analysis.shapes, analysis.coupling, alive)
    verify(analysis, model, other)
    with pytest.raises(VerificationError):
        verify(analysis, model, removed)


def test_statistics_in_a_body() -> None:
    """What surrounds a normalisation for the proof is in its body too."""
    source = parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]> g (float[2,6] x, float[5] go) => (float[2,3] y) {
          h = MatMul(x, w) s = ReduceSum<keepdims=0>(go)
          zero = Constant<value = float {0}>() c = Greater(s, zero)
          z = If(c) <
            then_branch = t () => (float[2,16] p) { n = LayerNormalization(h, k) p = Relu(n) },
            else_branch = e () => (float[2,16] p) { p = Softmax(h) }>
          y = MatMul(z, v) }"""
    )
    rng = np.random.default_rng(0)
    for name, shape in {"w": (6, 16), "k": (16,), "v": (16, 3)}.items():
        array = rng.standard_normal(shape).astype(np.float32)
        source.graph.initializer.append(numpy_helper.from_array(array, name))
    result = prune(source, flops=0.5, **QUICK, fast=True)
    assert [entry.units for entry in result.inexact] == [8]
    assert result.verdict.passed


def test_with_states_of_the_interface() -> None:
    """Both options: a state that is normalised by its layer."""
    b = Builder()
    step = b.add(
        "Add", b.add("MatMul", "x", b.weight(6, 24)), b.add("MatMul", "h", b.weight(24, 24))
    )
    new = b.add("Add", "h", b.add("Tanh", b.add("LayerNormalization", step, b.weight(24))))
    y = b.add("MatMul", new, b.weight(24, 5))
    source = b.model({"x": ["n", 6], "h": ["n", 24]}, {y: ["n", 5], new: ["n", 24]})
    for scope in (FREE, Scope(interface=True)):
        assert prepare(source, scope).analysis.coupling.n_units == 0
    result = prune(source, flops=0.5, allow_interface_change=True, **QUICK, samples=64)
    assert result.verdict.passed
    assert {end.name for end in result.interface} == {"h", new}
    assert result.inexact


def test_the_command_line(run: Run, tmp_path: Path) -> None:
    path, out = tmp_path / "model.onnx", tmp_path / "out.onnx"
    onnx.save(grn(), path)
    asked = (path, "--target-flops", 0.5, "--fast", "--round-to", 1, "-o", out)
    refused = run(*asked)
    assert refused.code == 8
    assert "--allow-inexact" in refused.err
    ran = run(*asked, "--allow-inexact", "--json")
    assert ran.code == 0
    document = json.loads(ran.out)
    assert document["options"]["allow_inexact"] is True
    assert [entry["reason"] for entry in document["inexact"]] == [
        "ReduceMean takes statistics over the axis"
    ]
    assert document["verified"]["relative_error_with_all_statistics"] > 0
    assert "inexact" in ran.err
    listed = run("inspect", path, "--allow-inexact", "--json")
    assert [group["inexact"] for group in json.loads(listed.out)["groups"]] == [True]
    assert "(inexact)" in run("inspect", path, "--allow-inexact").out


def test_explained() -> None:
    analysis = prepare(mlp(), FREE).analysis
    place = parse_place(analysis, analysis.coupling.groups[0].name)
    assert "inexact: LayerNormalization takes statistics" in explain(analysis, place)
