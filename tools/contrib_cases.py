"""One-operator models of com.microsoft as ONNX text, for tests and for the table of operators.

Each name starts with the operator's. An entry is inputs, outputs and body, where M. stands for
com.microsoft and ``s``, ``t`` and ``i`` are lengths and positions.
"""

from __future__ import annotations

import onnx
from onnx import parser

HEAD = '<ir_version: 10, opset_import: ["": 23, "com.microsoft": 1]> g ({}) => ({})'
IDS = "i = Constant<value = int64[2,3] {0,1,2,2,1,0}>() "
LENGTHS = "s = Constant<value = int32[2] {2,2}>() t = Constant<value = int32 {3}>() "
LONGER = "s = Constant<value = int32[2] {7,7}>() t = Constant<value = int32 {8}>() "

ATTENTION = {
    "MultiHeadAttention": (
        "float[2,3,16] q, float[2,4,16] k, float[2,4,24] v", "float[2,3,24] y",
        "y = M.MultiHeadAttention<num_heads=4>(q, k, v)"),
    "MultiHeadAttention bias": (
        "float[2,3,16] q, float[2,3,16] k, float[2,3,24] v, float[56] b, float[1,4,3,3] a",
        "float[2,3,24] y", "y = M.MultiHeadAttention<num_heads=4, scale=0.3>(q, k, v, b, , a)"),
    "MultiHeadAttention one bias for all heads": (
        "float[2,3,16] q, float[2,3,16] k, float[2,3,16] v, float[1,1,3,3] a", "float[2,3,16] y",
        "y = M.MultiHeadAttention<num_heads=4>(q, k, v, , , a)"),
    "MultiHeadAttention padding mask": (
        "float[2,3,16] q, float[2,3,16] k, float[2,3,16] v", "float[2,3,16] y",
        "m = Constant<value = int32[2,3] {1,1,0,1,1,1}>() "
        "y = M.MultiHeadAttention<num_heads=4>(q, k, v, , m)"),
    "MultiHeadAttention of a cache": (
        "float[2,3,32] q, float[2,4,5,8] k, float[2,4,5,8] v", "float[2,3,32] y",
        "y = M.MultiHeadAttention<num_heads=4>(q, k, v)"),
    "MultiHeadAttention past": (
        "float[2,3,32] q, float[2,3,32] k, float[2,3,32] v, float[2,4,5,8] a, float[2,4,5,8] b",
        "float[2,3,32] y, float[2,4,8,8] c, float[2,4,8,8] d",
        "y, c, d = M.MultiHeadAttention<num_heads=4>(q, k, v, , , , a, b)"),
    "Attention": (
        "float[2,3,6] x, float[6,48] w, float[48] b", "float[2,3,16] y",
        "y = M.Attention<num_heads=4>(x, w, b)"),
    "Attention sizes": (
        "float[2,3,6] x, float[6,56] w, float[56] b, float[2,4,3,3] a", "float[2,3,24] y",
        "y = M.Attention<num_heads=4, qkv_hidden_sizes=[16,16,24]>(x, w, b, , , a)"),
    "Attention past": (
        "float[2,3,6] x, float[6,48] w, float[48] b, float[2,2,4,5,4] p",
        "float[2,3,16] y, float[2,2,4,8,4] n",
        "y, n = M.Attention<num_heads=4, unidirectional=1>(x, w, b, , p)"),
    "GroupQueryAttention": (
        "float[2,3,64] q, float[2,3,32] k, float[2,3,32] v", "float[2,3,64] y",
        LENGTHS + "y = M.GroupQueryAttention<num_heads=4, kv_num_heads=2>(q, k, v, , , s, t)"),
    "GroupQueryAttention packed": (
        "float[2,3,128] q", "float[2,3,64] y",
        LENGTHS + "y = M.GroupQueryAttention<num_heads=4, kv_num_heads=2>(q, , , , , s, t)"),
    "GroupQueryAttention of one KV head": (
        "float[2,3,64] q, float[2,3,16] k, float[2,3,16] v", "float[2,3,64] y",
        LENGTHS + "y = M.GroupQueryAttention<num_heads=4, kv_num_heads=1>(q, k, v, , , s, t)"),
    "GroupQueryAttention rotary": (
        "float[2,3,64] q, float[2,3,32] k, float[2,3,32] v, float[8,8] c, float[8,8] d",
        "float[2,3,64] y, float[2,2,3,16] nk, float[2,2,3,16] nv",
        LENGTHS + "y, nk, nv = M.GroupQueryAttention<num_heads=4, kv_num_heads=2, do_rotary=1>"
        "(q, k, v, , , s, t, c, d)"),
    "GroupQueryAttention past, sinks": (
        "float[2,1,64] q, float[2,1,32] k, float[2,1,32] v, float[2,2,7,16] a, float[2,2,7,16] b, "
        "float[4] h", "float[2,1,64] y, float[2,2,8,16] c, float[2,2,8,16] d",
        LONGER + "y, c, d = M.GroupQueryAttention<num_heads=4, kv_num_heads=2>"
        "(q, k, v, a, b, s, t, , , , , h)"),
}  # fmt: skip

