"""Structures that exported models are made of, each as a small graph under the oracle of law 3."""

from __future__ import annotations

import onnx
import pytest
from graphs import Builder
from onnx import TensorProto, helper, parser

from graphprune import shapes
from graphprune.analysis import analyse
from graphprune.api import prune
from graphprune.check import check_rule
from graphprune.coupling import couple
from graphprune.errors import NothingPrunableError
from graphprune.model import Model
from graphprune.rules import relate
from graphprune.shapes import infer
from graphprune.storage import load

HEAD = '<ir_version: 8, opset_import: ["": {opset}]> g ({inputs}) => ({outputs})'

# structure: opset, inputs, outputs, body. Something must be free, and all of it obey the law.
MODELS = {
    "GatherND": (13, "float[2,3,6] x", "float[2,6] y",
        "i = Constant<value = int64[2,2] {0, 1, 1, 2}>() y = GatherND(x, i)"),
    "GatherND batch": (13, "float[2,3,6] x", "float[2,4,6] y",
        "i = Constant<value = int64[2,4,1] {0, 1, 1, 2, 2, 1, 0, 0}>() "
        "y = GatherND<batch_dims=1>(x, i)"),
    "ScatterND, rows": (16, "float[6,4] x, float[2,4] u", "float[6,4] y",
        "i = Constant<value = int64[2,1] {3, 1}>() y = ScatterND(x, i, u)"),
    "ScatterND": (13, "float[3,4,6] x, float[2,6] u", "float[3,4,6] y",
        "i = Constant<value = int64[2,2] {0, 1, 2, 3}>() y = ScatterND(x, i, u)"),
    "GatherElements": (13, "float[3,6] x", "float[2,6] y",
        "i = Constant<value = int64[2,6] {0,1,2,0,1,2,2,1,0,2,1,0}>() "
        "y = GatherElements<axis=0>(x, i)"),
    "ScatterElements": (13, "float[3,6] x, float[1,6] u", "float[3,6] y",
        "i = Constant<value = int64[1,6] {0,1,2,0,1,2}>() y = ScatterElements<axis=0>(x, i, u)"),
    "OneHot": (13, "int64[4] x", "float[4,5] y",
        "d = Constant<value = int64 {5}>() v = Constant<value = float[2] {0, 1}>() "
        "y = OneHot(x, d, v)"),
    "CenterCropPad": (18, "float[2,6,5] x", "float[2,6,3] y",
        "s = Constant<value = int64[1] {3}>() y = CenterCropPad<axes=[2]>(x, s)"),
    "DFT": (17, "float[2,6,1] x", "float[2,6,2] y", "y = DFT<axis=1>(x)"),
    "DFT 20": (20, "float[2,6,1] x", "float[2,6,2] y",
        "a = Constant<value = int64 {1}>() y = DFT(x, , a)"),
    "Col2Im": (18, "float[1,20,4] x", "float[1,5,4,4] y",
        "i = Constant<value = int64[2] {4, 4}>() b = Constant<value = int64[2] {2, 2}>() "
        "y = Col2Im<strides=[2,2]>(x, i, b)"),
    "DeformConv": (19, "float[1,4,5,5] x, float[6,4,3,3] w, float[1,18,3,3] o, float[6] b",
        "float[1,6,3,3] y", "y = DeformConv(x, w, o, b)"),
    "Gather after Transpose": (13, "float[6,4] x", "float[2,6] y",
        "i = Constant<value = int64[2] {3, 0}>() t = Transpose<perm=[1,0]>(x) y = Gather(t, i)"),
    "rolled rows": (13, "float[2,5,6] x", "float[2,5,6] y",
        "z = Constant<value = int64[1] {0}>() k = Constant<value = int64[1] {2}>() "
        "e = Constant<value = int64[1] {2147483647}>() a = Constant<value = int64[1] {1}>() "
        "p = Slice(x, k, e, a) q = Slice(x, z, k, a) y = Concat<axis=1>(p, q)"),
    "attention by Einsum": (13, "float[1,5,6] x, float[6,4,3] q, float[6,4,3] k, float[4,3,6] o",
        "float[1,5,6] y",
        'a = Einsum<equation="abc,cde->abde">(x, q) b = Einsum<equation="abc,cde->abde">(x, k) '
        's = Einsum<equation="aecd,abcd->acbe">(b, a) m = Softmax(s) '
        'v = Einsum<equation="acbe,aecd->abcd">(m, b) y = Einsum<equation="abcd,cde->abe">(v, o)'),
    "heads by Split": (13, "float[1,5,12] x", "float[1,5,12] y",
        "n = Constant<value = int64[3] {4, 4, 4}>() a, b, c = Split<axis=2>(x, n) "
        "t = Transpose<perm=[0,2,1]>(b) s = MatMul(a, t) y0 = MatMul(s, c) "
        "y = Concat<axis=2>(y0, a, y0)"),
    "heads in the batch": (13, "float[1,5,12] x, float[12,6] o", "float[1,5,6] y",
        "a = Constant<value = int64[4] {0, 5, 4, 3}>() b = Constant<value = int64[3] {-1, 5, 3}>() "
        "c = Constant<value = int64[4] {-1, 4, 5, 3}>() "
        "d = Constant<value = int64[3] {-1, 5, 12}>() h = Reshape(x, a) "
        "t = Transpose<perm=[0,2,1,3]>(h) q = Reshape(t, b) "
        "k = Transpose<perm=[0,2,1]>(q) s = MatMul(q, k) v = MatMul(s, q) r = Reshape(v, c) "
        "u = Transpose<perm=[0,2,1,3]>(r) w = Reshape(u, d) y = MatMul(w, o)"),
    "GroupNorm by means": (13, "float[1,8,6] x, float[8,1] s", "float[1,8,6] y",
        "a = Constant<value = int64[4] {0, 4, 2, 6}>() b = Constant<value = int64[3] {0, 8, 6}>() "
        "r = Reshape(x, a) m = ReduceMean<axes=[2,3]>(r) d = Sub(r, m) q = Mul(d, d) "
        "v = ReduceMean<axes=[2,3]>(q) t = Sqrt(v) n = Div(d, t) z = Reshape(n, b) y = Mul(z, s)"),
    "GroupNorm in the batch": (13, "float[1,8,6] x", "float[1,8,6] y",
        "a = Constant<value = int64[2] {-1, 12}>() b = Constant<value = int64[3] {-1, 8, 6}>() "
        "r = Reshape(x, a) m = ReduceMean<axes=[1]>(r) d = Sub(r, m) y = Reshape(d, b)"),
    "split attention": (13, "float[1,8,3,3] x, float[8,4] w", "float[1,4,3,3] y",
        "n = Constant<value = int64[2] {4, 4}>() p, q = Split<axis=1>(x, n) g = Add(p, q) "
        "m = ReduceMean<axes=[2,3], keepdims=0>(g) t = Transpose<perm=[1,0]>(w) f = MatMul(m, t) "
        "a = Constant<value = int64[3] {0, 2, 4}>() r = Reshape(f, a) s = Softmax<axis=1>(r) "
        "b = Constant<value = int64[4] {0, 8, 1, 1}>() e = Reshape(s, b) "
        "i, j = Split<axis=1>(e, n) k = Mul(p, i) l = Mul(q, j) y = Add(k, l)"),
    "stacked branches": (13, "float[1,6,4] a, float[1,6,4] b", "float[1,6,4] y",
        "z = Constant<value = int64[1] {0}>() p = Unsqueeze(a, z) q = Unsqueeze(b, z) "
        "s = Concat<axis=0>(p, q) y = ReduceMean<axes=[0], keepdims=0>(s)"),
    "normalised weight": (13, "float[1,6,5] x, float[4,6,3] v, float[4,1,1] g", "float[1,4,3] y",
        "n = ReduceL2<axes=[1,2]>(v) u = Mul(v, g) w = Div(u, n) y = Conv(x, w)"),
    "computed weight": (13, "float[1,4,5] x, float[1,3] a, float[3,72] k", "float[1,6,3] y",
        "s = Constant<value = int64[3] {6, 4, 3}>() m = MatMul(a, k) w = Reshape(m, s) "
        "y = Conv(x, w)"),
    "linear attention": (13, "float[1,4,5,3] q, float[1,4,5,3] k, float[1,4,5,2] v",
        "float[1,4,5,2] y",
        "two = Constant<value = int64[1] {2}>() three = Constant<value = int64[1] {3}>() "
        "e = Exp(q) f = Exp(k) t = Transpose<perm=[0,1,3,2]>(f) c = MatMul(t, v) n = MatMul(e, c) "
        "s = ReduceSum(f, two) p = Mul(e, s) z = ReduceSum(p, three) y = Div(n, z)"),
    "chunk at a computed place": (13, "float[1,8,3] x", "float[1,4,3] y",
        "i = Constant<value = int64[1] {1}>() two = Constant<value = int64[1] {2}>() "
        "z = Constant<value = int64[1] {0}>() s = Shape(x) c = Gather(s, i) h = Div(c, two) "
        "a = Slice(x, z, h, i) e = Mul(h, two) b = Slice(x, h, e, i) y = Mul(a, b)"),
    "maximum of pieces": (13, "float[1,8,3] x", "float[1,4,3] y",
        "s = Constant<value = int64[4] {0, 2, 4, 3}>() r = Reshape(x, s) "
        "y = ReduceMax<axes=[1], keepdims=0>(r)"),
    "gate over positions": (13, "float[1,5,8] x, float[5,5] w", "float[1,5,4] y",
        "n = Constant<value = int64[2] {4, 4}>() u, v = Split<axis=2>(x, n) g = MatMul(w, v) "
        "y = Mul(u, g)"),
}  # fmt: skip


