"""Positions in values of every head in order of size, whatever form the attention has."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from attention_forms import FORMS, HEADS, SIZE, WIDTH, Net, net
from grouped_forms import GROUPED

from graphprune.analysis import Scope
from graphprune.api import prune
from graphprune.model import Model
from graphprune.pipeline import Context, PassResult, Pipeline
from graphprune.plugins import collect, installed
from graphprune.runtime import random_inputs, run_session, session
from graphprune.shapes import infer
from graphprune.storage import load

INSIDE = ("channels", "head-dims")
# Queries and keys share one order, values have their own; in a rotary pair nothing moves, and
# where the three are one axis they have one order.
ROTATED = ("rotate_half", "rotate_pairs", "rotate_strided")
ONE_ORDER = ("stacked_gather", "stacked_slice", "stacked_split", "heads_three_gather")
LEFT_ALONE = ("heads_then_three", "convolved")
LEFT_ALONE += ("repeat_tiled_outside", "repeat_concatenated", "repeat_by_gather")
MOVED = dict.fromkeys((*ROTATED, *ONE_ORDER, "normalised_queries", "windows"), 1)
MOVED |= dict.fromkeys(LEFT_ALONE, 0)


def aligned(source: onnx.ModelProto) -> PassResult:
    context = Context(scope=Scope(units=INSIDE))
    return Pipeline(collect(installed()).prepare).run(load(source), context)


def difference(source: onnx.ModelProto, result: Model) -> float:
    model = load(source)
    feeds = random_inputs(model, infer(model))
    expected, actual = (run_session(session(m, 1), feeds)[0] for m in (model, result))
    return float(np.abs(expected - actual).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", [*FORMS, *GROUPED])
def test_the_function_stays(name: str) -> None:
    source = net({**FORMS, **GROUPED}[name])
    result = aligned(source)
    moved = [change for change in result.changes if change.what == "positions"]
    assert len(moved) == MOVED.get(name, 2)
    assert difference(source, result.model) < 1e-5


def fused(op: str, domain: str, packed: bool = False, kv: int = HEADS) -> onnx.ModelProto:
    """Attention in one operator, on products with a bias or on what it projects itself."""
    b = Net(opset=23)
    counts = {"num_heads": HEADS} if domain else {"q_num_heads": HEADS, "kv_num_heads": kv}
    inner = HEADS * SIZE
    if packed:
        made = ["x", b.weight(WIDTH, 3 * inner), b.weight(3 * inner)]
    else:
        made = [b.linear("x", WIDTH, n * SIZE) for n in (HEADS, kv, kv)]
    h = b.add(op, *made, domain=domain, **counts)
    y = b.linear(h, inner, WIDTH)
    return b.model({"x": ["n", 5, WIDTH]}, {y: ["n", 5, WIDTH]}, ir_version=10)


FUSED = {
    "MultiHeadAttention": ("MultiHeadAttention", "com.microsoft"),
    "Attention of com.microsoft": ("Attention", "com.microsoft", True),
    "Attention": ("Attention", ""),
    "Attention of few KV heads": ("Attention", "", False, 2),
}


@pytest.mark.parametrize("name", FUSED)
def test_fused_attention_too(name: str) -> None:
    """And what then leaves stood at other positions in each head."""
    source = fused(*FUSED[name])
    result = aligned(source)
    assert sum(change.what == "positions" for change in result.changes) == 2
    assert difference(source, result.model) < 1e-5
    done = prune(
        source, flops=0.8, units=INSIDE, round_to=1, min_channels=1, fast=True, measure=False
    )
    assert done.verdict.passed


def test_each_head_keeps_its_largest() -> None:
    """One value of each head is tiny, at another place in each; that one leaves."""
    b = Net()
    q, k = (b.split_heads(b.linear("x", WIDTH, HEADS * SIZE)) for _ in "qk")
    values = np.ones((WIDTH, HEADS, SIZE), np.float32)
    values += b.rng.random(values.shape).astype(np.float32)
    small = np.arange(HEADS) % SIZE
    values[:, np.arange(HEADS), small] *= 1e-3
    v = b.split_heads(b.add("MatMul", "x", b.constant(values.reshape(WIDTH, -1), "values")))
    mixed = b.add("Transpose", b.mix(b.keys(q, k), v), perm=[0, 2, 1, 3])
    joined = b.add("Reshape", mixed, b.ints(0, 0, HEADS * SIZE))
    out = np.ones((HEADS, SIZE, WIDTH), np.float32)
    out[np.arange(HEADS), small] *= 1e-3
    y = b.add("MatMul", joined, b.constant(out.reshape(-1, WIDTH), "out"))
    source = b.model({"x": ["n", 5, WIDTH]}, {y: ["n", 5, WIDTH]})
    result = prune(
        source, flops=0.96, units=("head-dims",), only=("values",), round_to=1, fast=True,
        measure=False, min_channels=1,
    )  # fmt: skip
    kept = load(result.model).array("values")
    assert kept.shape == (WIDTH, HEADS * (SIZE - 1))
    assert kept.min() > 0.5
