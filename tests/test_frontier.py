"""Activations moved forward segment by segment: those of a whole run, each node run once."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest
from frontier_forms import draw, names_of, opened, parsed, same, walk, whole
from graphs import Builder, attention, random_cnn
from onnx import numpy_helper

from graphprune import frontier as under_test
from graphprune.frontier import Frontier
from graphprune.linear import linears
from graphprune.model import Model
from graphprune.runtime import run_session, session
from graphprune.shapes import infer
from graphprune.storage import load


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each node was run, by its first output; constants apart."""
    count: Counter[str] = Counter()

    def counting(model: Model, *rest: Any, **options: Any) -> Any:
        count.update(n.output[0] for n in model.nodes if n.output[0] not in model.constant_names)
        return session(model, *rest, **options)

    monkeypatch.setattr(under_test, "session", counting)
    return count


@pytest.mark.parametrize("seed", range(6))
def test_every_tensor_of_random_networks(seed: int, runs: Counter[str]) -> None:
    model = load(random_cnn(seed))
    feeds = [{"x": draw(n, 3, 4, 4, seed=n)} for n in (2, 2, 1)]
    walk(model, feeds, [n for n in names_of(model) if n not in model.constant_names])
    assert set(runs.values()) == {1}


@pytest.mark.parametrize("seed", range(6))
def test_every_node_runs_once_for_inputs_and_outputs_of_operators(
    seed: int, runs: Counter[str]
) -> None:
    model = load(random_cnn(seed))
    feeds = [{"x": draw(2, 3, 4, 4, seed=k)} for k in range(3)]
    names = [name for k in linears(model) for name in (k.x, k.y) if name]
    expected = whole(model, feeds, list(dict.fromkeys(names)))
    moving = opened(model, feeds)
    for linear in linears(model):
        moving.advance([linear.x, linear.y or linear.x])
        assert same(moving[linear.x], expected[linear.x])
        assert same(moving[linear.y or ""], expected[linear.y or ""])
    assert max(runs.values()) == 1


def test_the_number_of_node_runs_is_linear_in_the_depth(runs: Counter[str]) -> None:
    for depth in (4, 8, 16):
        runs.clear()
        b = Builder()
        y = "x"
        for _ in range(depth):
            y = b.add("Relu", b.add("MatMul", y, b.weight(4, 4)))
        model = load(b.model({"x": [3, 4]}, {y: [3, 4]}))
        moving = opened(model, [{"x": draw(3, 4)}])
        for linear in linears(model):
            moving.advance([linear.x])
        assert sum(runs.values()) == 2 * (depth - 1)


def test_attention(runs: Counter[str]) -> None:
    model = load(attention())
    shapes = infer(model)
    names = [n for n in names_of(model) if n not in model.constant_names]
    walk(model, [{"x": draw(*shapes.inputs["x"], seed=k)} for k in range(2)], names)
    assert set(runs.values()) == {1}


def test_what_nothing_will_read_is_let_go() -> None:
    b = Builder()
    tensors = ["x"]
    for _ in range(6):
        tensors.append(b.add("Relu", b.add("MatMul", tensors[-1], b.weight(4, 4))))
    model = load(b.model({"x": [3, 4]}, {tensors[-1]: [3, 4]}))
    moving = opened(model, [{"x": draw(3, 4)}])
    for name in tensors[1:]:
        moving.advance([name])
        assert set(moving.held) == {name}


def test_a_skipped_output_does_not_hold_its_inputs() -> None:
    """A recurrent node whose sequence nobody reads: its first output has no name."""
    b = Builder()
    b.nodes.append(
        onnx.helper.make_node("GRU", ["x", b.weight(1, 12, 5), b.weight(1, 12, 4)], ["", "h"])
    )
    b.nodes[-1].attribute.append(onnx.helper.make_attribute("hidden_size", 4))
    y = b.add("Relu", "h")
    model = load(b.model({"x": [3, 2, 5]}, {y: [1, 2, 4]}))
    moving = opened(model, [{"x": draw(3, 2, 5)}])
    moving.advance(["h"])
    moving.advance([y])
    assert set(moving.held) == {y}


