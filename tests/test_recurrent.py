"""LSTM, GRU and RNN lose hidden units and input features."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from graphs import Builder
from onnx.reference import ReferenceEvaluator
from recurrent_nets import GATES, QUICK, WAYS, draw, feeds_of, finished, group_of, layer, network

from graphprune import api
from graphprune.check import LawBrokenError, check_rule
from graphprune.linear import Linear, linears
from graphprune.model import Array, Model
from graphprune.oracle import with_outputs
from graphprune.plugins import collect, installed
from graphprune.rewriting import rewritten
from graphprune.rules import BUILTIN
from graphprune.rules.op import Op
from graphprune.runtime import Feeds, run_session, session
from graphprune.shapes import infer
from graphprune.storage import load
from graphprune.unfold import inputs_at, positions

HEAD = '<ir_version: 8, opset_import: ["": 17]> g ({inputs}) => ({outputs}) {{{body}}}'


# --- the rule


def text(
    op: str, way: str, more: str = "", names: str = "", outputs: str = "float[5,D,2,6] y"
) -> str:
    """x: [5, 2, 4], 6 hidden units; ``D`` and ``G`` stand for directions and gates."""
    rows = GATES[op] * 6
    inputs = f"float[5,2,4] x, float[D,{rows},4] w, float[D,{rows},6] r" + more
    written = ", ".join(part.split()[-1] if part else "" for part in outputs.split(", "))
    body = f'{written} = {op}<hidden_size=6, direction="{way}">(x, w, r{names})'
    declared = ", ".join(part for part in outputs.split(", ") if part)
    source = HEAD.format(inputs=inputs, outputs=declared, body=body)
    return source.replace("[D,", f"[{WAYS[way]},").replace(",D,", f",{WAYS[way]},")


@pytest.mark.parametrize("op", GATES)
@pytest.mark.parametrize("way", WAYS)
def test_law_holds(op: str, way: str) -> None:
    assert check_rule(text(op, way)).removals == 6


@pytest.mark.parametrize("op", GATES)
@pytest.mark.parametrize("way", ["reverse", "bidirectional"])
def test_law_holds_with_everything(op: str, way: str) -> None:
    """Bias, lengths, first states, all outputs; LSTM also with peepholes and a clip."""
    more = f", float[D,{12 * GATES[op]}] b, float[D,2,6] h"
    names, outputs = ", b, n, h", "float[5,D,2,6] y, float[D,2,6] yh"
    if op == "LSTM":
        more += ", float[D,2,6] c, float[D,18] p"
        names, outputs = names + ", c, p", outputs + ", float[D,2,6] yc"
    source = text(op, way, more, names, outputs)
    lengths = "{n = Constant<value = int32[2] {5, 3}>() "
    assert check_rule(source.replace("{", lengths, 1)).removals == 6
    if op == "LSTM":
        clipped = source.replace("hidden_size=6", "hidden_size=6, clip=0.4, input_forget=1")
        assert check_rule(clipped.replace("{", lengths, 1)).removals == 6


def test_other_activations_and_reset() -> None:
    chosen = 'hidden_size=6, activations=["HardSigmoid", "Softsign"], linear_before_reset=1'
    assert check_rule(text("GRU", "forward").replace("hidden_size=6", chosen)).passed
    chosen = 'hidden_size=6, activations=["Relu"]'
    assert check_rule(text("RNN", "reverse").replace("hidden_size=6", chosen)).passed


@pytest.mark.parametrize("outputs", [", float[D,2,6] yh", ", , float[D,2,6] yc"])
def test_outputs_may_be_absent(outputs: str) -> None:
    assert check_rule(text("LSTM", "bidirectional", outputs=outputs)).removals == 6


def _reference(model: Model) -> Callable[[Feeds], list[Array]]:
    evaluator = ReferenceEvaluator(model.assemble())
    return lambda feeds: list(evaluator.run(None, dict(feeds)))


@pytest.mark.parametrize("op", GATES)
def test_batch_first(op: str) -> None:
    """``layout`` 1, which ONNX Runtime's CPU lacks: ONNX's own evaluator takes its place."""
    source = text(op, "forward", ", float[2,1,6] h", ", , , h", "float[2,5,1,6] y, float[2,1,6] yh")
    source = source.replace("hidden_size=6", "hidden_size=6, layout=1")
    assert check_rule(source.replace("[5,2,4] x", "[2,5,4] x"), open_model=_reference).passed


@pytest.mark.parametrize(
    "first",
    [
        "z = Constant<value = float {0.5}>() h = Expand(z, s)",
        "h = ConstantOfShape<value = float[1] {0.5}>(s)",
    ],
)
def test_computed_first_states(first: str) -> None:
    """Sizes from the input's shape, as exports with an open batch have them."""
    body = (
        "d = Shape<start=1, end=2>(x) one = Constant<value = int64[1] {1}>() "
        "six = Constant<value = int64[1] {6}>() s = Concat<axis=0>(one, d, six) " + first + " "
    )
    source = text("GRU", "forward", names=", , , h").replace("{", "{" + body, 1)
    assert check_rule(source).removals == 6