ROTARY = {
    "RotaryEmbedding": ("float[2,3,16] x, float[5,2] c, float[5,2] d", "float[2,3,16] y",
                      IDS + "y = M.RotaryEmbedding(x, i, c, d)"),
    "RotaryEmbedding four axes": (
        "float[2,3,3,8] x, float[5,4] c, float[5,4] d", "float[2,3,3,8] y",
        IDS + "y = M.RotaryEmbedding<interleaved=1>(x, i, c, d)"),
    "RotaryEmbedding in part": (
        "float[2,3,24] x, float[5,2] c, float[5,2] d", "float[2,3,24] y",
        IDS + "y = M.RotaryEmbedding<num_heads=3, rotary_embedding_dim=4>(x, i, c, d)"),
    "RotaryEmbedding one head": (
        "float[2,3,8] x, float[5,4] c, float[5,4] d", "float[2,3,8] y",
        IDS + "y = M.RotaryEmbedding(x, i, c, d)"),
}  # fmt: skip

OTHERS = {
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
    "Trilu": ("float[2,3,6,6] x", "float[2,3,6,6] y", "y = M.Trilu<upper=1>(x)"),
    "MoE": (
        "float[5,6] x, float[5,3] r, float[3,8,6] u, float[3,8] b, float[3,6,8] d, float[3,6] c",
        "float[5,6] y", 'y = M.MoE<activation_type="gelu", k=2>(x, r, u, b, d, c)'),
    "MoE fused gates": (
        "float[5,6] x, float[5,3] r, float[3,16,6] u, float[3,16] b, float[3,6,8] d",
        "float[5,6] y",
        'y = M.MoE<activation_type="swiglu", swiglu_fusion=1, k=2>(x, r, u, b, d)'),
    "MatMulNBits": (
        "float[2,3,64] x, uint8[6,2,16] b, float[6,2] s", "float[2,3,6] y",
        "y = M.MatMulNBits<K=64, N=6, bits=4, block_size=32>(x, b, s)"),
    "MatMulNBits bias": (
        "float[2,3,64] x, uint8[6,2,32] b, float[6,2] s, float[6] c", "float[2,3,6] y",
        "y = M.MatMulNBits<K=64, N=6, bits=8, block_size=32>(x, b, s, , , c)"),
}  # fmt: skip
PINNED = {
    "DecoderMaskedMultiHeadAttention": (
        "float[2,1,32] q, float[2,1,32] k, float[2,1,32] v, float[2,4,5,8] a, float[2,4,5,8] b, "
        "float[96] c", "float[2,1,32] y, float[2,4,6,8] d, float[2,4,6,8] e",
        "y, d, e = M.DecoderMaskedMultiHeadAttention<num_heads=4>(q, k, v, , , a, b, , , , c)"),
    "QMoE": (
        "float[5,6] x, float[5,3] r, uint8[3,8,3] u, float[3,8] s, uint8[3,6,4] d, float[3,6] t",
        "float[5,6] y", 'y = M.QMoE<activation_type="gelu", k=2>(x, r, u, s, , d, t)'),
    "MoE gated": (
        "float[2,5,6] x, float[10,3] r, float[3,8,6] u, float[3,6,8] d, float[3,8,6] g",
        "float[2,5,6] y", 'y = M.MoE<activation_type="silu", k=1>(x, r, u, , d, , g)'),
    "EmbedLayerNormalization": (
        "int32[2,3] i, int32[2,3] j, float[9,6] w, float[5,6] p, float[2,6] s, float[6] g, "
        "float[6] b", "float[2,3,6] y", "y = M.EmbedLayerNormalization(i, j, w, p, s, g, b)"),
    "GroupNorm": (
        "float[2,4,4,8] x, float[8] g, float[8] b", "float[2,4,4,8] y",
        "y = M.GroupNorm<groups=2, activation=0>(x, g, b)"),
    "NhwcConv": ("float[1,4,4,6] x, float[4,3,3,6] w", "float[1,2,2,4] y", "y = M.NhwcConv(x, w)"),
    "BiasSplitGelu": ("float[2,3,8] x, float[8] b", "float[2,3,4] y", "y = M.BiasSplitGelu(x, b)"),
    "BiasAdd": ("float[2,3,8] x, float[8] b, float[2,3,8] s", "float[2,3,8] y",
                "y = M.BiasAdd(x, b, s)"),
}  # fmt: skip

CASES = {**ATTENTION, **ROTARY, **OTHERS, **PINNED}


def model(inputs: str, outputs: str, body: str) -> onnx.ModelProto:
    source = HEAD.format(inputs, outputs) + "{" + body.replace("M.", "com.microsoft.") + "}"
    return parser.parse_model(source)
