"""Inputs that look rows up, through casts and arithmetic, are fed ids; masks are not."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import parser

from graphprune.calibrate.synthesise import synthesise
from graphprune.lookups import index_bounds
from graphprune.runtime import opened, random_inputs
from graphprune.shapes import infer
from graphprune.storage import load

HEAD = '<ir_version: 8, opset_import: ["": 17]> g ({inputs}, float[40,6] t) => (float[2,5,6] y)'
CONSTANTS = "zero = Constant<value = int32 {0}>() n = Constant<value = int32 {40}>() "
WRAP = CONSTANTS + (
    "a = Add(k, n) f = Cast<to=1>(k) z = Cast<to=1>(zero) l = Less(f, z) o = Not(l) "
    "p = Cast<to=6>(l) q = Cast<to=6>(o) u = Mul(p, a) v = Mul(k, q) i = Add(u, v) y = Gather(t, i)"
)

# name: inputs, body, ids that the first input may be.
FORMS = {
    "plain": ("int64[2,5] x", "y = Gather(t, x)", [40]),
    "from the end, by sums": ("int32[2,5] x", "k = Identity(x) " + WRAP, [40]),
    "from the end, floats": ("float[2,5] x", "k = Cast<to=6>(x) " + WRAP, [40]),
    "from the end, by Where": ("int32[2,5] x", CONSTANTS + "a = Add(x, n) l = Less(x, zero) "
                               "i = Where(l, a, x) y = Gather(t, i)", [40]),
    "behind two special rows": ("int64[2,5] x", "c = Constant<value = int64 {2}>() "
                                "i = Add(x, c) y = Gather(t, i)", [38]),
    "behind places": ("int64[2,5] x", "c = Constant<value = int64[5] {0, 8, 16, 24, 32}>() "
                      "i = Add(x, c) y = Gather(t, i)", [8]),
    "a mask of places": ("int64[2,5] x", "c = Constant<value = int64[5] {1, 2, 3, 4, 5}>() "
                         "i = Mul(x, c) y = Gather(t, i)", []),
    "of two inputs": ("int64[2,5] x, int64[2,5] w", "i = Add(x, w) y = Gather(t, i)", []),
    "divided": ("int64[2,5] x", "c = Constant<value = int64 {2}>() d = Div(x, c) i = Add(d, c) "
                "y = Gather(t, i)", []),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_ids(name: str) -> None:
    inputs, body, expected = FORMS[name]
    model = load(parser.parse_model(HEAD.format(inputs=inputs) + "{" + body + "}"))
    shapes = infer(model)
    assert index_bounds(model, shapes, "x") == expected
    feeds = random_inputs(model, shapes)
    opened(model)(feeds)
    made = synthesise(model, shapes, 8, 0).read(0, 8)["x"]
    for ids in (feeds["x"], made):
        assert (len(np.unique(ids)) > 4) == bool(expected)
        assert not (ids % 1).any()
        assert ids.min() >= 0
        assert ids.max() < min(expected, default=2)
