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
from graphprune.control import bodies, regions
from graphprune.cut import cut
from graphprune.errors import ModelError, VerificationError
from graphprune.model import Model
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
                 p = If(d)
                   <then_branch = tt () => (float[2,7] q) { q = MatMul(m, a) },
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
                 { k = MatMul(s, u) j = MatMul(one, w) m = Add(k, j)
                   o = Tanh(m) each = Neg(o) }>(h, x)
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
            np.full(shape, condition) if is_bool else RNG.standard_normal(shape).astype(np.float32)
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


FUNCTIONS = """<ir_version: 8, opset_import: ["": 17, "loc": 1]>
g (bool c, float[2,6] x, float[6,8] w, float[8,8] a, float[8,5] v) => (float[2,5] y) {
  h = MatMul(x, w) k = loc.outer<slope = 0.3>(c, h, a) y = MatMul(k, v)
}
<domain: "loc", opset_import: ["": 17, "loc": 1]>
inner<alpha>(z, w) => (o) { t = MatMul(z, w) o = LeakyRelu<alpha: float = @alpha>(t) }
<domain: "loc", opset_import: ["": 17, "loc": 1]>
outer<slope>(c, z, w) => (o) {
  o = If(c)
    <then_branch = t () => (float[2,8] p)
       { q = loc.inner<alpha: float = @slope>(z, w) p = Neg(q) },
     else_branch = e () => (float[2,8] p)
       { q = MatMul(z, w) p = loc.inner<alpha: float = @slope>(q, w) }>
}"""


@pytest.mark.parametrize("condition", [True, False])
def test_functions_are_inlined(condition: bool) -> None:
    """In bodies, with attributes, one calling another, with control flow of their own."""
    model = parser.parse_model(FUNCTIONS)
    feeds = feeds_for(model, condition)
    inlined = load(model)
    assert not inlined.skeleton.functions
    for a, b in zip(outputs_of(model, feeds), outputs_of(inlined.assemble(), feeds), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    assert check_rule(model, feeds).passed


def function_of(opset: int, body: str) -> onnx.ModelProto:
    return parser.parse_model(f"""<ir_version: 8, opset_import: ["": 17, "loc": 1]>
        g (float[2,6] x) => (float[2,6] y) {{ y = loc.f(x) }}
        <domain: "loc", opset_import: ["": {opset}, "loc": 1]> f(z) => (o) {{ {body} }}""")


def test_functions_of_another_opset_are_converted() -> None:
    model = load(function_of(11, "o = Softmax<axis=1>(z)"))
    assert [node.op_type for node in model.nodes] == ["Softmax"]


def test_functions_that_state_another_version_of_their_own_domain() -> None:
    """As jax2onnx writes them: the domain's version there is that of ONNX."""
    model = function_of(17, "o = Relu(z)")
    model.functions[0].opset_import[1].version = 17
    assert [node.op_type for node in load(model).nodes] == ["Relu"]


def test_recursive_functions_are_refused() -> None:
    with pytest.raises(ModelError, match="functions are invalid"):
        load(function_of(17, "o = loc.f(z)"))


def nested(depth: int) -> onnx.ModelProto:
    """An If in the then-branch of an If, and so on; two products in every else-branch."""
    model = parsed("bool c, float[2,8] x", "float[2,8] y", "y = Identity(x)")
    place = model.graph
    for level in range(depth):
        place.node[0].CopyFrom(helper.make_node("If", ["c"], [place.output[0].name], f"if{level}"))
        names = ("then_branch", "else_branch")
        branches = [place.node[0].attribute.add(name=n, type=5) for n in names]
        for branch in branches:
            branch.g.name = branch.name
            out = helper.make_tensor_value_info(f"o{level}", TensorProto.FLOAT, [2, 8])
            branch.g.output.append(out)
        b = Builder(level)
        w, v = b.weight(8, 8), b.weight(8, 8)
        other = branches[1].g
        other.initializer.extend(b.initializers)
        other.node.append(helper.make_node("MatMul", ["x", w], ["h"]))
        other.node.append(helper.make_node("MatMul", ["h", v], [f"o{level}"]))
        place = branches[0].g
        place.node.append(helper.make_node("Identity", ["x"], [f"o{level}"]))
    return model


def test_as_deep_as_protobuf_goes() -> None:
    model = nested(30)
    result = prune(model, flops=0.5, **WEIGHTS)
    assert result.verdict.passed
    assert result.after.macs <= 0.5 * result.before.macs
    onnx.ModelProto.FromString(result.model.SerializeToString())


def test_deeper_than_protobuf_goes() -> None:
    with pytest.raises(ModelError):
        prune(nested(60), flops=0.5, **WEIGHTS)


def test_bodies_that_stay_closed() -> None:
    """A body with a sparse initialiser: what it reads is pinned."""
    b = Builder(opset=17)
    h = b.add("MatMul", "x", b.weight(6, 8))
    dense = helper.make_graph(
        [helper.make_node("Add", [h, "s"], ["o"])], "b", [],
        [helper.make_tensor_value_info("o", TensorProto.FLOAT, [2, 8])],
    )  # fmt: skip
    values = onnx.numpy_helper.from_array(np.ones(1, np.float32), "s")
    places = onnx.numpy_helper.from_array(np.zeros(1, np.int64), "s_i")
    sparse = onnx.GraphProto()
    sparse.CopyFrom(dense)
    sparse.sparse_initializer.append(helper.make_sparse_tensor(values, places, [8]))
    dense.initializer.append(onnx.numpy_helper.from_array(np.ones(8, np.float32), "s"))
    y = b.add("If", "c", then_branch=sparse, else_branch=dense)
    graph = helper.make_graph(
        b.nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 6]),
         helper.make_tensor_value_info("c", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info(y, TensorProto.FLOAT, [2, 8])], b.initializers,
    )  # fmt: skip
    opset = [helper.make_opsetid("", 17)]
    prepared = prepare(helper.make_model(graph, opset_imports=opset, ir_version=8))
    assert prepared.analysis.coupling.n_units == 0
    reasons = [pin.reason for pin in prepared.analysis.coupling.pins]
    assert "captured by the body of If" in reasons


def without_else(node: onnx.NodeProto) -> None:
    del node.attribute[1]


def one_output_too_few(node: onnx.NodeProto) -> None:
    del node.attribute[0].g.output[:]


def two_conditions(node: onnx.NodeProto) -> None:
    node.input.append("c")


@pytest.mark.parametrize("damage", [without_else, one_output_too_few, two_conditions])
def test_malformed_bodies_do_not_crash(damage: Any) -> None:
    model = parsed(*LAW["If"])
    damage(next(node for node in model.graph.node if node.op_type == "If"))
    analysis = prepare(model).analysis
    assert any(bodies(node) for node in analysis.model.nodes)
    with pytest.raises(ModelError):
        prune(model, flops=0.5, **WEIGHTS)


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_scan_inputs", 7), ("num_scan_inputs", 0), ("scan_input_axes", [9]),
     ("scan_output_axes", [-9])],
)  # fmt: skip
def test_malformed_scans_do_not_crash(name: str, value: Any) -> None:
    model = parsed(*LAW["Scan"])
    node = next(node for node in model.graph.node if node.op_type == "Scan")
    for attribute in [a for a in node.attribute if a.name == name]:
        node.attribute.remove(attribute)
    node.attribute.append(helper.make_attribute(name, value))
    with pytest.raises(ModelError):
        prune(model, flops=0.5, **WEIGHTS)