def text(entry: tuple[int, str, str, str]) -> str:
    opset, inputs, outputs, body = entry
    return HEAD.format(opset=opset, inputs=inputs, outputs=outputs) + " {" + body + "}"


@pytest.mark.parametrize("name", MODELS)
def test_law_holds(name: str) -> None:
    assert check_rule(text(MODELS[name])).passed


def test_heads_that_share_an_axis_with_a_fixed_batch() -> None:
    """A batch of two and four heads are one axis of eight: whole heads leave all the same."""
    b = Builder(1)
    q, k, v = (b.add("MatMul", "x", b.weight(6, 32)) for _ in "qkv")
    q, k, v = (b.add("Reshape", t, b.ints(2, 5, 4, 8)) for t in (q, k, v))
    q, k, v = (b.add("Transpose", t, perm=[0, 2, 1, 3]) for t in (q, k, v))
    q, k, v = (b.add("Reshape", t, b.ints(8, 5, 8)) for t in (q, k, v))
    scores = b.add("Softmax", b.add("MatMul", q, b.add("Transpose", k, perm=[0, 2, 1])))
    mixed = b.add("Reshape", b.add("MatMul", scores, v), b.ints(2, 4, 5, 8))
    joined = b.add("Reshape", b.add("Transpose", mixed, perm=[0, 2, 1, 3]), b.ints(2, 5, 32))
    y = b.add("MatMul", joined, b.weight(32, 6))
    model = b.model({"x": [2, 5, 6]}, {y: [2, 5, 6]})
    assert check_rule(model).passed
    groups = analyse(load(model)).coupling.groups
    assert [len(group) for group in groups] == [4]


