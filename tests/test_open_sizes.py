"""Behind sizes that only the data decides, everything else is pruned as anywhere."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from graphs import Builder

from graphprune.api import prune
from graphprune.check import check_rule
from graphprune.result import Result
from graphprune.shapes import infer
from graphprune.storage import load

HEAD = '<ir_version: 8, opset_import: ["": {opset}]> g ({inputs}) => ({outputs})'


def halved(model: onnx.ModelProto) -> Result:
    return prune(model, flops=0.5, round_to=1, min_channels=1, fast=True, measure=False)


def two_stages() -> onnx.ModelProto:
    """Boxes that overlap are suppressed; what is left is cut from the features and classified."""
    b = Builder(opset=16)
    x = b.add("Relu", b.conv("x", 3, 16))
    flat = b.ints(1, -1, 16 * 16)
    scores = b.add("Sigmoid", b.add("Reshape", b.conv(x, 16, 1, 1), flat))
    shifts = b.add("Reshape", b.conv(x, 16, 4, 1), b.ints(1, 4, 256))
    boxes = b.add("Add", b.add("Transpose", shifts, perm=[0, 2, 1]), b.constant(corners()))
    kept = b.add(
        "NonMaxSuppression",
        boxes,
        scores,
        b.ints(8),
        b.constant(np.float32([0.5])),
        b.constant(np.float32([0.0])),
    )
    index = b.add("Squeeze", b.add("Slice", kept, b.ints(2), b.ints(3), b.ints(1)), b.ints(1))
    regions = b.add("Gather", b.add("Squeeze", boxes, b.ints(0)), index, axis=0)
    batch = b.add("Mul", index, b.ints(0))
    cut = b.add("RoiAlign", x, regions, batch, output_height=3, output_width=3)
    h = b.add(
        "Relu", b.add("Gemm", b.add("Flatten", cut), b.weight(64, 144), b.weight(64), transB=1)
    )
    h = b.add("Relu", b.add("Gemm", h, b.weight(32, 64), b.weight(32), transB=1))
    y = b.add("Gemm", h, b.weight(5, 32), b.weight(5), transB=1)
    return b.model({"x": [1, 3, 16, 16]}, {y: ["found", 5]})


def corners() -> np.ndarray:
    """One box of 4 x 4 at every pixel."""
    rows, columns = np.divmod(np.arange(256), 16)
    return np.stack([rows, columns, rows + 4, columns + 4], 1)[None].astype(np.float32)


def experts() -> onnx.ModelProto:
    """Tokens find their expert at run time, as loops over experts are exported."""
    b = Builder(opset=16)
    x = b.add("Relu", b.add("Gemm", "x", b.weight(16, 16), b.weight(16)))
    chosen = b.add("ArgMax", b.add("Gemm", x, b.weight(16, 2), b.weight(2)), axis=1, keepdims=0)
    y = b.add("Mul", x, b.constant(np.float32(0)))
    for expert in range(2):
        mine = b.add("NonZero", b.add("Equal", chosen, b.constant(np.int64(expert))))
        rows = b.add("Transpose", mine, perm=[1, 0])
        h = b.add("Relu", b.add("Gemm", b.add("GatherND", x, rows), b.weight(16, 48), b.weight(48)))
        y = b.add("ScatterND", y, rows, b.add("Gemm", h, b.weight(48, 16), b.weight(16)))
    y = b.add("Gemm", y, b.weight(16, 4), b.weight(4))
    return b.model({"x": [12, 16]}, {y: [12, 4]})


FORMS = {"two stages": two_stages, "experts": experts}


@pytest.mark.parametrize("form", FORMS)
def test_half_of_the_work_leaves(form: str) -> None:
    result = halved(FORMS[form]())
    assert result.verdict.passed
    assert result.after.macs <= 0.5 * result.before.macs


RULES = {
    "Compress": (11, "float[6,4] x, bool[6] c", "float[n,4] y", "y = Compress<axis=0>(x, c)"),
    "NonZero": (13, "float[5,6] x, float[5] c, float[6,3] w", "float[n,3] y",
        "i = NonZero(c) t = Transpose<perm=[1,0]>(i) g = GatherND(x, t) y = MatMul(g, w)"),
    "Slice": (13, "float[2,6,5] x, int64[1] e", "float[2,6,n] y",
        "s = Constant<value = int64[1] {0}>() a = Constant<value = int64[1] {2}>() "
        "y = Slice(x, s, e, a)"),
    "Slice of the first axes": (13, "float[5,6] x, int64[1] e", "float[n,6] y",
        "s = Constant<value = int64[1] {0}>() y = Slice(x, s, e)"),
    "TopK": (11, "float[6,4] x, int64[1] k", "float[6,n] v, int64[6,n] i", "v, i = TopK(x, k)"),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_other_axes_go_through(name: str) -> None:
    opset, inputs, outputs, body = RULES[name]
    source = HEAD.format(opset=opset, inputs=inputs, outputs=outputs) + " {" + body + "}"
    ones = {"e": np.int64([3]), "k": np.int64([2]), "c": np.array([1, 0, 1, 1, 0, 1], bool)}
    proto = onnx.parser.parse_model(source)
    feeds = {v.name: fed(v, ones) for v in proto.graph.input}
    assert check_rule(proto, feeds).passed


def fed(value: onnx.ValueInfoProto, known: dict[str, np.ndarray]) -> np.ndarray:
    kind = value.type.tensor_type
    shape = [d.dim_value for d in kind.shape.dim]
    if kind.elem_type == onnx.TensorProto.FLOAT:
        return np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return known[value.name]


PINNED = {
    "Compress of all": (11, "float[6,4] x, bool[6] c", "float[n] y", "y = Compress(x, c)"),
    "Unique": (11, "float[6] x", "float[n] y", "y = Unique(x)"),
}


@pytest.mark.parametrize("name", PINNED)
def test_pinned_with_a_reason(name: str) -> None:
    opset, inputs, outputs, body = PINNED[name]
    source = HEAD.format(opset=opset, inputs=inputs, outputs=outputs) + " {" + body + "}"
    checked = check_rule(source)
    assert not checked.passed
    assert checked.pinned


def test_what_is_known_is_no_guess() -> None:
    """NonZero of a constant has the size that its value says."""
    b = Builder(opset=16)
    rows = b.add("NonZero", b.constant(np.float32([0, 1, 0, 1, 1])))
    y = b.add("Gather", "x", b.add("Squeeze", rows, b.ints(0)), axis=0)
    shapes = infer(load(b.model({"x": [5, 4]}, {y: ["n", 4]})))
    assert shapes.shape[rows] == (1, 3)
    assert shapes.shape[y] == (3, 4)


@pytest.mark.parametrize("flops", [None, 0.8])
def test_no_channel_is_chosen_by_what_was_taken(flops: float | None) -> None:
    """Eight channels, from as many on as numbers of ``q`` are not zero: of ten, all are dead."""
    b = Builder(opset=16)
    count = b.add("Slice", b.add("Shape", b.add("NonZero", "q")), b.ints(1), b.ints(2))
    dead = np.r_[10:18]
    first = b.rng.standard_normal((8, 40)).astype(np.float32)
    first[:, dead] = 0
    h = b.add("MatMul", "x", b.constant(first))
    h = b.add("Slice", h, count, b.add("Add", count, b.ints(8)), b.ints(1))
    h = b.add("Relu", b.add("MatMul", h, b.weight(8, 16)))
    y = b.add("MatMul", h, b.weight(16, 4))
    model = b.model({"x": [1, 8], "q": [1, 10]}, {y: [1, 4]})
    result = prune(model, flops=flops, round_to=1, fast=True, measure=False, lossless=True)
    nodes = [node.op_type for node in result.model.graph.node]
    assert not {"Mul", "Div"}.intersection(nodes)
    (weight,) = (t for t in result.model.graph.initializer if t.name == "c2")
    assert list(weight.dims) == [8, 40]


def test_what_was_taken_is_said() -> None:
    result = halved(two_stages())
    said = [note for note in result.notes if "a size that only the data decides" in note]
    assert len(said) == 1
    assert "[8, 3]" in said[0]
