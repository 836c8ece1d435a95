"""What does nothing leaves: the cleaned model is smaller and computes the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import Builder, attention
from onnx import numpy_helper

from graphprune import api
from graphprune.analysis import Scope
from graphprune.oracle import relative_error
from graphprune.prepared import Prepared
from graphprune.runtime import opened, random_inputs

NOISE = 1e-5


def cleaned(model: onnx.ModelProto, **scope: Any) -> Prepared:
    """Prepared with the clean-up, and proved: on random inputs of several seeds."""
    prepared = api.prepare(model, Scope(**scope))
    runs = opened(prepared.original), opened(prepared.analysis.model.closed)
    for seed in range(3):
        feeds = random_inputs(prepared.original, prepared.analysis.shapes, seed)
        assert relative_error(runs[0](feeds), runs[1](feeds)) < NOISE
    return prepared


def counts(prepared: Prepared) -> tuple[int, int, int]:
    """Units that left: dead, constant, duplicate."""
    found = list(prepared.cleaned.counts.values())
    return found[0], found[1], found[2]


def widths(prepared: Prepared, *names: str) -> list[tuple[int, ...]]:
    return [tuple(prepared.analysis.model.initializers[name].dims) for name in names]


def edit(b: Builder, name: str, change: Any) -> None:
    """Rewrite an initialiser of a builder in place."""
    for i, tensor in enumerate(b.initializers):
        if tensor.name == name:
            value = numpy_helper.to_array(tensor).copy()
            change(value)
            b.initializers[i] = numpy_helper.from_array(value, name)


def mlp(*changes: tuple[int, Any], act: str = "Relu") -> onnx.ModelProto:
    """[2, 6] → 12 → 8 → 5: weights c0, c2, c4 with biases c1, c3, c5."""
    b = Builder(4)
    x = "x"
    for inner, outer in ((6, 12), (12, 8), (8, 5)):
        x = b.add("Gemm", x, b.weight(outer, inner), b.weight(outer), transB=1)
        x = b.add(act, x) if outer != 5 else x
    for number, change in changes:
        edit(b, f"c{number}", change)
    return b.model({"x": [2, 6]}, {x: [2, 5]})


def put(where: Any, what: Any) -> Any:
    def change(value: Any) -> None:
        value[where] = what

    return change


def same(to: Any, source: Any) -> Any:
    def change(value: Any) -> None:
        value[to] = value[source]

    return change


def test_zero_rows_with_a_zero_bias_are_dead() -> None:
    rows = [1, 4, 7]
    prepared = cleaned(mlp((0, put(rows, 0)), (1, put(rows, 0))))
    assert counts(prepared) == (3, 0, 0)
    assert widths(prepared, "c0", "c1", "c2") == [(9, 6), (9,), (8, 9)]


def test_columns_that_nobody_reads_take_their_producer_along() -> None:
    prepared = cleaned(mlp((2, put((slice(None), [0, 5]), 0))))
    assert counts(prepared) == (2, 0, 0)
    assert widths(prepared, "c0", "c2") == [(10, 6), (8, 10)]


def test_what_only_dead_units_read_is_dead_too() -> None:
    """Units 0 and 5 are read by unit 3 of the next layer alone, which nobody reads."""

    def read_by_one(value: Any) -> None:
        value[[0, 1, 2, 4, 5, 6, 7], 0] = 0
        value[[0, 1, 2, 4, 5, 6, 7], 5] = 0

    prepared = cleaned(mlp((2, read_by_one), (4, put((slice(None), 3), 0))))
    assert counts(prepared) == (3, 0, 0)
    assert widths(prepared, "c0", "c2", "c4") == [(10, 6), (7, 10), (5, 7)]


@pytest.mark.parametrize("act", ["Relu", "Sigmoid", "Tanh", "HardSwish", "Softplus"])
def test_constants_are_folded_into_the_next_bias(act: str) -> None:
    prepared = cleaned(mlp((0, put([2, 3], 0)), (1, put([2, 3], 0.7)), act=act))
    assert counts(prepared) == (0, 2, 0)
    assert widths(prepared, "c0", "c2", "c3") == [(10, 6), (8, 10), (8,)]


def test_a_relu_that_never_fires_is_dead() -> None:
    """Behind a Sigmoid everything lies between 0 and 1."""
    b = Builder(5)
    x = b.add("Sigmoid", b.add("Gemm", "x", b.weight(12, 6), b.weight(12), transB=1))
    x = b.add("Relu", b.add("Gemm", x, b.weight(8, 12), b.weight(8), transB=1))
    y = b.add("MatMul", x, b.weight(8, 5))
    edit(b, "c3", put(slice(None), [-100.0] * 2 + [1.0] * 6))
    prepared = cleaned(b.model({"x": [2, 6]}, {y: [2, 5]}))
    assert counts(prepared) == (2, 0, 0)
    assert widths(prepared, "c2") == [(6, 12)]


def test_equal_rows_are_one_and_their_columns_are_added() -> None:
    rows = (0, same([3, 9], [1, 1])), (1, same([3, 9], [1, 1]))
    prepared = cleaned(mlp(*rows))
    assert counts(prepared) == (0, 0, 2)
    assert widths(prepared, "c0", "c2") == [(10, 6), (8, 10)]
    different = cleaned(mlp(rows[0]))
    assert counts(different) == (0, 0, 0)


def conv_chain(norm: bool, kernel: int = 3, pad: int = 1) -> Builder:
    """Conv (32) → [BatchNormalization] → Relu → Conv (32) → pool → MatMul; its weights are c0 with
    bias c1, then (c2 mean, c3 bias, c4 scale, c5 variance)."""
    b = Builder(6)
    x = b.add("Conv", "x", b.weight(32, 3, 3, 3), b.weight(32), pads=[1] * 4)
    x = b.add("Relu", b.norm(x, 32) if norm else x)
    x = b.add("Conv", x, b.weight(32, 32, kernel, kernel), b.weight(32), pads=[pad] * 4)
    b.add("MatMul", b.add("Flatten", b.add("GlobalAveragePool", x)), b.weight(32, 5))
    b.nodes[-1].output[0] = "y"
    return b


def finished(b: Builder) -> onnx.ModelProto:
    return b.model({"x": ["n", 3, 8, 8]}, {"y": ["n", 5]})


FAST = ("--fast", "--target-flops", "0.4")
HALF = list(range(16))


def test_a_scale_of_zero_leaves_a_constant_and_relu_may_make_it_zero() -> None:
    b = conv_chain(norm=True)
    edit(b, "c4", put(HALF, 0))
    edit(b, "c3", put(HALF, -0.5))
    assert counts(cleaned(finished(b))) == (16, 0, 0)


def test_constants_at_zero_padding_are_gathered_in_one_channel() -> None:
    b = conv_chain(norm=True)
    edit(b, "c4", put(range(17), 0))
    edit(b, "c3", put(range(17), np.linspace(0.1, 1.0, 17)))
    prepared = cleaned(finished(b))
    assert counts(prepared) == (0, 16, 0)
    assert widths(prepared, "c0") == [(16, 3, 3, 3)]


@pytest.mark.parametrize("kernel", [1, 3])
def test_constants_without_padding_are_folded(kernel: int) -> None:
    b = conv_chain(norm=False, kernel=kernel, pad=0)
    edit(b, "c0", put(HALF, 0))
    edit(b, "c1", put(HALF, 0.25))
    prepared = cleaned(finished(b))
    assert counts(prepared) == (0, 16, 0)
    assert widths(prepared, "c0") == [(16, 3, 3, 3)]


def test_counts_of_convolutions_stay_in_the_blocked_layout() -> None:
    """A channel less than a block's would be slower: dead ones are left in, and said so."""
    b = conv_chain(norm=False)
    edit(b, "c0", put(range(5), 0))
    edit(b, "c1", put(range(5), 0))
    prepared = cleaned(finished(b))
    assert counts(prepared) == (4, 0, 0)
    assert "1 that do nothing stay" in prepared.cleaned.notes[-1]