STACKED = HEAD.format(
    inputs="float[5,2,4] x, float[2,24,4] w, float[2,24,6] r, float[2,16,12] u, float[2,16,4] v",
    outputs="float[5,2,8] z",
    body="""
    a = Constant<value = int64[3] {0, 0, -1}>() b = Constant<value = int64[3] {5, 2, 8}>()
    y = LSTM<hidden_size=6, direction="bidirectional">(x, w, r)
    t = Transpose<perm=[0, 2, 1, 3]>(y) f = Reshape(t, a)
    q = LSTM<hidden_size=4, direction="bidirectional">(f, u, v)
    p = Transpose<perm=[0, 2, 1, 3]>(q) z = Reshape(p, b)
    """,
)


def test_stacked_layers() -> None:
    """Directions are folded with the hidden units between the layers."""
    assert check_rule(STACKED).removals == 6


def test_the_last_state_starts_another() -> None:
    """An encoder and a decoder have their units in common."""
    source = HEAD.format(
        inputs="float[5,2,4] x, float[1,24,4] w, float[1,24,6] r, float[1,24,4] u, float[1,24,6] v",
        outputs="float[5,1,2,6] z",
        body="y, h, c = LSTM<hidden_size=6>(x, w, r) z = LSTM<hidden_size=6>(x, u, v, , , h, c)",
    )
    assert check_rule(source).removals == 6


def test_a_wrong_rule_is_caught() -> None:
    """Recurrent weights that are not said to read states; a size that is not counted."""

    def forgetful(op: Op) -> None:
        BUILTIN["", "LSTM"](op)
        op.relations.contractions.clear()

    def careless(op: Op) -> None:
        BUILTIN["", "LSTM"](op)
        op.relations.counts.clear()

    with pytest.raises(LawBrokenError):
        check_rule(text("LSTM", "forward"), rules={**BUILTIN, ("", "LSTM"): careless})
    stored = finished(network("LSTM"))  # inputs are blanked where slots leave, weights are not
    assert check_rule(stored).passed
    with pytest.raises(LawBrokenError):
        check_rule(stored, rules={**BUILTIN, ("", "LSTM"): forgetful})


# --- networks


def test_what_a_unit_is() -> None:
    """Rows of all gates, in both directions, with its column of the recurrent weights and of what
    reads it."""
    prepared = api.prepare(finished(network("GRU", "bidirectional")))
    coupling = prepared.analysis.coupling
    group = group_of(prepared, ("GRU2_r", 2))
    axes = {("GRU2_w", 1): 3, ("GRU2_r", 1): 3, ("GRU2_r", 2): 1, ("GRU2_b", 1): 6, ("out", 0): 2}
    assert set(group.signature) == set(axes)
    assert len(group) == 12
    slots = coupling.relations.slots.tensors
    for (name, axis), times in axes.items():
        places = np.flatnonzero(coupling.unit_of(slots[name][axis].slots) == group.units[5])
        assert places.tolist() == [12 * i + 5 for i in range(times)]
    features = group_of(prepared, ("GRU2_w", 2))
    assert set(features.signature) == {("in", 1), ("GRU2_w", 2)}


def test_scores_add_up_the_gates() -> None:
    """L1: the mean over rows of W and R, columns of R, and the reader's rows."""
    from graphprune.criteria import Scoring, score

    prepared = api.prepare(finished(network("LSTM", "bidirectional")))
    model, coupling = prepared.analysis.model, prepared.analysis.coupling
    group = group_of(prepared, ("LSTM2_r", 2))
    criterion = prepared.registry.criterion("l1")
    found = score(model, coupling, criterion, Scoring(normalise="none"))[group.units]
    w, r, out = (np.abs(model.array(n)).astype(float) for n in ("LSTM2_w", "LSTM2_r", "out"))
    parts = [m.reshape(2, 4, 12, -1).sum(axis=(0, 1, 3)) for m in (w, r)]
    parts += [r.sum(axis=(0, 1)), out.reshape(2, 12, 3).sum(axis=(0, 2))]
    assert np.allclose(found, np.mean(parts, axis=0))


