"""Fused operators of com.microsoft: the oracle of law 3 on a small model of ONNX text each."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from graphs import Builder
from onnx import TensorProto, helper, numpy_helper

from graphprune.api import prepare, prune
from graphprune.check import check_rule
from graphprune.conformance import run_text
from graphprune.coupling import couple
from graphprune.lookups import index_bounds
from graphprune.rules import relate
from graphprune.shapes import infer
from graphprune.storage import load
from tools.contrib_cases import OTHERS, PINNED, model


@pytest.mark.parametrize("name", OTHERS)
def test_law_holds(name: str) -> None:
    assert check_rule(model(*OTHERS[name])).passed


@pytest.mark.parametrize("name", PINNED)
def test_what_may_not_leave_or_has_no_kernel(name: str) -> None:
    """CUDA's own operators have no shape here, so nothing at them may leave."""
    result = run_text(name, model(*PINNED[name]))
    assert result.state == "pinned"
    assert result.detail


def test_transposed_batches_are_refused() -> None:
    body = "y = M.FusedMatMul<transBatchA=1>(a, b)"
    checked = check_rule(model("float[3,2,6] a, float[2,6,4] b", "float[2,3,4] y", body))
    assert "transposed batch" in checked.pinned


def foreign(op: str, inputs: dict[str, tuple[int, list[int]]], constants: dict[str, np.ndarray],
            outputs: list[str], **attributes: object) -> onnx.ModelProto:  # fmt: skip
    """One node of com.microsoft, its inputs in order: those to feed, then the constants."""
    names = [*inputs, *constants]
    node = helper.make_node(op, names, outputs, domain="com.microsoft", **attributes)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info(name, *kind) for name, kind in inputs.items()],
        [onnx.ValueInfoProto(name=name) for name in outputs if name],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    for output in graph.output:
        output.type.tensor_type.elem_type = TensorProto.FLOAT
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def test_embeddings_are_normalised_over_what_could_leave() -> None:
    rng = np.random.default_rng(0)
    tables = {
        name: rng.standard_normal(shape).astype(np.float32)
        for name, shape in {"word": (9, 6), "place": (5, 6), "part": (2, 6)}.items()
    }
    ends = {name: np.ones(6, np.float32) for name in ("gamma", "beta")}
    ids = (TensorProto.INT32, [2, 3])
    source = foreign("EmbedLayerNormalization", {"i": ids, "s": ids}, tables | ends, ["y", "", "z"])
    analysis = prepare(source).analysis
    assert analysis.shapes.shape["z"] == (2, 3, 6)
    assert index_bounds(analysis.model, analysis.shapes, "i") == [9]
    assert len(analysis.relations.shifts) == 1  # the width
    assert not check_rule(source).passed


def quantised(
    bits: int = 4, flat: bool = False, zero: str = "", bias: bool = False, k: int = 128
) -> onnx.ModelProto:
    """MatMulNBits of random blocks of 32, six outputs."""
    rng, block, n = np.random.default_rng(0), 32, 6
    blocks = -(-k // block)
    scales = (rng.random((n, blocks)) * 0.01 + 0.01).astype(np.float32)
    constants = {"b": rng.integers(0, 256, (n, blocks, block * bits // 8)).astype(np.uint8)}
    constants["s"] = scales.reshape(-1) if flat else scales
    if zero == "packed":
        points = rng.integers(0, 256, (n, -(-blocks * bits // 8))).astype(np.uint8)
        constants["z"] = points.reshape(-1) if flat else points
    elif zero:
        constants["z"] = rng.random((n, blocks)).astype(np.float32)
    if bias:
        constants["c"] = rng.random(n).astype(np.float32)
    source = foreign(
        "MatMulNBits",
        {"x": (TensorProto.FLOAT, [2, 3, k])},
        constants,
        ["y"],
        **{"K": k, "N": n, "bits": bits, "block_size": block},
    )
    if bias:  # the sixth input
        inputs = ["x", "b", "s", "z" if zero else "", "", "c"]
        source.graph.node[0].ClearField("input")
        source.graph.node[0].input.extend(inputs)
    return source


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"bits": 8, "zero": "packed"},
        {"flat": True, "zero": "packed"},
        {"zero": "packed"},
        {"zero": "float", "bias": True},
        {"k": 112},
        {"bits": 2, "zero": "packed"},
    ],
    ids=str,
)
def test_blocks_of_bits(given: dict[str, object]) -> None:
    assert check_rule(quantised(**given)).passed  # type: ignore[arg-type]


@pytest.mark.parametrize(("given", "free"), [({}, 4), ({"zero": "packed"}, 0), ({"k": 112}, 0)])
def test_inputs_leave_by_whole_blocks(given: dict[str, object], free: int) -> None:
    """Unless their zero points share bytes, or the last block is not full."""
    loaded = load(quantised(**given))  # type: ignore[arg-type]
    shapes = infer(loaded)
    relations = relate(loaded, shapes, pin_interface=False)
    coupling = couple(loaded, shapes, relations)
    units = coupling.unit_of(relations.slots.tensors["x"][2].slots)
    assert len(np.unique(units[units >= 0])) == free
    assert len(np.unique(coupling.unit_of(relations.slots.tensors["y"][2].slots))) == 6


def test_shapes_that_only_onnx_runtime_infers() -> None:
    """An unknown operator is no hole in the shapes; one without a kernel is, and is reported."""
    known = load(model("float[2,6] x", "float[2,6] z", "y = M.QuickGelu(x) z = Relu(y)"))
    assert infer(known).shape["y"] == (2, 6)
    unknown = load(model("float[2,6] x", "float[2,6] z", "y = M.NoSuch(x) z = Relu(y)"))
    assert infer(unknown).shape["y"] is None


def test_a_fused_feed_forward_block_is_pruned() -> None:
    """FusedMatMul, BiasGelu, MatMul, SkipLayerNormalization: the hidden width leaves."""
    b = Builder(opset=21)
    h = b.add("FusedMatMul", "x", b.weight(32, 8), transB=1, domain="com.microsoft")
    h = b.add("BiasGelu", h, b.weight(32), domain="com.microsoft")
    h = b.add("MatMul", h, b.weight(32, 8))
    ends = b.weight(8), b.weight(8), b.weight(8)
    y = b.add("SkipLayerNormalization", h, "x", *ends, domain="com.microsoft")
    result = prune(b.model({"x": ["n", 5, 8]}, {y: ["n", 5, 8]}), flops=0.5, measure=False)
    assert result.verdict.passed
    assert "c0" in str(result.plan)
