"""One line per operator: the oracle of law 3 on a small model of ONNX text."""

from __future__ import annotations

import numpy as np
import pytest

from graphprune.check import LawBrokenError, check_rule
from graphprune.rules import BUILTIN
from graphprune.rules.op import Op

HEAD = '<ir_version: 8, opset_import: ["": {opset}]> g ({inputs}) => ({outputs})'

# operator: opset, inputs, outputs, body. Everything free must obey the law, and something must be.
MODELS = {
    "Conv": (17, "float[1,6,5,5] x, float[4,6,3,3] w, float[4] b", "float[1,4,3,3] y",
             "y = Conv(x, w, b)"),
    "Conv 1d": (17, "float[1,6,5] x, float[4,6,3] w", "float[1,4,3] y", "y = Conv(x, w)"),
    "Conv grouped": (17, "float[1,6,5,5] x, float[8,3,3,3] w", "float[1,8,3,3] y",
                     "y = Conv<group=2>(x, w)"),
    "Conv depthwise": (17, "float[1,6,5,5] x, float[6,1,3,3] w, float[6] b", "float[1,6,3,3] y",
                       "y = Conv<group=6>(x, w, b)"),
    "Conv multiplier": (17, "float[1,6,5,5] x, float[12,1,3,3] w", "float[1,12,3,3] y",
                        "y = Conv<group=6>(x, w)"),
    "ConvTranspose": (17, "float[1,6,4,4] x, float[6,5,2,2] w, float[5] b", "float[1,5,8,8] y",
                      "y = ConvTranspose<strides=[2,2]>(x, w, b)"),
    "ConvTranspose grouped": (17, "float[1,6,4,4] x, float[6,3,2,2] w", "float[1,9,5,5] y",
                              "y = ConvTranspose<group=3>(x, w)"),
    "Gemm": (17, "float[3,6] a, float[6,4] b, float[4] c", "float[3,4] y", "y = Gemm(a, b, c)"),
    "Gemm transposed": (17, "float[6,3] a, float[4,6] b, float[3,1] c", "float[3,4] y",
                        "y = Gemm<transA=1, transB=1, alpha=0.5>(a, b, c)"),
    "MatMul": (17, "float[2,3,6] a, float[6,4] b", "float[2,3,4] y", "y = MatMul(a, b)"),
    "MatMul constant left": (17, "float[3,6] w, float[2,6,4] x", "float[2,3,4] y", "y = MatMul(w, x)"),
    "MatMul batched": (17, "float[2,5,3,6] a, float[1,5,6,4] b", "float[2,5,3,4] y",
                       "y = MatMul(a, b)"),
    "MatMul vector": (17, "float[6] a, float[2,6,4] b", "float[2,4] y", "y = MatMul(a, b)"),
    "Einsum": (17, "float[2,3,6] a, float[2,6,4] b", "float[2,3,4] y",
               'y = Einsum<equation="bij,bjk->bik">(a, b)'),
    "Einsum ellipsis": (17, "float[2,3,6] a, float[6,4] b", "float[2,3,4] y",
                        'y = Einsum<equation="...j,jk->...k">(a, b)'),
    "Einsum sum": (17, "float[3,6] a", "float[3] y", 'y = Einsum<equation="ij->i">(a)'),
    "BatchNormalization": (15, "float[2,6,3] x, float[6] s, float[6] b, float[6] m, float[6] v",
                           "float[2,6,3] y", "q = Abs(v) y = BatchNormalization(x, s, b, m, q)"),
    "BatchNormalization training": (15, "float[2,6,3] x, float[6] s, float[6] b, float[6] m, float[6] v",
        "float[2,6,3] y, float[6] n", "q = Abs(v) y, n, k = BatchNormalization<training_mode=1>"
        "(x, s, b, m, q)"),
    "InstanceNormalization": (17, "float[2,6,4] x, float[6] s, float[6] b", "float[2,6,4] y",
                              "y = InstanceNormalization(x, s, b)"),
    "GroupNormalization 18": (18, "float[1,8,4] x, float[4] s, float[4] b", "float[1,8,4] y",
                              "y = GroupNormalization<num_groups=4>(x, s, b)"),
    "GroupNormalization 21": (21, "float[1,8,4] x, float[8] s, float[8] b", "float[1,8,4] y",
                              "y = GroupNormalization<num_groups=4>(x, s, b)"),
    "GroupNorm decomposed": (17, "float[1,8,2,3] x, float[8,1,1] s", "float[1,8,2,3] y",
        "a = Constant<value = int64[3] {0, 4, -1}>() one = Constant<value = float[4] {1,1,1,1}>() "
        "zero = Constant<value = float[4] {0,0,0,0}>() r = Reshape(x, a) "
        "n = InstanceNormalization(r, one, zero) d = Shape(x) q = Reshape(n, d) y = Mul(q, s)"),
    "LayerNormalization": (17, "float[2,3,6] x, float[6] s, float[6] b", "float[2,3,6] y",
                           "y = LayerNormalization(x, s, b)"),
    "Softmax": (13, "float[2,3,6] x", "float[2,3,6] y", "y = Softmax<axis=1>(x)"),
    "Softmax before 13": (11, "float[2,3,6] x", "float[2,3,6] y", "y = Softmax<axis=1>(x)"),
    "LRN": (13, "float[3,6,2,2] x", "float[3,6,2,2] y", "y = LRN<size=3>(x)"),
    "PRelu": (16, "float[2,6,3] x, float[6,1] s", "float[2,6,3] y", "y = PRelu(x, s)"),
    "Where": (16, "bool[6,1] c, float[2,6,3] a, float[3] b", "float[2,6,3] y", "y = Where(c, a, b)"),
    "Clip": (13, "float[2,6] x", "float[2,6] y",
             "l = Constant<value = float {0.0}>() y = Clip(x, l)"),
    "Dropout": (13, "float[2,6] x", "float[2,6] y", "y, m = Dropout(x)"),
    "Concat": (13, "float[2,3] a, float[2,4] b", "float[2,7] y", "y = Concat<axis=1>(a, b)"),
    "Split 11": (11, "float[2,6] x", "float[2,3] a, float[2,3] b", "a, b = Split<axis=1>(x)"),
    "Split 13": (13, "float[2,6] x", "float[2,2] a, float[2,4] b",
                 "s = Constant<value = int64[2] {2, 4}>() a, b = Split<axis=1>(x, s)"),
    "Split, a piece unread": (17, "float[2,6] x", "float[2,4] b",
                 "s = Constant<value = int64[2] {2, 4}>() a, b = Split<axis=1>(x, s)"),
    "Split 18": (18, "float[2,6] x", "float[2,3] a, float[2,3] b",
                 "a, b = Split<axis=1, num_outputs=2>(x)"),
    "Slice": (13, "float[2,8] x", "float[2,4] y",
              "s = Constant<value = int64[1] {-6}>() e = Constant<value = int64[1] {-2}>() "
              "a = Constant<value = int64[1] {1}>() y = Slice(x, s, e, a)"),
    "Slice 9": (9, "float[2,8] x", "float[2,3] y", "y = Slice<axes=[1], starts=[3], ends=[6]>(x)"),
    "Gather": (13, "float[2,8] x", "float[2,3] y",
               "i = Constant<value = int64[3] {5, 1, -1}>() y = Gather<axis=1>(x, i)"),
    "Gather scalar": (13, "float[3,8] x", "float[8] y",
                      "i = Constant<value = int64 {1}>() y = Gather<axis=0>(x, i)"),
    "Transpose": (13, "float[2,3,4] x", "float[4,2,3] y", "y = Transpose<perm=[2,0,1]>(x)"),
    "Reshape split": (13, "float[2,12] x", "float[2,3,4] y",
                      "s = Constant<value = int64[3] {0, 3, 4}>() y = Reshape(x, s)"),
    "Reshape merge": (13, "float[2,3,4] x", "float[2,12] y",
                      "s = Constant<value = int64[2] {0, -1}>() y = Reshape(x, s)"),
    "Reshape 7": (7, "float[2,3,4] x", "float[2,12] y",
                  "s = Constant<value = int64[2] {2, 12}>() y = Reshape(x, s)"),
    "Reshape computed": (15, "float[2,12] x", "float[2,3,4] y",
        "f = Constant<value = int64[1] {4}>() h = Constant<value = int64[1] {3}>() "
        "d = Shape<start=0, end=1>(x) s = Concat<axis=0>(d, h, f) y = Reshape(x, s)"),
    "Flatten": (13, "float[2,3,4] x", "float[2,12] y", "y = Flatten(x)"),
    "Squeeze": (11, "float[2,1,4] x", "float[2,4] y", "y = Squeeze<axes=[1]>(x)"),
    "Unsqueeze": (13, "float[2,4] x", "float[2,1,4] y",
                  "a = Constant<value = int64[1] {1}>() y = Unsqueeze(x, a)"),
    "Expand": (13, "float[3,1,4] x", "float[3,5,4] y",
               "s = Constant<value = int64[3] {3, 5, 4}>() y = Expand(x, s)"),
    "Slice strided": (13, "float[2,12] x", "float[2,4] y",
        "s = Constant<value = int64[1] {1}>() e = Constant<value = int64[1] {12}>() "
        "a = Constant<value = int64[1] {1}>() p = Constant<value = int64[1] {3}>() "
        "y = Slice(x, s, e, a, p)"),
    "Tile": (13, "float[2,4] x", "float[2,8] y",
             "r = Constant<value = int64[2] {1, 2}>() y = Tile(x, r)"),
    "Tile of one": (13, "float[2,1] x", "float[2,8] y",
             "r = Constant<value = int64[2] {1, 8}>() y = Tile(x, r)"),
    "Pad": (13, "float[2,4] x", "float[2,9] y",
            "p = Constant<value = int64[4] {0, 2, 0, 3}>() y = Pad(x, p)"),
    "Pad 10": (10, "float[2,4] x", "float[2,7] y", "y = Pad<pads=[0,1,0,2]>(x)"),
    "DepthToSpace": (13, "float[1,12,2,2] x", "float[1,3,4,4] y", "y = DepthToSpace<blocksize=2>(x)"),
    "DepthToSpace CRD": (13, "float[1,12,2,2] x", "float[1,3,4,4] y",
                         'y = DepthToSpace<blocksize=2, mode="CRD">(x)'),
    "SpaceToDepth": (13, "float[1,3,4,4] x", "float[1,12,2,2] y", "y = SpaceToDepth<blocksize=2>(x)"),
    "ReduceMean": (13, "float[2,6,3] x", "float[2,6] y", "y = ReduceMean<axes=[2], keepdims=0>(x)"),
    "ReduceSum": (13, "float[2,6] x", "float[2,1] y",
                  "a = Constant<value = int64[1] {1}>() y = ReduceSum(x, a)"),
    "ArgMax": (13, "float[4,6] x", "int64[4,1] y", "y = ArgMax<axis=1>(x)"),
    "MaxPool": (12, "float[1,6,4,4] x", "float[1,6,2,2] y",
                "y = MaxPool<kernel_shape=[2,2], strides=[2,2]>(x)"),
    "AveragePool": (11, "float[1,6,4,4] x", "float[1,6,3,3] y", "y = AveragePool<kernel_shape=[2,2]>(x)"),
    "GlobalAveragePool": (13, "float[1,6,4,4] x", "float[1,6,1,1] y", "y = GlobalAveragePool(x)"),
    "Resize": (13, "float[1,6,2,2] x", "float[1,6,4,4] y",
               "s = Constant<value = int64[4] {1, 6, 4, 4}>() y = Resize(x, , , s)"),
    "Upsample": (9, "float[1,6,2,2] x", "float[1,6,4,4] y",
                 "s = Constant<value = float[4] {1, 1, 2, 2}>() y = Upsample(x, s)"),
    "TopK": (11, "float[4,6] x", "float[4,2] v, int64[4,2] i",
             "k = Constant<value = int64[1] {2}>() v, i = TopK(x, k)"),
    "ConstantOfShape": (13, "float[2,5] x", "float[2,5] y",
        "s = Constant<value = int64[1] {5}>() c = ConstantOfShape<value = float[1] {2}>(s) y = Mul(x, c)"),
    "Cast": (13, "float[2,6] x", "float16[2,6] y", "y = Cast<to=10>(x)"),
    "SE": (13, "float[1,6,4,4] x, float[2,6,1,1] a, float[6,2,1,1] b", "float[1,6,4,4] y",
        "g = GlobalAveragePool(x) h = Conv(g, a) r = Relu(h) i = Conv(r, b) s = Sigmoid(i) y = Mul(x, s)"),
    "LayerNorm decomposed": (17, "float[2,3,6] x", "float[2,3,6] y",
        "m = ReduceMean<axes=[-1]>(x) d = Sub(x, m) q = Mul(d, d) v = ReduceMean<axes=[-1]>(q) "
        "s = Sqrt(v) y = Div(d, s)"),
}  # fmt: skip


