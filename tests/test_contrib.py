"""Fused operators of com.microsoft: the oracle of law 3 on a small model of ONNX text each."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from graphs import Builder
from onnx import TensorProto, helper, numpy_helper, parser

from graphprune.api import prepare, prune
from graphprune.check import check_rule
from graphprune.coupling import couple
from graphprune.rules import relate
from graphprune.runtime import index_bounds
from graphprune.shapes import infer
from graphprune.storage import load

HEAD = '<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]> g ({}) => ({})'

# inputs, outputs, body; M. stands for com.microsoft.
MODELS = {
    "Gelu": ("float[2,6] x", "float[2,6] y", "y = M.Gelu(x)"),
    "QuickGelu": ("float[2,6] x", "float[2,6] y", "y = M.QuickGelu<alpha=1.7>(x)"),
    "FastGelu": ("float[2,6] x", "float[2,6] y", "y = M.FastGelu(x)"),
    "FastGelu bias": ("float[2,6] x, float[6] b", "float[2,6] y", "y = M.FastGelu(x, b)"),
    "BiasGelu": ("float[2,6] x, float[6] b", "float[2,6] y", "y = M.BiasGelu(x, b)"),
    "SkipLayerNormalization": (
        "float[2,3,6] x, float[2,3,6] s, float[6] g, float[6] b, float[6] c",
        "float[2,3,6] y, float[2,3,6] z", "y, , , z = M.SkipLayerNormalization(x, s, g, b, c)"),
    "SkipLayerNormalization broadcast": (
        "float[2,3,6] x, float[1,3,6] s, float[6] g", "float[2,3,6] y",
        "y = M.SkipLayerNormalization(x, s, g)"),
    "SkipSimplifiedLayerNormalization": (
        "float[2,3,6] x, float[2,3,6] s, float[6] g",
        "float[2,3,6] y, float[2,3,6] z", "y, , , z = M.SkipSimplifiedLayerNormalization(x, s, g)"),
    "SimplifiedLayerNormalization": (
        "float[2,3,6] x, float[6] g", "float[2,3,6] y", "y = SimplifiedLayerNormalization(x, g)"),
    "FusedConv": (
        "float[1,6,4,4] x, float[4,6,3,3] w, float[4] b, float[1,4,2,2] z", "float[1,4,2,2] y",
        'y = M.FusedConv<activation="Relu">(x, w, b, z)'),
    "FusedConv grouped": (
        "float[1,6,4,4] x, float[6,1,3,3] w, float[6] b", "float[1,6,2,2] y",
        'y = M.FusedConv<activation="Relu", group=6>(x, w, b)'),
    "FusedGemm": (
        "float[3,6] a, float[4,6] b, float[4] c", "float[3,4] y",
        'y = M.FusedGemm<transB=1, activation="Relu">(a, b, c)'),
    "FusedMatMul": (
        "float[2,3,6] a, float[4,6] b", "float[2,3,4] y",
        "y = M.FusedMatMul<transB=1, alpha=0.5>(a, b)"),
    "FusedMatMul both": (
        "float[2,6,3] a, float[2,4,6] b", "float[2,3,4] y",
        "y = M.FusedMatMul<transA=1, transB=1>(a, b)"),
}  # fmt: skip


def model(inputs: str, outputs: str, body: str) -> onnx.ModelProto:
    source = HEAD.format(inputs, outputs) + "{" + body.replace("M.", "com.microsoft.") + "}"
    return parser.parse_model(source)


@pytest.mark.parametrize("name", MODELS)
def test_law_holds(name: str) -> None:
    assert check_rule(model(*MODELS[name])).passed


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
