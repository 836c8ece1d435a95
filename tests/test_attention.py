"""Fused attention and rotary embeddings against the oracle of law 3, and which units they have."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from graphs import Builder
from onnx import helper

from graphprune.api import prepare, prune
from graphprune.check import LawBrokenError, check_rule
from graphprune.coupling import Coupling, couple
from graphprune.explain import explain, parse_place
from graphprune.model import Array, Model
from graphprune.rules import BUILTIN, relate
from graphprune.rules.op import Op
from graphprune.runtime import Feeds, opened
from graphprune.shapes import infer
from graphprune.storage import load
from tools.contrib_cases import ATTENTION, IDS, ROTARY, model

ONNX = {
    "ai.onnx Attention grouped": (
        "float[2,3,32] q, float[2,5,16] k, float[2,5,24] v", "float[2,3,48] y",
        "y = Attention<q_num_heads=4, kv_num_heads=2>(q, k, v)"),
    "ai.onnx Attention of one KV head": (
        "float[2,3,32] q, float[2,5,8] k, float[2,5,12] v", "float[2,3,48] y",
        "y = Attention<q_num_heads=4, kv_num_heads=1>(q, k, v)"),
    "ai.onnx Attention of four axes": (
        "float[2,4,3,8] q, float[2,2,5,8] k, float[2,2,5,12] v, float[4,3,5] m",
        "float[2,4,3,12] y", "y = Attention(q, k, v, m)"),
    "ai.onnx Attention past": (
        "float[2,4,3,8] q, float[2,4,3,8] k, float[2,4,3,8] v, float[2,4,5,8] a, float[2,4,5,8] b",
        "float[2,4,3,8] y, float[2,4,8,8] c, float[2,4,8,8] d",
        "y, c, d = Attention<is_causal=1>(q, k, v, , a, b)"),
    "ai.onnx RotaryEmbedding": ("float[2,3,16] x, float[5,2] c, float[5,2] d", "float[2,3,16] y",
                IDS + "y = RotaryEmbedding<num_heads=4>(x, c, d, i)"),
    "ai.onnx RotaryEmbedding interleaved in part": (
        "float[2,1,3,8] x, float[5,3] c, float[5,3] d", "float[2,1,3,8] y",
        IDS + "y = RotaryEmbedding<interleaved=1, rotary_embedding_dim=6>(x, c, d, i)"),
}  # fmt: skip
CASES = {**ATTENTION, **ROTARY, **ONNX}

# How many slots or runs of slots of y may leave: heads, and where heads are an axis of their own
# also the positions in a value of every head, or pairs of positions.
FREE = {
    "MultiHeadAttention": 4,
    "MultiHeadAttention bias": 4,
    "MultiHeadAttention one bias for all heads": 4,
    "MultiHeadAttention padding mask": 4,
    "MultiHeadAttention of a cache": 4,
    "MultiHeadAttention past": 4,
    "Attention": 4,
    "Attention sizes": 4,
    "Attention past": 4,
    "GroupQueryAttention": 2,
    "GroupQueryAttention packed": 2,
    "GroupQueryAttention of one KV head": 4,
    "GroupQueryAttention rotary": 2,
    "GroupQueryAttention past, sinks": 2,
    "RotaryEmbedding": 4,
    "RotaryEmbedding four axes": 7,
    "RotaryEmbedding in part": 3,
    "RotaryEmbedding one head": 4,
    "ai.onnx Attention grouped": 2,
    "ai.onnx Attention of one KV head": 4,
    "ai.onnx Attention of four axes": 14,
    "ai.onnx Attention past": 12,
    "ai.onnx RotaryEmbedding": 4,
    "ai.onnx RotaryEmbedding interleaved in part": 6,
}


def coupling_of(source: onnx.ModelProto) -> Coupling:
    """The coupling with no pins on inputs and outputs."""
    loaded = load(source)
    shapes = infer(loaded)
    return couple(loaded, shapes, relate(loaded, shapes, pin_interface=False))


def free_in(coupling: Coupling, tensor: str) -> int:
    """How many components of a tensor's slots may leave."""
    slots = coupling.relations.slots.tensors[tensor]
    found = np.unique(coupling.labels[np.concatenate([axis.slots for axis in slots])])
    return sum(int(component) not in coupling.reason for component in found)


@pytest.mark.parametrize("name", CASES)
def test_law_holds(name: str) -> None:
    assert check_rule(model(*CASES[name])).passed


@pytest.mark.parametrize("name", CASES)
def test_heads_are_units(name: str) -> None:
    assert free_in(coupling_of(model(*CASES[name])), "y") == FREE[name]


@pytest.mark.parametrize("name", [name for name in CASES if "Group" not in name])
def test_positions_in_heads_leave(name: str) -> None:
    """With ``head-dims`` for ``heads``; where the scale is the default's, it is written down."""
    assert check_rule(model(*CASES[name]), units=("channels", "head-dims")).passed