def test_one_unit_of_every_axis_stays() -> None:
    prepared = cleaned(mlp((0, put(slice(None), 0)), (1, put(slice(None), 0))))
    assert widths(prepared, "c0", "c2", "c4") == [(1, 6), (1, 1), (5, 1)]


def test_a_head_whose_values_are_not_read_leaves_with_its_queries_and_keys() -> None:
    model = attention()
    b = Builder()
    b.initializers = list(model.graph.initializer)
    last = model.graph.node[-1].input[1]
    edit(b, last, put(slice(8, 16), 0))
    del model.graph.initializer[:]
    model.graph.initializer.extend(b.initializers)
    prepared = cleaned(model)
    assert counts(prepared) == (1, 0, 0)
    assert [tuple(t.dims) for t in prepared.analysis.model.initializers.values()].count(
        (6, 24)
    ) == 3


def test_nothing_changes_where_nothing_is_idle(chain: onnx.ModelProto) -> None:
    with_it, without = (api.prepare(chain, Scope(lossless=on)) for on in (True, False))
    assert with_it.analysis.model.sha256 == without.analysis.model.sha256
    assert not with_it.cleaned


def test_protected_units_stay() -> None:
    rows = [1, 4, 7]
    model = mlp((0, put(rows, 0)), (1, put(rows, 0)))
    assert counts(cleaned(model, protect=("c0",))) == (0, 0, 0)
    assert counts(cleaned(model, only=("c4",))) == (0, 0, 0)


