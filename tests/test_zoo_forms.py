"""Structures that exported models are made of, each as a small graph under the oracle of law 3."""

from __future__ import annotations

import pytest

from graphprune.check import check_rule

HEAD = '<ir_version: 8, opset_import: ["": {opset}]> g ({inputs}) => ({outputs})'

# structure: opset, inputs, outputs, body. Something must be free, and all of it obey the law.
MODELS = {
    "GatherND": (13, "float[2,3,6] x", "float[2,6] y",
        "i = Constant<value = int64[2,2] {0, 1, 1, 2}>() y = GatherND(x, i)"),
    "GatherND batch": (13, "float[2,3,6] x", "float[2,4,6] y",
        "i = Constant<value = int64[2,4,1] {0, 1, 1, 2, 2, 1, 0, 0}>() "
        "y = GatherND<batch_dims=1>(x, i)"),
    "ScatterND": (13, "float[3,4,6] x, float[2,6] u", "float[3,4,6] y",
        "i = Constant<value = int64[2,2] {0, 1, 2, 3}>() y = ScatterND(x, i, u)"),
    "GatherElements": (13, "float[3,6] x", "float[2,6] y",
        "i = Constant<value = int64[2,6] {0,1,2,0,1,2,2,1,0,2,1,0}>() "
        "y = GatherElements<axis=0>(x, i)"),
    "ScatterElements": (13, "float[3,6] x, float[1,6] u", "float[3,6] y",
        "i = Constant<value = int64[1,6] {0,1,2,0,1,2}>() y = ScatterElements<axis=0>(x, i, u)"),
    "OneHot": (13, "int64[4] x", "float[4,5] y",
        "d = Constant<value = int64 {5}>() v = Constant<value = float[2] {0, 1}>() "
        "y = OneHot(x, d, v)"),
    "CenterCropPad": (18, "float[2,6,5] x", "float[2,6,3] y",
        "s = Constant<value = int64[1] {3}>() y = CenterCropPad<axes=[2]>(x, s)"),
    "DFT": (17, "float[2,6,1] x", "float[2,6,2] y", "y = DFT<axis=1>(x)"),
    "DFT 20": (20, "float[2,6,1] x", "float[2,6,2] y",
        "a = Constant<value = int64 {1}>() y = DFT(x, , a)"),
    "Col2Im": (18, "float[1,20,4] x", "float[1,5,4,4] y",
        "i = Constant<value = int64[2] {4, 4}>() b = Constant<value = int64[2] {2, 2}>() "
        "y = Col2Im<strides=[2,2]>(x, i, b)"),
    "DeformConv": (19, "float[1,4,5,5] x, float[6,4,3,3] w, float[1,18,3,3] o, float[6] b",
        "float[1,6,3,3] y", "y = DeformConv(x, w, o, b)"),
}  # fmt: skip


def text(entry: tuple[int, str, str, str]) -> str:
    opset, inputs, outputs, body = entry
    return HEAD.format(opset=opset, inputs=inputs, outputs=outputs) + " {" + body + "}"


@pytest.mark.parametrize("name", MODELS)
def test_law_holds(name: str) -> None:
    assert check_rule(text(MODELS[name])).passed
