"""Where two features meet: bodies and copies, names, integers on disk, order that others know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from graphprune import api
from graphprune.analysis import Scope
from graphprune.runtime import random_inputs, run_session, session

WEIGHTS: dict[str, Any] = {"criterion": "l1", "repair": "none", "measure": False, "cache": False}


def model(text: str, opset: int = 17, **weights: Any) -> onnx.ModelProto:
    """ONNX text, and weights: arrays, or shapes of random ones."""
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]> g {text}')
    rng = np.random.default_rng(0)
    for name, value in weights.items():
        array = np.asarray(value)
        if isinstance(value, tuple):
            array = (rng.standard_normal(value) / np.sqrt(value[-2])).astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    return proto


def test_a_loops_first_state_stays_with_its_last() -> None:
    """The vector that starts a loop is read by the body and by what the loop gives."""
    proto = model(
        """(float[1,8] x) => (float[1,4] y) {
            hx = MatMul(x, first)
            last = Loop(turns, go, start) <body = b (int64 i, bool on, float[1,16] h)
                => (bool off, float[1,16] n)
                { a = MatMul(h, inner) c = MatMul(hx, outer) s = Add(a, c) n = Tanh(s)
                  off = Identity(on) }>
            y = MatMul(last, end) }""",
        turns=np.array(3),
        go=np.array(True),
        start=np.linspace(-1, 1, 16, dtype=np.float32)[None],
        first=(8, 16),
        inner=(16, 16),
        outer=(16, 16),
        end=(16, 4),
    )
    result = api.prune(proto, flops=0.5, **WEIGHTS)
    assert result.verdict.passed
    assert result.after.macs <= 0.5 * result.before.macs


def test_nodes_of_bodies_may_have_the_names_of_others() -> None:
    branch = "{{ {0}a = MatMul(x, {0}w) {0}b = Relu({0}a) {0}o = MatMul({0}b, {0}v) }}"
    proto = model(
        f"""(float[5,8] z, bool c) => (float[5,3] y) {{ x = MatMul(z, first)
            y = If(c) <then_branch = t () => (float[5,3] ao) {branch.format("a")},
                       else_branch = e () => (float[5,3] bo) {branch.format("b")}> }}""",
        first=(8, 8),
        aw=(8, 16),
        av=(16, 3),
        bw=(8, 16),
        bv=(16, 3),
    )
    proto.graph.node[0].name = "product"
    for attribute in proto.graph.node[1].attribute:
        attribute.g.node[0].name = "product"
    assert api.prune(proto, flops=0.5, **WEIGHTS).verdict.passed


def test_constants_in_a_long_chain() -> None:
    steps = "".join(f"w{i + 1} = Neg(w{i}) " for i in range(1500))
    text = f"(float[1,80] x) => (float[1,4] y) {{ {steps} a = MatMul(x, w1500) b = Relu(a) "
    proto = model(text + "y = MatMul(b, v) }", w0=(80, 80), v=(80, 4))
    assert api.prune(proto, flops=0.6, **WEIGHTS).verdict.passed


def test_integers_that_stay_on_disk(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    proto = model(
        """(float[1,1024] x) => (float[1,1024] y) {
            w = DequantizeLinear<axis = 1>(wq, ws) a = MatMul(x, w) b = Relu(a)
            v = DequantizeLinear<axis = 1>(vq, vs) y = MatMul(b, v) }""",
        wq=rng.integers(-127, 127, (1024, 1100)).astype(np.int8),
        ws=np.full(1100, 0.001, np.float32),
        vq=rng.integers(-127, 127, (1100, 1024)).astype(np.int8),
        vs=np.full(1024, 0.001, np.float32),
    )
    path = tmp_path / "m.onnx"
    onnx.save_model(proto, path, save_as_external_data=True, location="m.data")
    assert api.prune(path, flops=0.6, **WEIGHTS).verdict.passed


@pytest.mark.parametrize("nodes", [False, True], ids=["initialisers", "Constant nodes"])
def test_positions_that_a_rotation_orders_are_not_moved(nodes: bool) -> None:
    """Halves of a head are turned with tables that queries and keys share."""
    turn = """{0} = MatMul(x, w{0}) {0}4 = Reshape({0}, heads) {0}5 = Reshape({0}4, halves)
        {0}a = Gather<axis = 3>({0}5, zero) {0}b = Gather<axis = 3>({0}5, one)
        {0}ac = Mul({0}a, cos) {0}bs = Mul({0}b, sin) {0}f = Sub({0}ac, {0}bs)
        {0}bc = Mul({0}b, cos) {0}as = Mul({0}a, sin) {0}s = Add({0}bc, {0}as)
        {0}r = Concat<axis = 3>({0}f, {0}s) """
    angles = np.outer(np.arange(6), [1, 0.1, 0.01, 0.001]).astype(np.float32)[None, :, None]
    proto = model(
        "(float[1,6,32] x) => (float[1,6,32] y) {"
        + turn.format("q")
        + turn.format("k")
        + """v = MatMul(x, wv) v4 = Reshape(v, heads)
        qt = Transpose<perm = [0,2,1,3]>(qr) kt = Transpose<perm = [0,2,3,1]>(kr)
        vt = Transpose<perm = [0,2,1,3]>(v4) s = MatMul(qt, kt) p = Softmax<axis = -1>(s)
        o = MatMul(p, vt) ot = Transpose<perm = [0,2,1,3]>(o) of = Reshape(ot, flat)
        y = MatMul(of, wo) }""",
        **{f"w{name}": (32, 32) for name in "qkvo"},
        heads=np.array([1, 6, 4, 8]),
        halves=np.array([1, 6, 4, 2, 4]),
        flat=np.array([1, 6, 32]),
        zero=np.array(0),
        one=np.array(1),
        cos=np.cos(angles),
        sin=np.sin(angles),
    )
    if nodes:
        constants = [
            onnx.helper.make_node("Constant", [], [t.name], value=t)
            for t in proto.graph.initializer
        ]
        others = list(proto.graph.node)
        del proto.graph.node[:], proto.graph.initializer[:]
        proto.graph.node.extend([*constants, *others])
    prepared = api.prepare(proto, Scope(units=("head-dims",)))
    feeds = random_inputs(prepared.original, prepared.analysis.shapes)
    pair = [
        run_session(session(m, 1), feeds)[0] for m in (prepared.original, prepared.analysis.model)
    ]
    assert np.abs(pair[0] - pair[1]).max() < 1e-5
    assert api.prune(proto, flops=0.9, units=("head-dims",), **WEIGHTS).verdict.passed