def text(name: str) -> str:
    opset, inputs, outputs, body = MODELS[name]
    return HEAD.format(opset=opset, inputs=inputs, outputs=outputs) + " {" + body + "}"


@pytest.mark.parametrize("name", MODELS)
def test_law_holds(name: str) -> None:
    assert check_rule(text(name)).passed


PINNED = {
    "strided slice": (13, "float[8] x", "float[3] y",
        "s = Constant<value = int64[1] {0}>() e = Constant<value = int64[1] {8}>() "
        "a = Constant<value = int64[1] {0}>() p = Constant<value = int64[1] {3}>() "
        "y = Slice(x, s, e, a, p)"),
    "indices of a pool": (12, "float[1,6,4,4] x", "float[1,6,2,2] y, int64[1,6,2,2] i",
        "y, i = MaxPool<kernel_shape=[2,2], strides=[2,2]>(x)"),
    "no rule": (13, "float[4,4] x", "float y", "y = Det(x)"),
}  # fmt: skip


@pytest.mark.parametrize("name", PINNED)
def test_pinned_with_a_reason(name: str) -> None:
    opset, inputs, outputs, body = PINNED[name]
    source = HEAD.format(opset=opset, inputs=inputs, outputs=outputs) + " {" + body + "}"
    checked = check_rule(source)
    assert not checked.passed
    assert checked.pinned