def masked(path: Any) -> None:
    """A file of a chain of which half of the first layer's filters are zero."""
    b = conv_chain(norm=False)
    edit(b, "c0", put(HALF, 0))
    edit(b, "c1", put(HALF, 0))
    onnx.save(finished(b), path)


def test_without_a_budget_the_clean_up_is_all(run: Any, tmp_path: Path) -> None:
    model, out = tmp_path / "m.onnx", tmp_path / "o.onnx"
    masked(model)
    ran = run(model, "-o", out, "--json")
    document = json.loads(ran.out)
    assert ran.code == 0
    assert document["lossless"]["dead"] == 16
    assert document["lossless"]["groups"] == [
        {"name": "c0:0", "why": "dead", "before": 32, "after": 16}
    ]
    assert document["ratio"]["macs"] < 0.6
    assert document["repairs"] == []
    assert document["output_difference"] < NOISE
    assert "lossless: 16 dead units of 1 groups left" in document["notes"]
    assert tuple(onnx.load(out).graph.initializer[0].dims) == (16, 3, 3, 3)


def test_what_left_without_loss_counts_towards_the_budget(run: Any, tmp_path: Path) -> None:
    model, out = tmp_path / "m.onnx", tmp_path / "o.onnx"
    masked(model)
    met = json.loads(run(model, "-o", out, "--json", "--fast", "--target-flops", "0.7").out)
    assert tuple(onnx.load(out).graph.initializer[0].dims) == (16, 3, 3, 3)
    assert met["ratio"]["macs"] < 0.6
    half = json.loads(run(model, "-o", out, "--json", "--round-to", "4", *FAST).out)
    assert 0.3 < half["ratio"]["macs"] <= 0.4


@pytest.mark.parametrize("budget", [(), FAST], ids=str)
def test_a_plan_makes_the_same_model_again(run: Any, tmp_path: Path, budget: Any) -> None:
    model, out, again = (tmp_path / name for name in ("m.onnx", "o.onnx", "a.onnx"))
    masked(model)
    plan = tmp_path / "plan.json"
    assert run(model, *budget, "-o", out, "--plan-out", plan, "--no-measure").code == 0
    assert json.loads(plan.read_text())["options"]["lossless"] is True
    assert run("apply", model, plan, "-o", again, "--no-measure").code == 0
    assert out.read_bytes() == again.read_bytes()


