"""Control flow and functions: bodies are analysed and cut like everything else, and proved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from graphs import Builder, random_cnn
from onnx import TensorProto, helper, parser

from graphprune.api import apply, prepare, prune
from graphprune.branches import rewritten_branches
from graphprune.check import check_rule
from graphprune.control import ENTER, is_open
from graphprune.errors import VerificationError
from graphprune.model import Model, bodies
from graphprune.storage import load
from graphprune.validate import verify

WEIGHTS: dict[str, Any] = {"criterion": "l1", "repair": "none", "measure": False}
HEAD = '<ir_version: 8, opset_import: ["": {opset}]> g ({inputs}) => ({outputs})'
RNG = np.random.default_rng(0)

# name: inputs, outputs, body. Bool inputs are tried true and false.
LAW = {
    "If": ("bool c, float[1,3,5,5] x, float[6,3,3,3] w, float[5,6,1,1] a, float[6,5,1,1] b, "
           "float[6,6,1,1] d, float[4,6,1,1] v", "float[1,4,3,3] y",
        """h = Conv(x, w) r = Relu(h)
           z = If(c) <then_branch = t () => (float[1,6,3,3] p)
                        { q = Conv(r, a) s = Relu(q) p = Conv(s, b) },
                      else_branch = e () => (float[1,6,3,3] p) { q = Conv(r, d) p = Sigmoid(q) }>
           y = Conv(z, v)"""),
    "If inside If": ("bool c, bool d, float[2,6] x, float[6,8] w, float[8,7] a, float[8,7] b, "
                     "float[7,5] v", "float[2,5] y",
        """h = MatMul(x, w)
           z = If(c) <then_branch = t () => (float[2,7] p) {
                 m = Tanh(h)
                 p = If(d) <then_branch = tt () => (float[2,7] q) { q = MatMul(m, a) },
                            else_branch = te () => (float[2,7] q) { k = Neg(m) q = MatMul(k, b) }> },
               else_branch = e () => (float[2,7] p) { p = MatMul(h, a) }>
           y = MatMul(z, v)"""),
    "Loop": ("bool c, float[2,6] x, float[6,6] w, float[6,5] v, float[6,3] u",
             "float[2,5] y, float[3,2,3] all",
        """n = Constant<value = int64 {3}>()
           f, all = Loop(n, c, x) <body = b (int64 i, bool go, float[2,6] s)
                 => (bool on, float[2,6] o, float[2,3] each)
                 { on = Identity(go) k = MatMul(s, w) o = Tanh(k) each = MatMul(o, u) }>
           y = MatMul(f, v)"""),
    "If inside Loop": ("bool c, float[2,6] x, float[6,6] w, float[6,6] u, float[6,5] v",
                       "float[2,5] y",
        """n = Constant<value = int64 {2}>() zero = Constant<value = int64 {0}>()
           f = Loop(n, , x) <body = b (int64 i, bool go, float[2,6] s) => (bool on, float[2,6] o)
                 { first = Equal(i, zero) on = Identity(go)
                   k = If(first) <then_branch = t () => (float[2,6] p) { p = MatMul(s, w) },
                                  else_branch = e () => (float[2,6] p) { p = MatMul(s, u) }>
                   o = Add(k, s) }>
           y = MatMul(f, v)"""),
    "Scan": ("float[2,6] h, float[4,2,3] x, float[3,6] w, float[6,6] u, float[6,5] v",
             "float[2,5] y, float[2,4,6] all",
        """f, all = Scan<num_scan_inputs = 1, scan_output_axes = [1], body = b
                 (float[2,6] s, float[2,3] one) => (float[2,6] o, float[2,6] each)
                 { k = MatMul(s, u) j = MatMul(one, w) m = Add(k, j) o = Tanh(m) each = Neg(o) }>(h, x)
           y = MatMul(f, v)"""),
    "Loop captures": ("float[2,6] x, float[6,8] w, float[8,6] u, float[6,5] v", "float[2,5] y",
        """n = Constant<value = int64 {2}>() h = MatMul(x, w) g = Tanh(h)
           f = Loop(n, , x) <body = b (int64 i, bool go, float[2,6] s) => (bool on, float[2,6] o)
                 { on = Identity(go) k = MatMul(g, u) o = Add(k, s) }>
           y = MatMul(f, v)"""),
    "branch gives a captured value": ("bool c, float[2,6] x, float[6,8] w, float[8,5] v",
                                      "float[2,5] y",
        """h = MatMul(x, w)
           z = If(c) <then_branch = t () => (float[2,8] p) { p = Relu(h) },
                      else_branch = e () => (float[2,8] p) { p = Identity(h) }>
           y = MatMul(z, v)"""),
}  # fmt: skip


def parsed(inputs: str, outputs: str, body: str, opset: int = 17) -> onnx.ModelProto:
    head = HEAD.format(opset=opset, inputs=inputs, outputs=outputs)
    return parser.parse_model(head + " {" + body + "}")


def feeds_for(model: onnx.ModelProto, condition: bool) -> dict[str, Any]:
    feeds: dict[str, Any] = {}
    for value in model.graph.input:
        shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
        is_bool = value.type.tensor_type.elem_type == TensorProto.BOOL
        feeds[value.name] = (
            np.full(shape, condition)
            if is_bool
            else RNG.standard_normal(shape).astype(np.float32)
        )
    return feeds


def outputs_of(model: onnx.ModelProto, feeds: dict[str, Any]) -> list[Any]:
    return list(ort.InferenceSession(model.SerializeToString()).run(None, feeds))


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
    """Both branches count; a Loop or Scan counts every turn."""
    inside = "k = MatMul(s, w) o = Tanh(k)"
    loop = parsed("float[2,6] x, float[6,6] w", "float[2,6] y", f"""
        n = Constant<value = int64 {{7}}>()
        y = Loop(n, , x) <body = b (int64 i, bool go, float[2,6] s) => (bool on, float[2,6] o)
            {{ on = Identity(go) {inside} }}>""")  # fmt: skip
    once = 2 * 6 * 6
    for model, expected in (
        (loop, 7 * once),
        (parsed(*LAW["If inside If"]), 2 * 6 * 8 + 3 * 2 * 8 * 7 + 2 * 7 * 5),
        (parsed(*LAW["Scan"]), 4 * (2 * 6 * 6 + 2 * 3 * 6) + 2 * 6 * 5),
    ):
        analysis = prepare(model).analysis
        assert analysis.cost.of(analysis.nothing_removed).macs == expected



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
    inside = False
    for node in flat.nodes:
        if is_open(node) and node.op_type == ENTER:
            inside = node.output[0] == token
        if inside and node.op_type in ("Conv", "MatMul", "Gemm"):
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
    from graphprune.cut import cut

    alive = analysis.coupling.alive(removed)
    model, _ = cut(analysis.model, analysis.shapes, analysis.coupling, alive)
    assert verify(analysis, model, removed) <= 1e-4
    found = rewritten_branches(analysis.model, analysis.shapes, analysis.coupling, alive)
    assert len(found.paths) == 2
    with pytest.raises(VerificationError):
        verify(analysis, broken(model, sorted(found.rival)[choice]), removed)


def test_loop_without_a_turn_is_proved_too() -> None:
    """The loop's condition is false on all inputs that the proof would take."""
    b = Builder()
    w, v = b.weight(6, 6), b.weight(6, 6)
    model = parsed("float[2,6] x, float[6,6] %s, float[6,6] %s" % (w, v), "float[2,6] y", f"""
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
    from graphprune.cut import cut

    alive = analysis.coupling.alive(removed)
    smaller, _ = cut(analysis.model, analysis.shapes, analysis.coupling, alive)
    (path,) = rewritten_branches(
        analysis.model, analysis.shapes, analysis.coupling, alive
    ).paths
    with pytest.raises(VerificationError):
        verify(analysis, broken(smaller, path[0]), removed)