def test_wrong_rule_is_caught() -> None:
    """A Conv whose group count is not rewritten, and a Softmax that forgets its statistics."""

    def careless(op: Op) -> None:
        op.same(op.input(0), op.output())

    with pytest.raises(LawBrokenError):
        check_rule(text("Softmax"), rules={**BUILTIN, ("", "Softmax"): careless})

    def forgetful(op: Op) -> None:
        BUILTIN["", "Conv"](op)
        op.relations.counts.clear()

    with pytest.raises(LawBrokenError):
        check_rule(text("Conv depthwise"), rules={**BUILTIN, ("", "Conv"): forgetful})


def test_wrong_movement_is_caught() -> None:
    def swapped(op: Op) -> None:
        x, y = op.input(0), op.output()
        op.tie(x[0], y[0])
        op.tie(x[1].slots[::-1], y[1])

    square = HEAD.format(opset=13, inputs="float[2,4] x", outputs="float[2,4] y") + " {y = Relu(x)}"
    with pytest.raises(LawBrokenError):
        check_rule(square, rules={**BUILTIN, ("", "Relu"): swapped})


def test_equal_weights_cannot_hide_a_wrong_cut() -> None:
    """Weights filled with one number get random ones for the proof, so each channel counts."""
    source = HEAD.format(opset=13, inputs="float[1,3,4,4] x", outputs="float[1,2,4,4] y") + (
        "{ s = Constant<value = int64[4] {6, 3, 1, 1}>() t = Constant<value = int64[4] {2, 6, 1, 1}>()"
        " v = ConstantOfShape<value = float[1] {1}>(s) w = ConstantOfShape<value = float[1] {1}>(t)"
        " h = Conv(x, v) r = Relu(h) y = Conv(r, w) }"
    )

    def shifted(op: Op) -> None:
        """Relu that ties each channel to its neighbour."""
        x, y = op.input(0), op.output()
        op.same(x, y, but=[1])
        op.tie(x[1], np.roll(y[1].slots, 1))

    with pytest.raises(LawBrokenError):
        check_rule(source, rules={**BUILTIN, ("", "Relu"): shifted})
    assert check_rule(source).passed