def test_nothing_to_do_gives_the_model_back(run: Any, small: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.onnx"
    ran = run(small, "-o", out, "--json")
    assert ran.code == 0
    assert "lossless: nothing here is dead" in str(json.loads(ran.out)["notes"])
    assert onnx.load(out) == onnx.load(small)
    assert run(small, "-o", out, "--no-lossless").code == 2


# --- masks, branches, recurrence ---


@pytest.mark.parametrize("kind", ["float", "bool"])
def test_masks_in_the_graph_are_multiplied_in(kind: str) -> None:
    b = Builder(8)
    mask = np.ones((8, 12), np.float32)
    mask[[1, 4, 6]] = 0
    mask[:, [2, 3]] = 0
    held = b.constant(mask if kind == "float" else mask.astype(bool))
    held = held if kind == "float" else b.add("Cast", held, to=1)
    weight = b.add("Mul", b.weight(8, 12), held)
    x = b.add("Tanh", b.add("Gemm", "x", b.weight(12, 6), b.weight(12), transB=1))
    x = b.add("Relu", b.add("Gemm", x, weight, transB=1))
    y = b.add("MatMul", x, b.weight(8, 5))
    prepared = cleaned(b.model({"x": [2, 6]}, {y: [2, 5]}))
    assert prepared.cleaned.counts["mask"] == 1
    assert counts(prepared) == (5, 0, 0)
    assert widths(prepared, weight) == [(5, 10)]


def residual(b: Builder, last: float, shift: float) -> str:
    """x + the branch Conv → Relu → Conv → BatchNormalization of scale ``last``, and ``shift``."""
    x = b.add("Relu", b.conv("x", 3, 16))
    inner = b.conv(b.add("Relu", b.conv(x, 16, 16)), 16, 16)
    scale, offset = (np.full(16, v, np.float32) for v in (last, shift))
    mean, variance = b.weight(16), b.constant(np.ones(16, np.float32))
    inner = b.add(
        "BatchNormalization", inner, b.constant(scale), b.constant(offset), mean, variance
    )
    return str(b.add("Relu", b.add("Add", inner, x)))


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_a_branch_of_constants_is_gone(shift: float) -> None:
    b = Builder(9)
    x = residual(b, 0.0, shift)
    y = b.add("MatMul", b.add("Flatten", b.add("GlobalAveragePool", x)), b.weight(16, 5))
    prepared = cleaned(b.model({"x": ["n", 3, 8, 8]}, {y: ["n", 5]}))
    kinds = [node.op_type for node in prepared.analysis.model.nodes]
    assert kinds.count("Conv") == 1
    assert kinds.count("Add") == int(shift > 0)
    assert prepared.cleaned.counts["branch"] == 1


def test_a_branch_at_the_output_is_gone() -> None:
    b = Builder(9)
    y = b.add("Add", "x", b.add("Mul", b.conv("x", 3, 3), b.constant(np.zeros((3, 1, 1), "f"))))
    prepared = cleaned(b.model({"x": ["n", 3, 8, 8]}, {y: ["n", 3, 8, 8]}))
    assert [node.op_type for node in prepared.analysis.model.nodes] == ["Add"]


def test_a_branch_that_gives_the_result_its_shape_stays() -> None:
    """[1, 3] plus zeros of [n, 3]: n rows, however many."""
    b = Builder(9)
    zeros = b.add("Mul", "x", b.constant(np.zeros(3, np.float32)))
    y = b.add("Add", b.add("ReduceMax", "x", axes=[0], keepdims=1), zeros)
    prepared = cleaned(b.model({"x": ["n", 3]}, {y: ["n", 3]}))
    assert not prepared.cleaned


GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def recurrent(kind: str, way: str, **changes: Any) -> onnx.ModelProto:
    """[7, 2, 6] → 8 hidden units → 5; ``changes`` rewrite w, r, b and v, the last weight."""
    b = Builder(11)
    directions, gates = 1 + (way == "bidirectional"), GATES[kind]
    shapes = {"w": (directions, gates * 8, 6), "r": (directions, gates * 8, 8)}
    shapes |= {"b": (directions, gates * 16), "v": (directions * 8, 5)}
    names = {}
    for name, shape in shapes.items():
        value = b.rng.standard_normal(shape).astype(np.float32) / 3
        changes.get(name, lambda v: None)(value)
        names[name] = b.constant(value, name)
    more = {"linear_before_reset": 1} if kind == "GRU" else {}
    y = b.add(kind, "x", "w", "r", "b", hidden_size=8, direction=way, **more)
    y = b.add("Reshape", b.add("Transpose", y, perm=[0, 2, 1, 3]), b.ints(0, 0, -1))
    y = b.add("MatMul", y, "v")
    return b.model({"x": [7, 2, 6]}, {y: [7, 2, 5]})


@pytest.mark.parametrize("way", ["forward", "bidirectional"])
@pytest.mark.parametrize("kind", list(GATES))
def test_hidden_units_of_which_every_gate_is_zero_leave(kind: str, way: str) -> None:
    def rows(value: Any) -> None:
        value.reshape(value.shape[0], -1, 8, *value.shape[2:])[:, :, [0, 5]] = 0

    prepared = cleaned(recurrent(kind, way, w=rows, r=rows, b=rows))
    assert counts(prepared) == (2, 0, 0)
    assert prepared.analysis.model.initializers["r"].dims[2] == 6
    with_bias = cleaned(recurrent(kind, way, w=rows, r=rows))
    assert counts(with_bias) == (0, 0, 0)


@pytest.mark.parametrize("kind", list(GATES))
def test_hidden_units_that_only_read_themselves_leave(kind: str) -> None:
    def columns(value: Any) -> None:
        others = [i for i in range(value.shape[1]) if i % 8 != 3]
        value[:, others, 3] = 0

    prepared = cleaned(recurrent(kind, "forward", r=columns, v=put(3, 0)))
    assert counts(prepared) == (1, 0, 0)
    read = cleaned(recurrent(kind, "forward", r=columns))
    assert counts(read) == (0, 0, 0)


@pytest.mark.parametrize("bias", [False, True])
def test_a_head_whose_values_are_constant_leaves(bias: bool) -> None:
    """Softmax makes means: of zeros zero, and of one bias that bias."""
    b = Builder(12)
    heads, width = 4, 8
    split = []
    for part in "qkv":
        weight, vector = b.weight(6, 32), b.weight(32)
        if part == "v":
            edit(b, weight, put((slice(None), slice(8, 24)), 0))
            edit(b, vector, put(slice(8, 24), np.linspace(0.1, 1, 16) if bias else 0))
        split.append(b.add("Add", b.add("MatMul", "x", weight), vector))
    shaped = [b.add("Reshape", t, b.ints(0, -1, heads, width)) for t in split]
    q, k, v = (b.add("Transpose", t, perm=[0, 2, 1, 3]) for t in shaped)
    scores = b.add("Softmax", b.add("MatMul", q, b.add("Transpose", k, perm=[0, 1, 3, 2])))
    mixed = b.add("Transpose", b.add("MatMul", scores, v), perm=[0, 2, 1, 3])
    y = b.add("MatMul", b.add("Reshape", mixed, b.ints(0, -1, 32)), b.weight(32, 6))
    prepared = cleaned(b.model({"x": [1, "n", 6]}, {y: [1, "n", 6]}))
    assert counts(prepared) == ((0, 2, 0) if bias else (2, 0, 0))


def test_weights_that_are_transposed_in_the_graph_take_constants_over() -> None:
    """As exporters leave a linear layer without constant folding: MatMul(x, Transpose(w)) + b."""
    b = Builder(13)
    x = "x"
    for inner, outer in ((6, 12), (12, 5)):
        weight = b.add("Transpose", b.weight(outer, inner), perm=[1, 0])
        x = b.add("Add", b.add("MatMul", x, weight), b.weight(outer))
        x = b.add("Mul", x, b.add("Sigmoid", x)) if outer == 12 else x
    edit(b, "c0", put([2, 3, 9], 0))
    prepared = cleaned(b.model({"x": ["n", 6]}, {x: ["n", 5]}))
    assert counts(prepared) == (0, 3, 0)
    assert widths(prepared, "c0", "c1") == [(9, 6), (9,)]


def test_batch_normalisation_is_folded_where_something_left(run: Any, tmp_path: Path) -> None:
    b = conv_chain(norm=True)
    edit(b, "c4", put(HALF, 0))
    edit(b, "c3", put(HALF, -0.5))
    model, out = tmp_path / "m.onnx", tmp_path / "o.onnx"
    onnx.save(finished(b), model)
    document = json.loads(run(model, "-o", out, "--json", "--no-measure").out)
    assert "BatchNormalization" not in {node.op_type for node in onnx.load(out).graph.node}
    assert "lossless: 1 BatchNormalizations folded" in document["notes"]
    stored = sum(np.prod(t.dims) for t in onnx.load(out).graph.initializer)
    assert document["after"]["params"] == stored


def test_branches_are_gone_with_blocks_alone_too() -> None:
    b = Builder(9)
    x = residual(b, 0.0, 0.0)
    y = b.add("MatMul", b.add("Flatten", b.add("GlobalAveragePool", x)), b.weight(16, 5))
    model = b.model({"x": ["n", 3, 8, 8]}, {y: ["n", 5]})
    assert cleaned(model, units=("blocks",)).cleaned.counts["branch"] == 1


@pytest.mark.parametrize("rows", [True, False])
def test_of_quantised_weights_leaves_what_is_zero_and_what_nobody_reads(rows: bool) -> None:
    b = Builder(14)
    integers = [b.rng.integers(-99, 99, size).astype(np.int8) for size in ((6, 16), (16, 5))]
    integers[0 if rows else 1][(slice(None), [1, 4, 9]) if rows else [1, 4, 9]] = 0
    x = "x"
    for value in integers:
        weight = b.add("DequantizeLinear", b.constant(value), b.constant(np.float32(0.01)))
        x = b.add("MatMul", x, weight)
        if len(value) == 6:
            ends = b.constant(np.float32(0.05)), b.constant(np.uint8(0))
            x = b.add("DequantizeLinear", b.add("QuantizeLinear", b.add("Relu", x), *ends), *ends)
    prepared = cleaned(b.model({"x": [2, 6]}, {x: [2, 5]}))
    assert counts(prepared) == (0 if rows else 3, 0, 0)  # a quantiser says nothing of its input


def test_inspect_and_compare(run: Any, tmp_path: Path) -> None:
    model, out = tmp_path / "m.onnx", tmp_path / "o.onnx"
    masked(model)
    shown = json.loads(run("inspect", model, "--json").out)
    assert shown["lossless"]["dead"] == 16
    assert shown["groups"][0]["units"] == 16
    assert "lossless: 16 dead units" in run("inspect", model).out
    assert json.loads(run("inspect", model, "--json", "--no-lossless").out)["lossless"] is None
    assert run(model, "-o", out).code == 0
    compared = json.loads(run("compare", model, out, "--json").out)
    assert compared["b"]["macs"] < 0.6 * compared["a"]["macs"]


@pytest.mark.parametrize("act", ["Gelu", "FastGelu", "QuickGelu"])
def test_constants_behind_fused_activations(act: str) -> None:
    b = Builder(15)
    x = b.add("Gemm", "x", b.weight(12, 6), b.weight(12), transB=1)
    x = b.add(act, x, domain="com.microsoft")
    y = b.add("Gemm", x, b.weight(5, 12), b.weight(5), transB=1)
    edit(b, "c0", put([2, 3], 0))
    nodes = [node for node in b.nodes if node.domain]
    assert len(nodes) == 1
    model = b.model({"x": [2, 6]}, {y: [2, 5]})
    assert counts(cleaned(model)) == (0, 2, 0)


@pytest.mark.parametrize("bias", [0.0, 0.5])
def test_a_head_of_fused_attention_whose_values_are_constant(bias: float) -> None:
    b = Builder(16, opset=23)
    split = []
    for part in "qkv":
        weight, vector = b.weight(6, 32), b.weight(32)
        if part == "v":
            edit(b, weight, put((slice(None), slice(8, 24)), 0))
            edit(b, vector, put(slice(8, 24), bias))
        split.append(b.add("Add", b.add("MatMul", "x", weight), vector))
    shaped = [b.add("Reshape", t, b.ints(0, -1, 4, 8)) for t in split]
    heads = [b.add("Transpose", t, perm=[0, 2, 1, 3]) for t in shaped]
    mixed = b.add("Transpose", b.add("Attention", *heads), perm=[0, 2, 1, 3])
    y = b.add("MatMul", b.add("Reshape", mixed, b.ints(0, -1, 32)), b.weight(32, 6))
    prepared = cleaned(b.model({"x": [1, "n", 6]}, {y: [1, "n", 6]}, ir_version=11))
    assert counts(prepared) == ((0, 2, 0) if bias else (2, 0, 0))