@pytest.mark.parametrize("seed", range(6))
def test_random_stacks(seed: int) -> None:
    """Layers of any kind, width and direction, with sums and products between them."""
    choose = random.Random(seed)
    b = Builder(seed)
    h, width = "x", 5
    for _ in range(3):
        op, way, hidden = choose.choice([*GATES]), choose.choice([*WAYS]), choose.choice([3, 4, 6])
        more = {"linear_before_reset": choose.choice([0, 1])} if op == "GRU" else {}
        y = layer(b, op, h, width, hidden, way, **more)
        wide = hidden * WAYS[way]
        if choose.random() < 0.4:
            y = b.add("Add", y, b.add("MatMul", h, b.weight(width, wide)))
        h, width = b.add("Relu", y) if choose.random() < 0.3 else y, wide
    y = b.add("MatMul", h, b.weight(width, 2))
    assert check_rule(b.model({"x": [4, 2, 5]}, {y: [4, 2, 2]})).removals == 6


# --- the recurrent weights as a linear operator


@pytest.mark.parametrize("way", WAYS)
def test_both_halves_make_the_gates(way: str) -> None:
    """tanh(W x + b_w + R h + b_r), each from its own operator, is what an RNN answers."""
    model = load(finished(network("RNN", way)))
    node = next(n for n in model.nodes if n.op_type == "RNN")
    taps = with_outputs(model, [node.input[0], node.output[0]], infer(model))
    _, x, y = run_session(session(taps, 1), feeds_of(1, 3)[0])
    total = 0.0
    for one, tensor in zip(linears(model)[1:3], (x, y), strict=True):
        where = positions(one, tensor.shape, 1000, (0,))
        assert len(where) == 21
        rows = inputs_at(one, tensor, tensor.shape, where)
        matrix = one.matrix(model)
        bias = one.offset(model, matrix.shape[0] * matrix.shape[1])
        gates = rows @ matrix.transpose(0, 2, 1) + bias[:, None]
        total = total + gates.swapaxes(0, 1).reshape(21, -1)
    wanted = y.swapaxes(1, 2).reshape(21, -1)
    assert np.allclose(np.tanh(total), wanted, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_both_halves_are_written_beside_each_other(bias: bool) -> None:
    b = Builder()
    more = [b.constant(draw(2, 24), "b")] if bias else []
    w, r = b.constant(draw(2, 12, 5), "w"), b.constant(draw(2, 12, 4), "r")
    y = b.add("GRU", "x", w, r, *more, hidden_size=4, direction="bidirectional")
    model = load(b.model({"x": [3, 2, 5]}, {y: [3, 2, 2, 4]}))
    first, second = linears(model)
    assert (first.weight, second.weight) == ("w", "r")
    assert second.matrix(model).shape == (2, 12, 4)

    def ones(one: Linear, value: float) -> tuple[Linear, Array, Array]:
        matrix = one.matrix(model)
        return one, matrix, np.full(matrix.shape[:2], value)

    again = rewritten(model, [ones(first, 1.0), ones(second, 2.0)])
    assert again.array(again.nodes[0].input[3]).tolist() == [[1.0] * 12 + [2.0] * 12] * 2
    only = rewritten(model, [ones(second, 2.0)])
    kept = model.array("b")[:, :12] if bias else np.zeros((2, 12))
    assert np.array_equal(only.array(only.nodes[0].input[3])[:, :12], kept)
    onnx.checker.check_model(again.assemble(), full_check=True)


def test_states_that_cannot_be_seen_are_not_read() -> None:
    """No sequence, or batch first: the recurrent weights are no linear operator."""
    b = Builder()
    weights = b.weight(1, 12, 5), b.weight(1, 12, 4)
    b.nodes.append(onnx.helper.make_node("GRU", ["x", *weights], ["", "h"], hidden_size=4))
    model = load(b.model({"x": [3, 2, 5]}, {"h": [1, 2, 4]}))
    assert [one.weight for one in linears(model)] == [weights[0]]
    prepared = api.prepare(model.assemble())  # the normal form names the sequence
    assert [one.weight for one in linears(prepared.analysis.model)] == list(weights)


# --- the normal form


def run_pass(name: str, model: onnx.ModelProto) -> Model:
    prepared = api.prepare(model)
    return collect(installed()).passes[name]().run(load(model), prepared.context).model


def gathered_gates(b: Builder, leak: bool = False) -> onnx.ModelProto:
    """An LSTM whose gates stand in another order in the stored weights."""
    weights = []
    for width in (5, 6):
        stored = b.weight(24, width)
        pieces = [
            b.add("Slice", stored, b.ints(6 * i), b.ints(6 * i + 6), b.ints(0))
            for i in (0, 3, 1, 2)
        ]
        weights.append(b.add("Unsqueeze", b.add("Concat", *pieces, axis=0), b.ints(0)))
    y = b.add("LSTM", "x", *weights, hidden_size=6)
    outputs = {y: [4, 1, 2, 6]}
    if leak:
        outputs[b.add("MatMul", y, b.add("Transpose", stored))] = [4, 1, 2, 24]
    return b.model({"x": [4, 2, 5]}, outputs)


def test_gates_in_another_order_are_stored_as_they_are_read() -> None:
    proto = gathered_gates(Builder())
    model = run_pass("join_weights", proto)
    assert [node.op_type for node in model.nodes] == ["LSTM"]
    x = {"x": draw(4, 2, 5)}
    (a,), (c,) = (run_session(session(m, 1), x) for m in (load(proto), model))
    assert np.array_equal(a, c)
    assert check_rule(proto).passed


def test_weights_that_are_read_twice_stay_in_pieces() -> None:
    model = run_pass("join_weights", gathered_gates(Builder(), leak=True))
    assert [node.op_type for node in model.nodes].count("Concat") == 1


def test_equal_first_states_do_not_couple_layers() -> None:
    b = Builder(2)
    zeros = b.constant(np.zeros((1, 2, 8), np.float32))
    h = b.add("Relu", "x")
    for width in (5, 8):
        w, r = b.weight(1, 32, width), b.weight(1, 32, 8)
        h = b.add("Squeeze", b.add("LSTM", h, w, r, "", "", zeros, zeros, hidden_size=8), b.ints(1))
    y = b.add("MatMul", h, b.weight(8, 3))
    prepared = api.prepare(b.model({"x": [4, 2, 5]}, {y: [4, 2, 3]}))
    assert [len(group) for group in prepared.analysis.coupling.groups] == [8, 8]
    result = api.prune(b.model({"x": [4, 2, 5]}, {y: [4, 2, 3]}), **QUICK, samples=16)
    assert result.verdict.passed


@pytest.mark.parametrize(
    "fill",
    [
        "h = ConstantOfShape<value = float[1] {0.25}>(s)",
        "q = Constant<value = float[1] {0.25}>() h = Expand(q, s)",
    ],
)
def test_computed_first_states_do_not_couple_layers(fill: str) -> None:
    """An open batch: zeros for all layers, of which each reads a slice."""
    source = f"""<ir_version: 8, opset_import: ["": 17]> g (float[4,n,5] x) => (float[4,n,3] y) {{
        i = Constant<value = int64[1] {{0}}>() j = Constant<value = int64[1] {{1}}>()
        k = Constant<value = int64[1] {{2}}>() e = Constant<value = int64[1] {{8}}>()
        d = Shape<start=1, end=2>(x) s = Concat<axis=0>(k, d, e) {fill}
        a = Slice(h, i, j, i) b = Slice(h, j, k, i)
        p = GRU<hidden_size=8>(x, wa, ra, , , a) f = Squeeze(p, j)
        o = GRU<hidden_size=8>(f, wb, rb, , , b) t = Squeeze(o, j)
        y = MatMul(t, w)
    }}"""
    proto = onnx.parser.parse_model(source)
    weights = {"wa": draw(1, 24, 5), "ra": draw(1, 24, 8), "wb": draw(1, 24, 8, seed=1)}
    weights |= {"rb": draw(1, 24, 8, seed=2), "w": draw(8, 3)}
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in weights.items())
    prepared = api.prepare(proto)
    assert [len(group) for group in prepared.analysis.coupling.groups] == [8, 8]
    x = {"x": draw(4, 6, 5)}
    (a,), (c,) = (run_session(session(m, 1), x) for m in (load(proto), prepared.analysis.model))
    assert np.array_equal(a, c)
    result = api.prune(proto, **QUICK, samples=16)
    assert result.verdict.passed
    assert run_session(session(load(result.model), 1), x)[0].shape == (4, 6, 3)


def test_weights_that_are_filled_stay_shared() -> None:
    """Of constant sizes: a matrix that two products read is one matrix."""
    b = Builder()
    w = b.add("ConstantOfShape", b.ints(5, 5))
    y = b.add("MatMul", b.add("MatMul", "x", w), w)
    proto = b.model({"x": [2, 5]}, {y: [2, 5]})
    assert len(run_pass("separate_fills", proto).nodes) == 3
