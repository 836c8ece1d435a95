"""--allow-interface-change: states of the interface lose slots, and everything else of it stays."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from attention_forms import HEADS, INNER, LENGTH, SIZE, WIDTH, Net, net
from conftest import Ran
from graphs import Builder
from grouped_forms import KV, cached
from onnx import numpy_helper, parser

from graphprune.analysis import Scope
from graphprune.api import apply, prepare, prune
from graphprune.comparison import compare
from graphprune.errors import ModelError
from graphprune.explain import explain, parse_place
from graphprune.interface import RECORD, fitted
from graphprune.options import Options
from graphprune.runtime import random_inputs, run_session, session
from graphprune.scoring import running, scorer_of
from graphprune.shapes import infer
from graphprune.storage import load

Run = Callable[..., Ran]
FREE = Scope(interface=True)
QUICK = {"allow_interface_change": True, "round_to": 1, "min_channels": 1, "rounds": 5}


def grouped() -> onnx.ModelProto:
    """A decomposed decoder layer; KV heads of its cache are axis 1 of four ends."""
    return net(cached)


def flat() -> onnx.ModelProto:
    """The cache as [batch, length, heads * size], split into heads inside."""
    b = Net()
    q, k, v = (b.linear("x", WIDTH, INNER) for _ in "qkv")
    k, v = (b.add("Concat", f"past_{n}", t, axis=1) for n, t in (("k", k), ("v", v)))
    for past, present in (("past_k", k), ("past_v", v)):
        b.more[0][past] = ["n", LENGTH, INNER]
        b.more[1][present] = ["n", 2 * LENGTH, INNER]
    y = b.attend(*(b.split_heads(t) for t in (q, k, v)))
    return b.model({"x": ["n", LENGTH, WIDTH], **b.more[0]}, {y: ["n", LENGTH, WIDTH], **b.more[1]})


def fused_grouped() -> onnx.ModelProto:
    b = Builder(opset=21)
    q, k, v = (b.add("MatMul", "x", b.weight(12, width)) for width in (64, 32, 32))
    lengths = b.constant(np.int32([4])), b.constant(np.int32(5))
    joined, new_k, new_v = b.add(
        "GroupQueryAttention", q, k, v, "past_k", "past_v", *lengths, outputs=3,
        domain="com.microsoft", num_heads=8, kv_num_heads=4,
    )  # fmt: skip
    y = b.add("MatMul", joined, b.weight(64, 12))
    past, present = [1, 4, 4, 8], [1, 4, 5, 8]
    return b.model(
        {"x": [1, 1, 12], "past_k": past, "past_v": past},
        {y: [1, 1, 12], new_k: present, new_v: present},
    )


def fused() -> onnx.ModelProto:
    b = Builder(opset=23)
    q, k, v = (b.add("MatMul", "x", b.weight(12, 32)) for _ in "qkv")
    joined, new_k, new_v = b.add(
        "Attention", q, k, v, "", "past_k", "past_v", outputs=3, q_num_heads=4, kv_num_heads=4
    )
    y = b.add("MatMul", joined, b.weight(32, 12))
    past, present = [1, 4, 6, 8], [1, 4, 9, 8]
    return b.model(
        {"x": [1, 3, 12], "past_k": past, "past_v": past},
        {y: [1, 3, 12], new_k: present, new_v: present},
        ir_version=11,
    )


def lstm(layers: int = 2, hidden: int = 16) -> onnx.ModelProto:
    """Layers one on the other; the states of all are stacked, and go in and come out."""
    b = Builder()
    x, states = "x", {"h": [], "c": []}
    for layer in range(layers):
        size = 4 if layer == 0 else hidden
        weights = b.weight(1, 4 * hidden, size), b.weight(1, 4 * hidden, hidden)
        first = [b.add("Slice", name, b.ints(layer), b.ints(layer + 1), b.ints(0)) for name in "hc"]
        y, *last = b.add("LSTM", x, *weights, "", "", *first, outputs=3, hidden_size=hidden)
        x = b.add("Squeeze", y, b.ints(1))
        for name, state in zip("hc", last, strict=True):
            states[name].append(state)
    h, c = (b.add("Concat", *states[name], axis=0) for name in "hc")
    y = b.add("MatMul", x, b.weight(hidden, 5))
    state = [layers, 2, hidden]
    return b.model({"x": [7, 2, 4], "h": state, "c": state}, {y: [7, 2, 5], h: state, c: state})


STATES = {  # model → ends that change, and units of the groups that hold them
    "grouped": (grouped, 4, [KV]),
    "flat": (flat, 4, [HEADS]),
    "fused grouped": (fused_grouped, 4, [4]),
    "fused": (fused, 4, [4]),
    "lstm": (lstm, 4, [16]),
}


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("way", [{"fast": True}, {"samples": 64}], ids=["fast", "calibrated"])
def test_states_lose_slots(name: str, way: dict[str, object]) -> None:
    """The cut is proved, inputs of the original's sizes are cut for measuring and repair, and a
    plan makes the same model again."""
    make, ends, units = STATES[name]
    source = make()
    groups = prepare(source, FREE).analysis.coupling.groups
    assert [len(group) for group in groups] == units
    result = prune(source, flops=0.7, **QUICK, **way)
    assert result.verdict.passed
    assert result.verdict.latency is not None
    assert len(result.interface) == ends
    assert len(result.repairs) > 0
    values = (*result.model.graph.input, *result.model.graph.output)
    sizes = {
        v.name: [d.dim_value or d.dim_param for d in v.type.tensor_type.shape.dim] for v in values
    }
    for end in result.interface:
        assert sizes[end.name] == list(end.after)
        assert end.before != end.after
    runner = session(load(result.model))
    outputs = run_session(runner, random_inputs(load(result.model), infer(load(result.model))))
    for value, output in zip(result.model.graph.output, outputs, strict=True):
        named = zip(sizes[value.name], output.shape, strict=True)
        assert all(size == got for size, got in named if isinstance(size, int))
    again = apply(source, result.plan, options=Options(measure=False))
    assert again.model == result.model


@pytest.mark.parametrize("name", STATES)
def test_nothing_changes_unasked(name: str) -> None:
    source = STATES[name][0]()
    groups = prepare(source).analysis.coupling.groups
    ends = {v.name for v in (*source.graph.input, *source.graph.output)}
    slots = prepare(source).analysis.relations.slots.tensors
    coupling = prepare(source).analysis.coupling
    assert all((coupling.unit_of(a.slots) < 0).all() for end in ends for a in slots[end])
    if groups:
        result = prune(source, flops=0.9, allow_miss=True, fast=True, measure=False)
        assert result.interface == ()
        assert not any(entry.key == RECORD for entry in result.model.metadata_props)


def ends_of(*names: str, source: onnx.ModelProto) -> bool:
    """Whether any slot of these graph inputs and outputs may leave."""
    analysis = prepare(source, FREE).analysis
    tensors = analysis.relations.slots.tensors
    return any((analysis.coupling.unit_of(a.slots) >= 0).any() for n in names for a in tensors[n])


def test_what_is_given_and_asked_for_stays() -> None:
    """Features that are the first output hold the states that they are tied to."""
    b = Builder()
    weights = b.weight(1, 64, 4), b.weight(1, 64, 16)
    y, h, c = b.add("LSTM", "x", *weights, "", "", "h", "c", outputs=3, hidden_size=16)
    state = [1, 2, 16]
    ends = {"x": [7, 2, 4], "h": state, "c": state}
    first = b.model(ends, {y: [7, 1, 2, 16], h: state, c: state})
    assert not ends_of("x", "h", "c", y, h, c, source=first)
    last = b.model(ends, {h: state, c: state, y: [7, 1, 2, 16]})
    assert not ends_of("h", "c", y, h, c, source=last)  # h is asked for
    b.add("MatMul", b.add("Squeeze", y, b.ints(1)), b.weight(16, 3))
    scores = b.nodes[-1].output[0]
    other = b.model(ends, {scores: [7, 2, 3], y: [7, 1, 2, 16], h: state, c: state})
    assert ends_of("h", source=other)
    assert ends_of(y, source=other)
    assert not ends_of("x", scores, source=other)


def test_pictures_and_conditions_stay() -> None:
    """A residual over the first input; a further input that only weights of the model read."""
    b = Builder()
    hidden = b.add("Relu", b.conv("x", 3, 8))
    shift = b.add("Unsqueeze", b.add("MatMul", "t", b.weight(6, 8)), b.ints(2, 3))
    y = b.add("Add", "x", b.conv(b.add("Add", hidden, shift), 8, 3))
    extra = b.conv(hidden, 8, 4)
    source = b.model({"x": [1, 3, 6, 6], "t": [1, 6]}, {y: [1, 3, 6, 6], extra: [1, 4, 6, 6]})
    assert not ends_of("x", "t", y, extra, source=source)


def test_a_state_without_an_output() -> None:
    """A first state that is only given is one too."""
    b = Builder()
    h = b.add(
        "RNN", "x", b.weight(1, 8, 4), b.weight(1, 8, 8), "", "", "h", outputs=2, hidden_size=8
    )
    y = b.add("MatMul", h[1], b.weight(8, 3))
    source = b.model({"x": [7, 2, 4], "h": [1, 2, 8]}, {y: [1, 2, 3]})
    result = prune(source, flops=0.6, **QUICK, fast=True)
    assert [(end.name, end.side) for end in result.interface] == [("h", "input")]
    assert result.verdict.passed


def test_symbolic_sizes_stay() -> None:
    """Where the cache does not say how many heads it has, they stay."""
    source = net(cached)
    for value in source.graph.input:
        if value.name == "past_k":
            value.type.tensor_type.shape.dim[1].dim_param = "heads"
    shape = {"past_k": (1, KV, LENGTH, SIZE)}
    analysis = prepare(source, Scope(interface=True, input_shapes=shape)).analysis
    assert [len(group) for group in analysis.coupling.groups] == [HEADS // KV]


def test_an_input_may_be_protected() -> None:
    coupling = prepare(grouped(), Scope(interface=True, protect=("past_*",))).analysis.coupling
    assert [len(group) for group in coupling.groups] == [HEADS // KV]


def test_what_pins_says_so_until_it_is_allowed() -> None:
    source = grouped()
    bare, free = prepare(source).analysis, prepare(source, FREE).analysis
    assert "graph input 'past_k'" in explain(bare, parse_place(bare, "past_k:1"))
    assert f"{KV} units of it" in explain(free, parse_place(free, "past_k:1"))


def test_the_record_fits_arrays_of_the_original() -> None:
    source = grouped()
    result = prune(source, flops=0.6, **QUICK, fast=True)
    original, pruned = load(source), load(result.model)
    feeds = random_inputs(original, infer(original))
    smaller = fitted(pruned, feeds)
    assert smaller["past_k"].shape[1] < feeds["past_k"].shape[1]
    assert fitted(pruned, smaller).keys() == smaller.keys()
    assert all(np.array_equal(fitted(pruned, smaller)[n], smaller[n]) for n in smaller)
    entry = next(e for e in result.model.metadata_props if e.key == RECORD)
    kept = json.loads(entry.value)["past_k"]["1"]
    assert kept["of"] == KV
    assert np.array_equal(np.take(feeds["past_k"], kept["kept"], axis=1), smaller["past_k"])


@pytest.mark.parametrize("text", ["[", "[1]", '{"past_k": {"1": {"of": 2}}}'])
def test_a_record_that_is_none(text: str) -> None:
    source = grouped()
    source.metadata_props.add(key=RECORD, value=text)
    with pytest.raises(ModelError, match="record"):
        prune(source, flops=0.6, **QUICK, fast=True)


def test_pruned_twice() -> None:
    """The record is then relative to the model that was pruned last."""
    once = prune(lstm(), flops=0.8, **QUICK, fast=True)
    twice = prune(once.model, flops=0.6, **QUICK, fast=True)
    assert twice.verdict.passed
    assert [e.before for e in twice.interface] == [e.after for e in once.interface]


def test_compare(tmp_path: Path) -> None:
    source = grouped()
    result = prune(source, flops=0.6, **QUICK, fast=True)
    a, b = tmp_path / "a.onnx", tmp_path / "b.onnx"
    onnx.save(source, a)
    onnx.save(result.model, b)
    given = dict.fromkeys(("past_k", "past_v"), (2, KV, LENGTH, SIZE))
    for shapes in ({}, {"x": (2, LENGTH, WIDTH), **given}):
        _, document = compare(a, b, input_shapes=shapes)
        assert document["same_interface"] is False
        assert 0 < document["relative_difference"] < 10


def test_scores_are_of_inputs_of_the_original(tmp_path: Path) -> None:
    source = fused()
    result = prune(source, flops=0.7, **QUICK, fast=True)
    rng = np.random.default_rng(0)
    shapes = {"x": (3, 3, 12), "past_k": (3, 4, 6, 8), "past_v": (3, 4, 6, 8)}
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    path = tmp_path / "labelled.npz"
    np.savez(path, **arrays, labels=np.zeros(3, np.int64))
    score = scorer_of(path, load(source))
    assert 0 <= score(load(result.model), 1, "cpu") <= 1
    first = {name: array[:1] for name, array in arrays.items()}
    outputs = running(load(result.model), 1, "cpu")(first)
    again = running(load(result.model), 1, "cpu")({**first, "past_k": outputs[1][:, :, :6]})
    assert outputs[1].shape == again[1].shape  # a state that came out goes in as it is


def test_a_plan_is_found_among_many() -> None:
    """--search and --max-drop run what they try on inputs of the original."""
    source = fused()
    found = prune(source, flops=0.7, **QUICK, samples=40, search=2)
    assert found.interface
    smallest = prune(source, max_drop=0.9, **QUICK, samples=40)
    assert smallest.interface


def test_bodies_of_control_flow() -> None:
    """A state that only a branch reads and writes."""
    source = parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]> g (float[7,2,4] x, float[1,2,16] h, float[5] go)
        => (float[2,3] y, float[1,2,16] hn) {
          s = ReduceSum<keepdims=0>(go) zero = Constant<value = float {0}>() c = Greater(s, zero)
          p, hn = If(c) <
            then_branch = t () => (float[1,2,16] m, float[1,2,16] n) { , n = GRU<hidden_size=16>
              (x, w, r, , , h) m = Tanh(n) },
            else_branch = e () => (float[1,2,16] m, float[1,2,16] n) { m = Neg(h) n = Identity(h) }>
          one = Constant<value = int64[1] {0}>() q = Squeeze(p, one) y = MatMul(q, v) }"""
    )
    rng = np.random.default_rng(0)
    for name, shape in {"w": (1, 48, 4), "r": (1, 48, 16), "v": (16, 3)}.items():
        array = rng.standard_normal(shape).astype(np.float32)
        source.graph.initializer.append(numpy_helper.from_array(array, name))
    result = prune(source, flops=0.7, **QUICK, fast=True)
    assert {end.name for end in result.interface} == {"h", "hn"}
    assert result.verdict.passed


