"""Einsum with weights, as JAX writes products, becomes MatMul: outputs stay, and it is repaired."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import Builder

from graphprune.api import prepare, prune
from graphprune.linear import linears
from graphprune.runtime import opened, random_inputs

SIZES = {"b": 2, "t": 3, "d": 6, "h": 4, "e": 5, "k": 7, "i": 6}
# equation with the weight as ``w``, and what it becomes; nothing where it stays.
EQUATIONS = {
    "btd,w:dk->btk": ["MatMul"],
    "w:dk,btd->btk": ["MatMul"],
    "btd,w:kd->btk": ["MatMul"],
    "bdt,w:dk->bkt": ["Transpose", "MatMul", "Transpose"],
    "btd,w:dhe->bthe": ["MatMul", "Reshape"],
    "btd,w:hde->bhte": ["MatMul", "Reshape", "Transpose"],
    "bthe,w:hed->btd": ["Reshape", "MatMul"],
    "bhte,w:hed->btd": ["Transpose", "Reshape", "MatMul"],
    "bthe,w:ehdk->btkd": ["Reshape", "MatMul", "Reshape"],
    "bth,w:hde->bthe": [],
    "bte,w:edk->bted": [],
    "bii,w:ik->bk": [],
    "btd,w:tdk->bk": ["Reshape", "MatMul"],
    "btd,w:dk->bk": [],
    "...d,w:dk->...k": ["MatMul"],
    "...d,w:kd->...k": [],
    "d...,w:dk->k...": [],
}


def model_of(equation: str) -> onnx.ModelProto:
    sources, target = equation.split("->")
    b = Builder()
    names: list[str] = []
    shape: list[int] = []
    for term in sources.split(","):
        sizes = [SIZES[c] for c in term.removeprefix("w:").replace("...", "bt")]
        shape = shape if term.startswith("w:") else sizes
        names.append(b.weight(*sizes) if term.startswith("w:") else "x")
    y = b.add("Einsum", *names, equation=equation.replace("w:", ""))
    return b.model(
        {"x": shape},
        {y: [SIZES[c] for c in target.replace("...", "bt")]},
    )


@pytest.mark.parametrize("equation", EQUATIONS)
def test_same_outputs(equation: str) -> None:
    prepared = prepare(model_of(equation))
    normal = prepared.analysis.model
    assert [n.op_type for n in normal.nodes] == (EQUATIONS[equation] or ["Einsum"])
    feeds = random_inputs(prepared.original, prepared.analysis.shapes)
    (wanted,), (got,) = opened(prepared.original)(feeds), opened(normal)(feeds)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
    assert len(linears(normal)) == bool(EQUATIONS[equation])


def test_a_batch_of_none() -> None:
    b = Builder()
    h = b.add("Einsum", "x", b.weight(8, 4, 5), equation="btd,dhe->bthe")
    y = b.add("Einsum", h, b.weight(4, 5, 8), equation="bthe,hed->btd")
    model = prepare(b.model({"x": ["n", 3, 8]}, {y: ["n", 3, 8]})).analysis.model
    (got,) = opened(model)({"x": np.zeros((0, 3, 8), np.float32)})
    assert got.shape == (0, 3, 8)


def test_what_is_broadcast_stays() -> None:
    b = Builder()
    y = b.add("Einsum", "x", b.weight(1, 5), equation="btd,dk->btk")
    model = prepare(b.model({"x": [2, 3, 8]}, {y: [2, 3, 5]})).analysis.model
    (got,) = opened(model)({"x": np.ones((2, 3, 8), np.float32)})
    assert got.shape == (2, 3, 5)


def attention() -> onnx.ModelProto:
    """Projections to and from [heads, size], then a feed-forward layer, without a bias anywhere."""
    b = Builder()
    q, k, v = (
        b.add("Einsum", "x", b.weight(16, 4, 8), equation=f"btd,dhe->b{out}")
        for out in ("the", "the", "hte")
    )
    scores = b.add("Softmax", b.add("Einsum", q, k, equation="bqhe,bkhe->bhqk"), axis=-1)
    z = b.add("Einsum", scores, v, equation="bhqk,bhke->bqhe")
    x = b.add("Add", "x", b.add("Einsum", z, b.weight(4, 8, 16), equation="bqhe,hed->bqd"))
    h = b.add("Relu", b.add("Einsum", x, b.weight(16, 64), equation="abc,cd->abd"))
    y = b.add("Einsum", h, b.weight(64, 5), equation="abc,cd->abd")
    return b.model({"x": ["n", 6, 16]}, {y: ["n", 6, 5]})


def test_attention_is_pruned_and_repaired() -> None:
    options: dict[str, Any] = {"round_to": 1, "min_channels": 1, "samples": 32, "rounds": 3}
    result = prune(attention(), flops=0.6, cache=False, **options)
    assert result.verdict.passed
    assert len(result.repairs) == 3  # what reads z, the sum, and h


def test_a_weight_that_others_read_stays_as_it_is() -> None:
    b = Builder()
    w = b.weight(4, 2, 3)
    h = b.add("Einsum", "x", w, equation="bd,dhe->bhe")
    y = b.add("Einsum", h, w, equation="bhe,dhe->bd")
    prepared = prepare(b.model({"x": [2, 4]}, {y: [2, 4]}))
    assert [n.op_type for n in prepared.analysis.model.nodes] == ["Einsum", "Einsum"]


def test_masks_follow_the_weights(tmp_path: Path) -> None:
    source = attention()
    inner = next(i.name for i in source.graph.initializer if list(i.dims) == [4, 8, 16])
    mask = np.ones((4, 8, 16))
    mask[[0, 2]] = 0  # two heads
    np.savez(tmp_path / "m.npz", **{inner: mask})
    onnx.save(source, tmp_path / "m.onnx")
    result = prune(tmp_path / "m.onnx", masks=tmp_path / "m.npz", resolve="union", measure=False)
    assert result.verdict.passed
    assert sorted(u for g in result.plan.groups for u in g.removed) == [0, 2]