def test_a_residual_stream_is_held_until_it_is_read() -> None:
    b = Builder()
    stream = b.add("MatMul", "x", b.weight(4, 4))
    branch = b.add("MatMul", b.add("Relu", stream), b.weight(4, 4))
    total = b.add("Add", stream, branch)
    y = b.add("MatMul", total, b.weight(4, 4))
    model = load(b.model({"x": [3, 4]}, {y: [3, 4]}))
    moving = opened(model, [{"x": draw(3, 4)}])
    moving.advance([branch])
    assert set(moving.held) == {stream, branch}
    moving.advance([total])
    assert set(moving.held) == {total}


def test_reaches() -> None:
    b = Builder()
    first = b.add("MatMul", "x", b.weight(4, 4))
    second = b.add("MatMul", b.add("Relu", first), b.weight(4, 4))
    model = load(b.model({"x": [3, 4]}, {second: [3, 4]}))
    moving = opened(model, [{"x": draw(3, 4)}])
    place = model.producer[second]
    assert moving.reaches(first, {place})
    assert not moving.reaches(second, {place})
    assert not moving.reaches(second, {model.producer[first]})
    moving.advance([first])
    assert moving.reaches(second, {model.producer[first]})


def test_weights_may_change_before_their_node_runs() -> None:
    b = Builder()
    first = b.add("MatMul", "x", b.constant(draw(4, 4), "a"))
    second = b.add("MatMul", first, b.constant(draw(4, 4, seed=1), "b"))
    model = load(b.model({"x": [3, 4]}, {second: [3, 4]}))
    moving = opened(model, [{"x": draw(3, 4)}])
    moving.advance([first])
    moving.weights["b"] = numpy_helper.from_array(np.zeros((4, 4), np.float32), "b")
    moving.advance([second])
    assert (moving[second][0] == 0).all()
    assert np.abs(model.array("b")).min() > 0


# --- graphs that are no chains of layers


def test_shape_arithmetic_survives_the_boundaries() -> None:
    """Shape → Gather → Concat → Reshape with an open batch: sizes differ from chunk to chunk."""
    text = """(float[n, 3, 4] x) => (float[m, k] y) {
        s = Shape(x)
        first = Gather(s, zero)
        last = Gather(s, one)
        rows = Mul(first, last)
        rows1 = Unsqueeze(rows, axis)
        to = Concat <axis = 0> (rows1, minus)
        flat = Reshape(x, to)
        a = MatMul(flat, w)
        r = Relu(a)
        back = Reshape(r, s)
        c = MatMul(back, v)
        y = Reshape(c, to)
    }"""
    model = parsed(
        text,
        w=draw(4, 4),
        v=draw(4, 4, seed=1),
        zero=np.array(0, np.int64),
        one=np.array(1, np.int64),
        axis=np.zeros(1, np.int64),
        minus=np.array([-1], np.int64),
    )
    feeds = [{"x": draw(n, 3, 4, seed=n)} for n in (2, 5, 1)]
    names = ["s", "rows", "to", "flat", "a", "r", "back", "c", "y"]
    walk(model, feeds, names)
    moving = opened(model, feeds)
    moving.advance(["a"])  # the shape that the later Reshape wants is held across
    moving.advance(["y"])
    assert same(moving["y"], whole(model, feeds, ["y"])["y"])


def test_constants_that_are_computed() -> None:
    """A weight that nodes compute from initialisers belongs to whatever segment reads it."""
    text = """(float[3, 4] x) => (float[3, 4] y) {
        half = Constant <value = float {0.5}> ()
        scaled = Mul(w, half)
        a = MatMul(x, scaled)
        r = Relu(a)
        y = MatMul(r, scaled)
    }"""
    walk(parsed(text, w=draw(4, 4)), [{"x": draw(3, 4)}], ["a", "r", "y"])


def test_nodes_with_several_outputs(runs: Counter[str]) -> None:
    text = """(float[3, 6] x) => (float[3, 2] y) {
        a, b, c = Split <axis = 1> (x, sizes)
        d = Relu(b)
        e = Add(a, d)
        y = Mul(e, c)
    }"""
    model = parsed(text, sizes=np.array([2, 2, 2], np.int64))
    walk(model, [{"x": draw(3, 6)}], ["b", "d", "a", "e", "c", "y"])
    assert set(runs.values()) == {1}