def test_the_command_line(run: Run, tmp_path: Path) -> None:
    path, out, plan = (tmp_path / name for name in ("model.onnx", "out.onnx", "plan.json"))
    onnx.save(grouped(), path)
    asked = (path, "--target-flops", 0.6, "--fast", "--round-to", 1, "--min-channels", 1)
    ran = run(*asked, "--allow-interface-change", "-o", out, "--plan-out", plan, "--json")
    assert ran.code == 0
    document = json.loads(ran.out)
    assert {"name": "past_k", "side": "input", "before": ["n", KV, LENGTH, SIZE],
            "after": ["n", 1, LENGTH, SIZE]} in document["interface"]  # fmt: skip
    assert document["options"]["allow_interface_change"] is True
    assert "interface changed: input 'past_k'" in ran.err
    again = tmp_path / "again.onnx"
    assert run("apply", path, plan, "-o", again).code == 0
    assert again.read_bytes() == out.read_bytes()
    assert run("compare", path, out).code == 0
    listed = run("inspect", path, "--allow-interface-change", "--json")
    assert [group["units"] for group in json.loads(listed.out)["groups"]] == [KV]


def test_a_symbol_has_one_size() -> None:
    """A mask over past and new positions is as long as both; what one input says holds for all."""
    b = Builder()
    joined = b.add("Concat", "past", "x", axis=1)
    y = b.add("Mul", joined, b.add("Unsqueeze", "mask", b.ints(2)))
    ends = {"x": ["n", "new", 3], "past": ["n", "old", 3], "mask": ["n", "old + new"]}
    model = load(b.model(ends, {y: ["n", "all", 3]}))
    assert infer(model).inputs == {"x": (1, 32, 3), "past": (1, 32, 3), "mask": (1, 64)}
    found = infer(model, {"past": (2, 7, 3)})
    assert found.inputs == {"x": (2, 32, 3), "past": (2, 7, 3), "mask": (2, 39)}
    assert found.shape[y] == (2, 39, 3)


def test_a_latency_budget() -> None:
    """Plans are measured on inputs of the original; no bound on what a noisy machine finds."""
    result = prune(fused(), latency=0.9, allow_miss=True, threads=1, fast=True, **QUICK)
    assert result.verdict.passed
    assert result.verdict.latency is not None