# structure: a form above, and the axes none of whose slots may be pinned
FREE = {
    "heads by Einsum": ("attention by Einsum", ["q:1", "k:1", "o:0"]),
    "heads in the batch": ("heads in the batch", ["o:0"]),
    "branches": ("split attention", ["w:0"]),
    "normalised weight": ("normalised weight", ["v:0", "v:1", "g:0"]),
}


@pytest.mark.parametrize("name", FREE)
def test_what_is_free(name: str) -> None:
    form, expected = FREE[name]
    model = load(parser.parse_model(text(MODELS[form])))
    relations = relate(model, infer(model), pin_interface=False)
    coupling = couple(model, infer(model), relations)
    for place in expected:
        tensor, _, axis = place.partition(":")
        slots = relations.slots.tensors[tensor][int(axis)].slots
        assert all(coupling.pin_of(int(slot)) is None for slot in slots), place


def sizes(inputs: str, body: str, opset: int = 13) -> dict[str, tuple[int, ...]]:
    """What the analysis takes for symbolic sizes."""
    source = HEAD.format(opset=opset, inputs=inputs, outputs="float y") + " {" + body + "}"
    return infer(load(parser.parse_model(source))).inputs


def test_symbolic_sizes_say_something() -> None:
    assert sizes("float[n,3,h,w] x", "y = Relu(x)")["x"] == (1, 3, 32, 32)