IF = """(float[2, 4] x, bool c) => (float[2, 4] y) {
    a = MatMul(x, w)
    r = Relu(a)
    z = If (c) <then_branch = t () => (float[2, 4] p) { q = MatMul(r, v)  p = Add(q, a) },
                else_branch = e () => (float[2, 4] p) { p = Neg(r) }>
    b = Tanh(z)
    y = MatMul(b, w)
}"""


def test_control_flow_with_captured_tensors(runs: Counter[str]) -> None:
    model = parsed(IF, w=draw(4, 4), v=draw(4, 4, seed=1))
    feeds = [{"x": draw(2, 4, seed=k), "c": np.array(k % 2 == 0)} for k in range(3)]
    moving = opened(model, feeds)
    expected = whole(model, feeds, ["a", "r", "b", "y"])
    for name in ("a", "r", "b", "y"):
        moving.advance([name])
        assert same(moving[name], expected[name]), name
    assert set(runs.values()) == {1}


def test_the_output_of_control_flow_may_be_a_boundary() -> None:
    """ONNX's inference looks into no body: the element type has to come from elsewhere."""
    model = parsed(IF, w=draw(4, 4), v=draw(4, 4, seed=1))
    feeds = [{"x": draw(2, 4, seed=k), "c": np.array(k % 2 == 0)} for k in range(3)]
    wanted = whole(model, feeds, ["b"])["b"]
    moving = opened(model, feeds)
    moving.advance(["z"])
    moving.advance(["b"])
    assert same(moving["b"], wanted)


def test_an_operator_of_another_domain_may_be_a_boundary() -> None:
    """ONNX Runtime's own operators have no schema in ONNX."""
    text = """(float[2, 4] x) => (float[2, 4] y) {
        a = MatMul(x, w)
        z = com.microsoft.Gelu(a)
        y = MatMul(z, v)
    }"""
    model = parsed(text, w=draw(4, 4), v=draw(4, 4, seed=1))
    feeds = [{"x": draw(2, 4)}]
    wanted = whole(model, feeds, ["y"])["y"]
    moving = opened(model, feeds)
    moving.advance(["z"])
    moving.advance(["y"])
    assert same(moving["y"], wanted)


def test_a_sequence_may_be_held_across() -> None:
    """What no array holds must not stand at a boundary, or must be refused in words."""
    text = """(float[4, 6] x) => (float[4, 3] y) {
        a = MatMul(x, w)
        parts = SplitToSequence <axis = 0> (a, two)
        first = SequenceAt(parts, zero)
        b = MatMul(first, v)
        last = SequenceAt(parts, one)
        y = Concat <axis = 0> (b, last)
    }"""
    model = parsed(
        text,
        w=draw(6, 3),
        v=draw(3, 3, seed=1),
        two=np.array(2, np.int64),
        zero=np.array(0, np.int64),
        one=np.array(1, np.int64),
    )
    feeds = [{"x": draw(4, 6)}]
    wanted = run_session(session(model, threads=1), feeds[0])
    moving = opened(model, feeds)
    moving.advance(["first"])
    moving.advance(["y"])
    assert same(moving["y"], wanted)


def test_sizes_that_cross_a_segment() -> None:
    """ONNX Runtime's inference of shapes wants to know how many sizes a Resize is given."""
    model = load(
        onnx.parser.parse_model(
            """
            <ir_version: 8, opset_import: ["" : 17]>
            g (float[1,2,4,4] x, int64[1] t) => (float[1,2,8,8] y)
              <int64[2] front = {1, 2}, float[4] w = {1.0, 2.0, 3.0, 4.0}> {
              h = Mul(x, w)
              s = Shape<start=2>(h)
              twice = Add(s, s)
              sizes = Concat<axis=0>(front, twice)
              y = Resize<mode="nearest">(h, , , sizes)
            }"""
        )
    )
    feeds = [{"x": np.ones((1, 2, 4, 4), np.float32), "t": np.zeros(1, np.int64)}] * 2
    frontier = Frontier(model, feeds)
    frontier.advance(["sizes"])
    frontier.advance(["y"])
    assert frontier["y"][1].shape == (1, 2, 8, 8)