def test_group_query_attention_has_one_head_size() -> None:
    source = model(*CASES["GroupQueryAttention"])
    checked = check_rule(source, units=("channels", "head-dims"))
    assert "share the head size" in checked.pinned


@pytest.mark.parametrize("kind", ["queries, keys and values", "keys and values"])
def test_packed_heads(kind: str) -> None:
    """Only CUDA runs the packed forms; the oracle takes them apart first."""
    if kind == "keys and values":
        inputs, call = "float[2,3,32] q, float[2,5,4,2,8] k", "(q, k)"
    else:
        inputs, call = "float[2,3,4,3,8] q", "(q)"
    source = model(inputs, "float[2,3,32] y", f"y = M.MultiHeadAttention<num_heads=4>{call}")
    assert free_in(coupling_of(source), "y") == 4
    assert check_rule(source, open_model=_taken_apart).passed


def _taken_apart(packed: Model) -> Callable[[Feeds], list[Array]]:
    """The packed tensor split along its fourth axis, each piece [batch, length, width]."""
    nodes = []
    for node in packed.nodes:
        if node.op_type != "MultiHeadAttention":
            nodes.append(node)
            continue
        pieces = 3 if len(node.input) == 1 else 2
        names = [f"piece_{i}" for i in range(pieces)]
        nodes.append(helper.make_node("Split", [node.input[-1]], names, axis=3, num_outputs=pieces))
        flat = [f"{name}_flat" for name in names]
        for name, output in zip(names, flat, strict=True):
            nodes.append(helper.make_node("Reshape", [name, "width"], [output]))
        new = helper.make_node("MultiHeadAttention", [], node.output, domain="com.microsoft")
        new.attribute.extend(node.attribute)
        new.input.extend([*node.input[:-1], *flat])
        nodes.append(new)
    width = onnx.numpy_helper.from_array(np.array([0, 0, -1], np.int64), "width")
    return opened(packed.with_graph(nodes, [*packed.initializers.values(), width]))


REFUSED = {
    "heads that do not divide": (
        "float[2,3,16] q, float[2,3,16] k, float[2,3,16] v", "float[2,3,16] y",
        "y = M.MultiHeadAttention<num_heads=3>(q, k, v)"),
    "sizes of queries and keys differ": (
        "float[2,3,6] x, float[6,48] w, float[48] b", "float[2,3,16] y",
        "y = M.Attention<num_heads=4, qkv_hidden_sizes=[8,24,16]>(x, w, b)"),
    "angles that do not fit": (
        "float[2,3,16] x, float[5,3] c, float[5,3] d", "float[2,3,16] y",
        IDS + "y = RotaryEmbedding<num_heads=2>(x, c, d, i)"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_reason(name: str) -> None:
    source = model(*REFUSED[name])
    coupling = coupling_of(source)
    assert free_in(coupling, "y") == 0
    assert any(
        "divide" in p.reason or "sizes" in p.reason or "angles" in p.reason for p in coupling.pins
    )


@pytest.mark.parametrize("forgotten", ["num_heads", "kv_num_heads"])
def test_a_stale_count_is_caught(forgotten: str) -> None:
    def careless(op: Op) -> None:
        BUILTIN["com.microsoft", "GroupQueryAttention"](op)
        counts = op.relations.counts
        counts[:] = [count for count in counts if count.attr != forgotten]

    source = model(*CASES["GroupQueryAttention"])
    with pytest.raises(LawBrokenError):
        check_rule(source, rules={**BUILTIN, ("com.microsoft", "GroupQueryAttention"): careless})


def test_a_cache_in_the_interface_holds_kv_heads() -> None:
    """Past keys and values are graph inputs: query heads leave, the same of every KV head."""
    b = Builder(opset=21)
    q, k, v = (b.add("MatMul", "x", b.weight(12, width)) for width in (64, 16, 16))
    lengths = b.constant(np.int32([4])), b.constant(np.int32(5))
    inputs = (q, k, v, "past_k", "past_v", *lengths)
    joined, new_k, new_v = b.add(
        "GroupQueryAttention", *inputs, outputs=3, domain="com.microsoft",
        num_heads=8, kv_num_heads=2,
    )  # fmt: skip
    y = b.add("MatMul", joined, b.weight(64, 12))
    past, present = [1, 2, 4, 8], [1, 2, 5, 8]
    source = b.model(
        {"x": [1, 1, 12], "past_k": past, "past_v": past},
        {y: [1, 1, 12], new_k: present, new_v: present},
    )
    analysis = prepare(source).analysis
    assert [len(group) for group in analysis.coupling.groups] == [4]
    assert "graph input 'past_k'" in explain(analysis, parse_place(analysis, "c1:1"))
    result = prune(source, flops=0.7, round_to=1, measure=False)
    assert result.verdict.passed
    attention = next(n for n in result.model.graph.node if n.op_type == "GroupQueryAttention")
    numbers = {a.name: a.i for a in attention.attribute if a.name.endswith("heads")}
    assert numbers["kv_num_heads"] == 2
    assert numbers["num_heads"] in (2, 4, 6)
