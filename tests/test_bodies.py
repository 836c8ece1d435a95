"""Control flow and functions: bodies are analysed and cut like everything else, and proved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from body_forms import LAW, RNG, WEIGHTS, feeds_for, outputs_of, parsed
from graphs import Builder, random_cnn
from onnx import TensorProto, helper

from graphprune.api import apply, prepare, prune
from graphprune.branches import rewritten_branches
from graphprune.check import check_rule
from graphprune.control import bodies, regions
from graphprune.cut import cut
from graphprune.errors import VerificationError
from graphprune.model import Model
from graphprune.storage import load
from graphprune.validate import verify


@pytest.mark.parametrize("condition", [True, False])
@pytest.mark.parametrize("name", LAW)
def test_law_holds(name: str, condition: bool) -> None:
    model = parsed(*LAW[name])
    assert check_rule(model, feeds_for(model, condition)).passed


@pytest.mark.parametrize("name", LAW)
def test_opened_and_closed_again(name: str) -> None:
    """Nothing is lost on the way, and a second opening finds the same names."""
    model = load(parsed(*LAW[name]))
    flat = model.opened
    assert not any(bodies(node) for node in flat.nodes)
    closed = flat.closed
    assert closed.opened.nodes == flat.nodes
    proto = closed.assemble()
    onnx.checker.check_model(proto, full_check=True)
    feeds = feeds_for(proto, True)
    for a, b in zip(outputs_of(model.assemble(), feeds), outputs_of(proto, feeds), strict=True):
        np.testing.assert_array_equal(a, b)


def as_if(then: onnx.ModelProto, other: onnx.ModelProto) -> onnx.ModelProto:
    """One big If of two models with the same interface; the weights are inside, their names are
    often the same."""
    inputs = [*then.graph.input, helper.make_tensor_value_info("choice", TensorProto.BOOL, [])]
    outputs = [v.name for v in then.graph.output]
    branches = []
    for model in (then, other):
        body = onnx.GraphProto()
        body.CopyFrom(model.graph)
        del body.input[:]
        branches.append(body)
    node = helper.make_node(
        "If", ["choice"], [f"{o}_out" for o in outputs], "if",
        then_branch=branches[0], else_branch=branches[1],
    )  # fmt: skip
    declared = []
    for value in then.graph.output:
        shown = onnx.ValueInfoProto()
        shown.CopyFrom(value)
        shown.name += "_out"
        declared.append(shown)
    graph = helper.make_graph([node], "g", inputs, declared)
    return helper.make_model(graph, opset_imports=then.opset_import, ir_version=8)


@pytest.mark.parametrize("seed", range(6))
def test_one_big_if(seed: int) -> None:
    """Both branches get smaller, each is proved, and each computes what its own model does."""
    model = as_if(random_cnn(seed), random_cnn(seed + 100))
    result = prune(model, flops=0.6, **WEIGHTS)
    assert result.verdict.passed
    onnx.checker.check_model(result.model, full_check=True)
    (node,) = result.model.graph.node
    assert [len(b.node) > 1 for b in bodies(node)] == [True, True]
    x = RNG.standard_normal((2, 3, 4, 4)).astype(np.float32)
    for choice in (True, False):
        (y,) = outputs_of(result.model, {"x": x, "choice": np.array(choice)})
        assert y.shape == (2, 5)


def test_default_run_scores_bodies_by_weights_and_says_so(tmp_path: Path) -> None:
    b = Builder(3)
    x = b.add("Relu", b.conv("x", 3, 16))
    then, other = (
        onnx.compose.add_prefix(random_cnn(s), f"{s}/", rename_inputs=False) for s in (2, 7)
    )
    inner = as_if(then, other).graph.node[0]
    y = b.add("MatMul", b.add("Flatten", b.add("GlobalAveragePool", x)), b.weight(16, 5))
    model = b.model({"x": ["n", 3, 4, 4]}, {y: ["n", 5]})
    model.graph.input.append(helper.make_tensor_value_info("choice", TensorProto.BOOL, []))
    model.graph.node.append(inner)
    model.graph.node.append(helper.make_node("Add", [y, inner.output[0]], ["sum"]))
    model.graph.output[0].name = "sum"
    result = prune(model, flops=0.6, measure=False, cache=False, output=tmp_path / "out.onnx")
    assert result.verdict.passed
    assert any("weights alone" in note for note in result.notes)
    assert result.repairs  # what stands outside is repaired as ever
    again = apply(model, result.plan, options=None)
    assert again.model.graph.ByteSize() == result.model.graph.ByteSize()


def test_default_run_on_one_big_if() -> None:
    model = as_if(random_cnn(2), random_cnn(7))
    result = prune(model, flops=0.6, measure=False, cache=False)
    assert result.verdict.passed
    assert not result.repairs
    assert any("weights alone" in note for note in result.notes)


def test_macs_of_bodies() -> None:
    """Both branches count; a Loop or Scan counts every turn, or one where only its data stop it."""
    inside = "k = MatMul(s, w) o = Tanh(k)"
    loop = parsed("float[2,6] x, float[6,6] w", "float[2,6] y", f"""
        n = Constant<value = int64 {{7}}>()
        y = Loop(n, , x) <body = b (int64 i, bool go, float[2,6] s) => (bool on, float[2,6] o)
            {{ on = Identity(go) {inside} }}>""")  # fmt: skip
    once = 2 * 6 * 6
    # TensorFlow's: both counters are below the length, which is state
    counted = parsed("float[2,6] x, float[6,6] w", "float[2,6] y, float[?,2,6] all", f"""
        n = Constant<value = int64 {{24}}>() t0 = Constant<value = int32 {{0}}>()
        m = Constant<value = int32 {{5}}>() one = Constant<value = int32 {{1}}>()
        go0 = Less(t0, m)
        e, f, y, all = Loop(n, go0, m, t0, x)
            <body = b (int64 i, bool go, int32 m1, int32 t1, float[2,6] s)
                => (bool on, int32 m2, int32 t2, float[2,6] o, float[2,6] each)
            {{ {inside} each = Neg(o) t2 = Add(t1, one) m2 = Identity(m1) j = Cast<to=1>(i)
               last = Cast<to=1>(m1) a = Less(j, last) c = Less(t2, m1) on = And(a, c) }}>
        """)  # fmt: skip
    endless = parsed("float[2,6] x, float[6,6] w, bool go0", "float[2,6] y", f"""
        n = Constant<value = int64 {{9223372036854775807}}>()
        y = Loop(n, go0, x) <body = b (int64 i, bool go, float[2,6] s) => (bool on, float[2,6] o)
            {{ on = Not(go) {inside} }}>""")  # fmt: skip
    for model, expected in (
        (loop, 7 * once),
        (counted, 5 * once),
        (endless, once),
        (parsed(*LAW["If inside If"]), 2 * 6 * 8 + 3 * 2 * 8 * 7 + 2 * 7 * 5),
        (parsed(*LAW["Scan"]), 4 * (2 * 6 * 6 + 2 * 3 * 6) + 2 * 6 * 5),
    ):
        analysis = prepare(model).analysis
        assert analysis.cost.of(analysis.nothing_removed).macs == expected


def test_loop_that_its_counters_stop_has_a_known_length() -> None:
    """What a Loop stacks can then be pruned; where the count hangs on data, it stays unknown."""
    for limit, free in (
        ("Constant<value = int32 {3}>()", True),
        ("ReduceMax<keepdims=0>(k)", False),
    ):
        model = parsed("float[2,4] x, int32[1] k, float[4,6] w, float[6,6] u, float[6,5] v",
            "float[?,2,5] y", f"""
            h = MatMul(x, w) n = Constant<value = int64 {{9}}>()
            t0 = Constant<value = int32 {{0}}>()
            one = Constant<value = int32 {{1}}>() m = {limit} go0 = Less(t0, m)
            t, s, all = Loop(n, go0, t0, h) <body = b (int64 i, bool go, int32 t1, float[2,6] s1)
                => (bool on, int32 t2, float[2,6] s2, float[2,6] each)
                {{ t2 = Add(t1, one) k1 = MatMul(s1, u) s2 = Tanh(k1) each = Neg(s2)
                   on = Less(t2, m) }}>
            y = MatMul(all, v)""")  # fmt: skip
        shapes = prepare(model).analysis.shapes
        assert shapes.shape["all"] == ((3, 2, 6) if free else None)
        checked = check_rule(model, {**feeds_for(model, True), "k": np.array([3], np.int32)})
        assert checked.passed or not free


PINNED = {
    "If: different or unknown shapes": parsed(
        "bool c, float[2,6] x, float[6,4] v", "float[?,4] y",
        """s = Constant<value = int64[2] {6, 6}>() w = ConstantOfShape<value = float[1] {1}>(s)
           h = MatMul(x, w)
           z = If(c) <then_branch = t () => (float[2,6] p) { p = Relu(h) },
                      else_branch = e () => (float[4,6] p) { p = Concat<axis=0>(h, h) }>
           y = MatMul(z, v)"""),
    "Loop: different or unknown shapes": parsed(
        "float[2,6] x, float[6,4] v", "float[?,4] y",
        """s = Constant<value = int64[2] {6, 6}>() w = ConstantOfShape<value = float[1] {1}>(s)
           h = MatMul(x, w) n = Constant<value = int64 {3}>()
           z = Loop(n, , h) <body = b (int64 i, bool go, float[?,6] p) => (bool on, float[?,6] o)
                { on = Identity(go) o = Concat<axis=0>(p, p) }>
           y = MatMul(z, v)"""),
}  # fmt: skip


@pytest.mark.parametrize("reason", PINNED)
def test_pinned_with_a_reason(reason: str, tmp_path: Path, run: Any) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(PINNED[reason], path)
    explained = run("explain", path, "h:1")
    assert explained.code == 0
    assert reason in " ".join(explained.out.split())
    shown = run("inspect", path)
    assert reason in " ".join(shown.out.replace("│", " ").split())


def broken(flat: Model, token: str) -> Model:
    """One weight that is read in the body of this token, changed."""
    for node, inside in zip(flat.nodes, regions(flat.nodes), strict=True):
        if inside[-1:] == (token,) and node.op_type in ("Conv", "MatMul", "Gemm"):
            name = next(n for n in node.input if n in flat.initializers)
            tensors = dict(flat.initializers)
            new = onnx.numpy_helper.from_array(-flat.array(name), name)
            tensors[name] = new
            return flat.with_graph(flat.nodes, tensors.values())
    raise AssertionError(f"no weight in {token}")


@pytest.mark.parametrize("choice", [0, 1])
def test_wrong_cut_of_either_branch_is_caught(choice: int) -> None:
    """Random inputs take one branch; the proof covers both."""
    prepared = prepare(as_if(random_cnn(1), random_cnn(2)))
    analysis = prepared.analysis
    removed = np.zeros(analysis.coupling.n_units, bool)
    for group in analysis.coupling.groups:
        removed[group.units[:1]] = len(group) > 1
    alive = analysis.coupling.alive(removed)
    model, _ = cut(analysis.model, analysis.shapes, analysis.coupling, alive)
    assert verify(analysis, model, removed).error <= 1e-4
    found = rewritten_branches(analysis.model, analysis.shapes, analysis.coupling, alive)
    assert len(found.paths) == 2
    with pytest.raises(VerificationError):
        verify(analysis, broken(model, sorted(found.rival)[choice]), removed)


def test_loop_without_a_turn_is_proved_too() -> None:
    """The loop's condition is false on all inputs that the proof would take."""
    b = Builder()
    w, v = b.weight(6, 6), b.weight(6, 6)
    model = parsed(f"float[2,6] x, float[6,6] {w}, float[6,6] {v}", "float[2,6] y", f"""
        big = Constant<value = float {{100}}>() m = ReduceMax<keepdims=0>(x) go0 = Greater(m, big)
        y = Loop(, go0, x) <body = b (int64 i, bool go, float[2,6] s) => (bool on, float[2,6] o)
            {{ n = ReduceMin<keepdims=0>(s) on = Greater(n, big)
               h = MatMul(s, {w}) k = Relu(h) o = MatMul(k, {v}) }}>""")  # fmt: skip
    del model.graph.input[1:]
    model.graph.initializer.extend(b.initializers)
    result = prune(model, flops=0.5, **WEIGHTS)
    assert result.verdict.passed
    prepared = prepare(model)
    analysis = prepared.analysis
    removed = np.zeros(analysis.coupling.n_units, bool)
    removed[0] = True
    alive = analysis.coupling.alive(removed)
    smaller, _ = cut(analysis.model, analysis.shapes, analysis.coupling, alive)
    (path,) = rewritten_branches(analysis.model, analysis.shapes, analysis.coupling, alive).paths
    with pytest.raises(VerificationError):
        verify(analysis, broken(smaller, path[0]), removed)