def test_an_axis_named_like_the_batch_is_one() -> None:
    found = sizes("float[batch,time] x, float[2,batch,4] state", "y = Add(x, x)")
    assert found == {"x": (1, 32), "state": (2, 1, 4)}


def test_sizes_below_the_kernel_are_passed_over() -> None:
    body = "w = ConstantOfShape<value = float[1] {1}>(s) y = Conv(x, w)"
    shape = "s = Constant<value = int64[3] {1, 1, 100}>() "
    assert sizes("float[n,1,t] x", shape + body)["x"] == (1, 1, 128)


def test_sizes_below_what_is_picked_are_passed_over() -> None:
    body = "i = Constant<value = int64[1] {50}>() y = Gather<axis=1>(x, i)"
    assert sizes("float[n,t] x", body)["x"] == (1, 64)


def test_sizes_that_no_reshape_takes_are_passed_over() -> None:
    body = "s = Constant<value = int64[2] {1, 1}>() y = Reshape(x, s)"
    assert sizes("float[n,t] x", body)["x"] == (1, 1)


def test_shape_of_functions_without_inference() -> None:
    body = "a = GreaterOrEqual(x, x) b = LessOrEqual(x, x) y = And(a, b)"
    source = HEAD.format(opset=16, inputs="float[2,3] x", outputs="bool[2,3] y") + " {" + body + "}"
    assert infer(load(parser.parse_model(source))).shape["a"] == (2, 3)


def test_gather_beyond_its_axis_is_refused() -> None:
    body = "i = Constant<value = int64[1] {7}>() y = Gather<axis=0>(x, i)"
    source = (
        HEAD.format(opset=13, inputs="float[2,3] x", outputs="float[1,3] y") + " {" + body + "}"
    )
    pins = analyse(load(parser.parse_model(source))).relations.pins
    assert pins


def test_a_budget_on_nothing_is_said() -> None:
    """A model none of whose operators has countable work."""
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [value], [out])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    with pytest.raises(NothingPrunableError, match="macs"):
        prune(model, 0.5, allow_miss=True, measure=False, cache=False)


def test_sizes_that_tables_inside_ask_for() -> None:
    """A mask of twice 12 positions, one of 7 (2n + 1), 37 * 37 columns."""
    mask = "s = Constant<value = int64[2] {1, 24}>() m = ConstantOfShape(s) y = Add(z, m)"
    assert sizes("float[n,t] x", "z = Concat<axis=1>(x, x) " + mask)["x"] == (1, 12)
    more = "c = Constant<value = float[1,1] {1}>() z = Concat<axis=1>(x, c, x) "
    assert sizes("float[n,t] x", more + mask.replace("24", "7"))["x"] == (1, 3)
    flat = "f = Flatten(x) s = Constant<value = int64[2] {10952, 5}>() "
    body = flat + "w = ConstantOfShape(s) y = MatMul(f, w)"
    assert sizes("float[n,8,h,w] x", body)["x"] == (1, 8, 37, 37)


def test_a_nameless_axis_of_a_state_is_the_batch() -> None:
    assert sizes("float[?,?] x, float[2,?,4] state", "y = Add(x, x)")["state"] == (2, 1, 4)
    assert sizes("float[1,3,?,?] x", "y = Relu(x)")["x"] == (1, 3, 32, 32)


EMPTY = """<ir_version: 8, opset_import: ["": 17]> g (float[n,6] x) => (float[n,6] y)
<int64[1] end = {6}, int64[1] axis = {1}> {
    none = Slice(x, end, end, axis)
    y = Concat<axis=1>(x, none)
}"""


def test_an_open_batch_is_one_whatever_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty tensor makes other sizes be tried; here there are none."""
    tried = []
    walk = shapes._walk

    def watched(model: Model, inputs: dict[str, tuple[int, ...]]) -> shapes.Shapes:
        tried.append(inputs["x"])
        return walk(model, inputs)

    monkeypatch.setattr(shapes, "_walk", watched)
    assert infer(load(parser.parse_model(EMPTY))).shape["none"] == (1, 0)
    assert tried == [(1, 6)]