def test_names_that_bodies_share_or_hide() -> None:
    """Both branches use the same names for other things; one hides a name of the graph."""
    model = as_if(random_cnn(2), random_cnn(7))
    flat = load(model).opened
    written = [name for node in flat.nodes for name in node.output if name]
    assert len(set(written)) == len(written)
    hiding = parsed("bool c, float[2,6] x, float[6,8] w, float[8,5] v", "float[2,5] y",
        """h = MatMul(x, w)
           z = If(c) <then_branch = t () => (float[2,8] p) { k = Neg(h) h = Relu(k) p = Neg(h) },
                      else_branch = e () => (float[2,8] p) { x = Relu(h) p = Tanh(x) }>
           y = MatMul(z, v)""")  # fmt: skip
    for condition in (True, False):  # closed again no name is hidden, so ONNX Runtime takes it
        feeds = feeds_for(hiding, condition)
        h = feeds["x"] @ feeds["w"]
        z = -np.maximum(-h, 0) if condition else np.tanh(np.maximum(h, 0))
        (y,) = outputs_of(load(hiding).opened.assemble(), feeds)
        np.testing.assert_allclose(y, z @ feeds["v"], rtol=1e-4, atol=1e-5)


def test_bodies_that_give_what_they_did_not_make() -> None:
    """Constants, one value twice, an outer value through Identity: ONNX Runtime wants each output
    of a body made in it, and once."""
    model = parsed("bool c, float[2,6] x", "float[2,6] y, float[2,6] z",
        """k = Constant<value = float[6] {1, 2, 3, 4, 5, 6}>()
           s = Constant<value = int64[2] {2, 6}>()
           y, z = If(c) <then_branch = t () => (float[2,6] p, float[2,6] q)
                            { a = Add(x, k) p = Identity(a) q = Identity(a) },
                         else_branch = e () => (float[2,6] p, float[2,6] q)
                            { b = Identity(k) p = Expand(k, s) q = Add(x, b) }>""")  # fmt: skip
    feeds = feeds_for(model, False)
    normal = prepare(model).analysis.model
    expected, actual = outputs_of(model, feeds), outputs_of(normal.assemble(), feeds)
    for a, b in zip(expected, actual, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    bare = parsed("bool c, float[2] x", "float[2] y",
        """y = If(c) <then_branch = t () => (float[2] p)
                            { p = Constant<value = float[2] {1, 2}>() },
                      else_branch = e () => (float[2] p) { p = Identity(x) }>""")  # fmt: skip
    for condition in (True, False):
        feeds = feeds_for(bare, condition)
        for a, b in zip(
            outputs_of(bare, feeds),
            outputs_of(prepare(bare).analysis.model.assemble(), feeds),
            strict=True,
        ):
            np.testing.assert_array_equal(a, b)
