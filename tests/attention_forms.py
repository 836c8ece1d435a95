"""Decomposed attention as exporters write it, one function for each form."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from graphs import Builder
from onnx import TensorProto

WIDTH, HEADS, SIZE, LENGTH = 12, 8, 6, 5
INNER = HEADS * SIZE
QKV = tuple[str, str, str]
Ends = dict[str, list[object]]


class Net(Builder):
    """A builder of attention on ``x``: [batch, LENGTH, WIDTH]."""

    def __init__(self, opset: int = 15) -> None:
        super().__init__(opset=opset)
        self.lengths = [LENGTH, LENGTH]  # of the input and of the output
        self.more: tuple[Ends, Ends] = ({}, {})  # further inputs and outputs

    def linear(self, x: str, width: int, out: int) -> str:
        return self.add("Add", self.add("MatMul", x, self.weight(width, out)), self.weight(out))

    def split_heads(self, x: str, heads: int = HEADS, size: int = SIZE) -> str:
        """[batch, heads, length, size]"""
        split = self.add("Reshape", x, self.ints(0, 0, heads, size))
        return self.add("Transpose", split, perm=[0, 2, 1, 3])

    def separate(self, x: str = "x", other: str = "") -> QKV:
        sources = (x, other or x, other or x)
        q, k, v = (self.split_heads(self.linear(s, WIDTH, INNER)) for s in sources)
        return q, k, v

    def packed(self) -> str:
        return self.linear("x", WIDTH, 3 * INNER)

    def scalar(self, value: float) -> str:
        return self.constant(np.float32(value))

    def keys(self, q: str, k: str) -> str:
        """Scores, scaled after the product."""
        product = self.add("MatMul", q, self.add("Transpose", k, perm=[0, 1, 3, 2]))
        return self.add("Div", product, self.scalar(SIZE**0.5))

    def mix(self, scores: str, v: str) -> str:
        return self.add("MatMul", self.add("Softmax", scores, axis=-1), v)

    def join(self, mixed: str, inner: int = INNER) -> str:
        joined = self.add("Transpose", mixed, perm=[0, 2, 1, 3])
        return self.linear(self.add("Reshape", joined, self.ints(0, 0, inner)), inner, WIDTH)

    def attend(self, q: str, k: str, v: str) -> str:
        return self.join(self.mix(self.keys(q, k), v))

    def at(self, x: str, start: int, end: int, axis: int) -> str:
        return self.add("Slice", x, self.ints(start), self.ints(end), self.ints(axis))


Form = Callable[[Net], str]


def separate(b: Net) -> str:
    return b.attend(*b.separate())


def split(b: Net) -> str:
    pieces = b.add("Split", b.packed(), b.ints(INNER, INNER, INNER), outputs=3, axis=-1)
    return b.attend(*(b.split_heads(piece) for piece in pieces))


def chunk(b: Net) -> str:
    packed = b.packed()
    pieces = [b.at(packed, i * INNER, (i + 1) * INNER, 2) for i in range(3)]
    return b.attend(*(b.split_heads(piece) for piece in pieces))


def stacked_gather(b: Net) -> str:
    """[batch, length, 3, heads, size] → [3, batch, heads, length, size], picked by Gather."""
    five = b.add("Reshape", b.packed(), b.ints(0, 0, 3, HEADS, SIZE))
    five = b.add("Transpose", five, perm=[2, 0, 3, 1, 4])
    picked = [b.add("Gather", five, b.constant(np.int64(i)), axis=0) for i in range(3)]
    return b.attend(*picked)


def stacked_slice(b: Net) -> str:
    five = b.add("Reshape", b.packed(), b.ints(0, 0, 3, HEADS, SIZE))
    five = b.add("Transpose", five, perm=[2, 0, 3, 1, 4])
    picked = [b.add("Squeeze", b.at(five, i, i + 1, 0), b.ints(0)) for i in range(3)]
    return b.attend(*picked)


def stacked_split(b: Net) -> str:
    five = b.add("Reshape", b.packed(), b.ints(0, 0, 3, HEADS, SIZE))
    five = b.add("Transpose", five, perm=[2, 0, 3, 1, 4])
    pieces = b.add("Split", five, b.ints(1, 1, 1), outputs=3, axis=0)
    return b.attend(*(b.add("Squeeze", piece, b.ints(0)) for piece in pieces))


def heads_then_three(b: Net) -> str:
    """[batch, length, heads, 3 * size], cut along the last axis."""
    four = b.add("Reshape", b.packed(), b.ints(0, 0, HEADS, 3 * SIZE))
    pieces = b.add("Split", four, b.ints(SIZE, SIZE, SIZE), outputs=3, axis=-1)
    return b.attend(*(b.add("Transpose", piece, perm=[0, 2, 1, 3]) for piece in pieces))


def heads_three_gather(b: Net) -> str:
    """[batch, length, heads, 3, size], picked along the fourth axis."""
    five = b.add("Reshape", b.packed(), b.ints(0, 0, HEADS, 3, SIZE))
    picked = [b.add("Gather", five, b.constant(np.int64(i)), axis=3) for i in range(3)]
    return b.attend(*(b.add("Transpose", piece, perm=[0, 2, 1, 3]) for piece in picked))


def scaled_before(b: Net) -> str:
    q, k, v = b.separate()
    q = b.add("Mul", q, b.scalar(SIZE**-0.5))
    scores = b.add("MatMul", q, b.add("Transpose", k, perm=[0, 1, 3, 2]))
    return b.join(b.mix(scores, v))


def scaled_by_shape(b: Net) -> str:
    """Both sides times the fourth root of the head size, read from the tensor's own shape."""
    q, k, v = b.separate()
    size = b.at(b.add("Shape", q), -1, 2**31 - 1, 0)
    root = b.add("Sqrt", b.add("Cast", size, to=TensorProto.FLOAT))
    scale = b.add("Sqrt", b.add("Div", b.constant(np.float32([1])), root))
    q = b.add("Mul", q, scale)
    k = b.add("Mul", b.add("Transpose", k, perm=[0, 1, 3, 2]), scale)
    return b.join(b.mix(b.add("MatMul", q, k), v))


def added_mask(b: Net) -> str:
    q, k, v = b.separate()
    mask = b.constant(np.triu(np.full((1, 1, LENGTH, LENGTH), -1e4, np.float32), 1))
    return b.join(b.mix(b.add("Add", b.keys(q, k), mask), v))


def chosen_mask(b: Net) -> str:
    q, k, v = b.separate()
    mask = b.constant(np.tril(np.ones((1, 1, LENGTH, LENGTH), bool)))
    scores = b.add("Where", mask, b.keys(q, k), b.scalar(-1e4))
    return b.join(b.mix(scores, v))


def mask_per_head(b: Net) -> str:
    """ALiBi: one slope for each head."""
    q, k, v = b.separate()
    slopes = b.constant((2.0 ** -np.arange(HEADS)).astype(np.float32).reshape(1, HEADS, 1, 1))
    far = b.constant(np.arange(LENGTH, dtype=np.float32).reshape(1, 1, 1, LENGTH))
    return b.join(b.mix(b.add("Add", b.keys(q, k), b.add("Mul", slopes, far)), v))


def relative_table(b: Net) -> str:
    """A table of relative positions [distances, heads], gathered, reshaped, transposed (Swin)."""
    q, k, v = b.separate()
    place = np.arange(LENGTH)
    distance = (place[:, None] - place[None, :] + LENGTH - 1).reshape(-1)
    rows = b.add("Gather", b.weight(2 * LENGTH - 1, HEADS), b.constant(distance), axis=0)
    square = b.add("Reshape", rows, b.ints(LENGTH, LENGTH, -1))
    bias = b.add("Transpose", square, perm=[2, 0, 1])
    bias = b.add("Unsqueeze", bias, b.ints(0))
    return b.join(b.mix(b.add("Add", b.keys(q, k), bias), v))


def relative_buckets(b: Net) -> str:
    """Buckets of distances computed from the length (T5)."""
    q, k, v = b.separate()
    length = b.add("Gather", b.add("Shape", "x"), b.constant(np.int64(1)), axis=0)
    places = b.add("Range", b.constant(np.int64(0)), length, b.constant(np.int64(1)))
    column, row = (b.add("Unsqueeze", places, b.ints(axis)) for axis in (0, 1))
    distance = b.add("Abs", b.add("Sub", column, row))
    bucket = b.add("Min", distance, b.constant(np.int64(3)))
    bias = b.add("Gather", b.weight(4, HEADS), bucket, axis=0)
    bias = b.add("Unsqueeze", b.add("Transpose", bias, perm=[2, 0, 1]), b.ints(0))
    return b.join(b.mix(b.add("Add", b.keys(q, k), bias), v))


def _angles(b: Net, size: int) -> tuple[str, str]:
    angles = np.arange(LENGTH)[:, None] * 0.3 ** np.arange(size)[None, :]
    cos, sin = (f(angles).astype(np.float32) for f in (np.cos, np.sin))
    return b.constant(cos), b.constant(sin)


def _half(b: Net, x: str, cos: str, sin: str) -> str:
    """x * cos + rotate_half(x) * sin"""
    low, high = b.at(x, 0, SIZE // 2, 3), b.at(x, SIZE // 2, 2**31 - 1, 3)
    turned = b.add("Concat", b.add("Neg", high), low, axis=-1)
    return b.add("Add", b.add("Mul", x, cos), b.add("Mul", turned, sin))


def _doubled(b: Net) -> tuple[str, str]:
    """Tables of LENGTH x SIZE whose halves are the same, as exporters make them."""
    cos, sin = _angles(b, SIZE // 2)
    return b.add("Concat", cos, cos, axis=-1), b.add("Concat", sin, sin, axis=-1)


def rotate_half(b: Net) -> str:
    q, k, v = b.separate()
    tables = _doubled(b)
    return b.attend(_half(b, q, *tables), _half(b, k, *tables), v)


def rotate_pairs(b: Net) -> str:
    """Interleaved: [..., size / 2, 2], the two columns turned and stacked again."""
    q, k, v = b.separate()
    cos, sin = _angles(b, SIZE // 2)

    def turn(x: str) -> str:
        pairs = b.add("Reshape", x, b.ints(0, 0, 0, SIZE // 2, 2))
        real, imaginary = (
            b.add("Squeeze", piece, b.ints(4))
            for piece in b.add("Split", pairs, b.ints(1, 1), outputs=2, axis=4)
        )
        left = b.add("Sub", b.add("Mul", real, cos), b.add("Mul", imaginary, sin))
        right = b.add("Add", b.add("Mul", real, sin), b.add("Mul", imaginary, cos))
        both = b.add("Concat", *(b.add("Unsqueeze", p, b.ints(4)) for p in (left, right)), axis=4)
        return b.add("Reshape", both, b.ints(0, 0, LENGTH, SIZE))

    return b.attend(turn(q), turn(k), v)


def rotate_strided(b: Net) -> str:
    """Interleaved: every second position, by strided slices."""
    q, k, v = b.separate()
    cos, sin = _angles(b, SIZE // 2)

    def turn(x: str) -> str:
        even, odd = (
            b.add("Slice", x, b.ints(i), b.ints(2**31 - 1), b.ints(3), b.ints(2)) for i in (0, 1)
        )
        left = b.add("Sub", b.add("Mul", even, cos), b.add("Mul", odd, sin))
        right = b.add("Add", b.add("Mul", even, sin), b.add("Mul", odd, cos))
        both = b.add("Concat", *(b.add("Unsqueeze", p, b.ints(4)) for p in (left, right)), axis=4)
        return b.add("Reshape", both, b.ints(0, 0, LENGTH, SIZE))

    return b.attend(turn(q), turn(k), v)


def cross(b: Net) -> str:
    b.more[0]["memory"] = ["n", 7, WIDTH]
    return b.attend(*b.separate("x", "memory"))


def einsum(b: Net) -> str:
    q, k, v = (
        b.add("Reshape", b.linear("x", WIDTH, INNER), b.ints(0, 0, HEADS, SIZE)) for _ in "qkv"
    )
    scores = b.add("Einsum", q, k, equation="bihd,bjhd->bhij")
    mixed = b.add("Einsum", b.add("Softmax", scores, axis=-1), v, equation="bhij,bjhd->bihd")
    return b.linear(b.add("Reshape", mixed, b.ints(0, 0, INNER)), INNER, WIDTH)


def einsum_weights(b: Net) -> str:
    """Weights of three axes: [in, heads, size] and [heads, size, out] (Keras)."""
    q, k, v = (
        b.add("Einsum", "x", b.weight(WIDTH, HEADS, SIZE), equation="abc,cde->abde") for _ in "qkv"
    )
    scores = b.add("Einsum", k, q, equation="aecd,abcd->acbe")
    mixed = b.add("Einsum", b.add("Softmax", scores, axis=-1), v, equation="acbe,aecd->abcd")
    return b.add("Einsum", mixed, b.weight(HEADS, SIZE, WIDTH), equation="abcd,cde->abe")


def heads_in_batch(b: Net) -> str:
    """Products over [batch * heads, length, size], as torch's own module writes them."""
    q, k, v = b.separate()
    q, k, v = (b.add("Reshape", t, b.ints(-1, LENGTH, SIZE)) for t in (q, k, v))
    scores = b.add("MatMul", q, b.add("Transpose", k, perm=[0, 2, 1]))
    mixed = b.add("MatMul", b.add("Softmax", scores, axis=-1), v)
    return b.join(b.add("Reshape", mixed, b.ints(-1, HEADS, LENGTH, SIZE)))


def normalised_queries(b: Net) -> str:
    q, k, v = b.separate()
    q, k = (b.add("LayerNormalization", t, b.weight(SIZE), b.weight(SIZE)) for t in (q, k))
    return b.attend(q, k, v)


def cosine_scores(b: Net) -> str:
    """Queries and keys of length 1 and a learned scale for each head (Swin v2)."""
    q, k, v = b.separate()
    q, k = (b.add("Div", t, b.add("ReduceL2", t, axes=[-1], keepdims=1)) for t in (q, k))
    scores = b.add("MatMul", q, b.add("Transpose", k, perm=[0, 1, 3, 2]))
    scale = b.constant(np.arange(1, HEADS + 1, dtype=np.float32).reshape(HEADS, 1, 1))
    return b.join(b.mix(b.add("Mul", scores, scale), v))


def shapes_at_run_time(b: Net) -> str:
    """Targets of Reshape put together from the shape of the input."""
    shape = b.add("Shape", "x")
    lead = [b.add("Slice", shape, b.ints(i), b.ints(i + 1)) for i in range(2)]
    target = b.add("Concat", *lead, b.ints(HEADS, SIZE), axis=0)
    back = b.add("Concat", *lead, b.ints(INNER), axis=0)
    q, k, v = (
        b.add("Transpose", b.add("Reshape", b.linear("x", WIDTH, INNER), target), perm=[0, 2, 1, 3])
        for _ in "qkv"
    )
    mixed = b.add("Transpose", b.mix(b.keys(q, k), v), perm=[0, 2, 1, 3])
    return b.linear(b.add("Reshape", mixed, back), INNER, WIDTH)


def class_tokens(b: Net) -> str:
    """A class and a distillation token before the others; the answer is read from them."""
    b.lengths = [LENGTH, 1]
    like = b.add("Shape", b.add("ReduceMean", "x", axes=[1, 2], keepdims=1))
    batch = b.add("Concat", b.at(like, 0, 1, 0), b.ints(1, WIDTH), axis=0)
    tokens = [b.add("Expand", b.weight(1, 1, WIDTH), batch) for _ in range(2)]
    x = b.add("Concat", *tokens, "x", axis=1)
    x = b.add("Add", x, b.weight(1, LENGTH + 2, WIDTH))
    y = b.attend(*b.separate(x))
    picked = [b.add("Gather", y, b.constant(np.int64(i)), axis=1) for i in (0, 1)]
    return b.add("Unsqueeze", b.add("Add", *picked), b.ints(1))


def windows(b: Net) -> str:
    """A map of 4 x 4 rolled by 1, cut into windows of 2 x 2, each attending to itself (Swin)."""
    b.lengths = [16, 16]
    x = b.add("Reshape", b.linear("x", WIDTH, WIDTH), b.ints(0, 4, 4, WIDTH))
    for axis in (1, 2):
        x = b.add("Concat", b.at(x, 1, 2**31 - 1, axis), b.at(x, 0, 1, axis), axis=axis)
    x = b.add("Reshape", x, b.ints(-1, 2, 2, 2, 2, WIDTH))
    x = b.add("Reshape", b.add("Transpose", x, perm=[0, 1, 3, 2, 4, 5]), b.ints(-1, 4, WIDTH))
    five = b.add("Reshape", b.linear(x, WIDTH, 3 * INNER), b.ints(-1, 4, 3, HEADS, SIZE))
    five = b.add("Transpose", five, perm=[2, 0, 3, 1, 4])
    q, k, v = (b.add("Gather", five, b.constant(np.int64(i)), axis=0) for i in range(3))
    q = b.add("Mul", q, b.scalar(SIZE**-0.5))
    scores = b.add("MatMul", q, b.add("Transpose", k, perm=[0, 1, 3, 2]))
    table = b.add("Gather", b.weight(9, HEADS), b.constant(np.arange(16) % 9), axis=0)
    table = b.add("Transpose", b.add("Reshape", table, b.ints(4, 4, -1)), perm=[2, 0, 1])
    scores = b.add("Add", scores, b.add("Unsqueeze", table, b.ints(0)))
    five = b.add("Reshape", scores, b.ints(-1, 4, HEADS, 4, 4))
    five = b.add("Add", five, b.weight(1, 4, 1, 4, 4))  # the mask between rolled edges
    y = b.join(b.mix(b.add("Reshape", five, b.ints(-1, HEADS, 4, 4)), v))
    y = b.add("Reshape", y, b.ints(-1, 2, 2, 2, 2, WIDTH))
    y = b.add("Transpose", y, perm=[0, 1, 3, 2, 4, 5])
    y = b.add("Reshape", y, b.ints(-1, 4, 4, WIDTH))
    for axis in (1, 2):
        y = b.add("Concat", b.at(y, 3, 4, axis), b.at(y, 0, 3, axis), axis=axis)
    return b.add("Reshape", y, b.ints(-1, 16, WIDTH))


def flat_tokens(b: Net) -> str:
    """Batch and length as one axis for Gemm, apart again for the heads (GPT-2)."""
    flat = b.add("Reshape", "x", b.ints(-1, WIDTH))
    flat = b.add("Gemm", flat, b.weight(WIDTH, 3 * INNER), b.weight(3 * INNER))
    shape = b.add("Shape", "x")
    packed = b.add("Reshape", flat, b.add("Concat", b.at(shape, 0, 2, 0), b.ints(-1), axis=0))
    pieces = b.add("Split", packed, b.ints(INNER, INNER, INNER), outputs=3, axis=-1)
    return b.attend(*(b.split_heads(piece) for piece in pieces))


def convolved(b: Net) -> str:
    """Queries, keys and values of one convolution, [batch, heads, all, pixels] (YOLO)."""
    size = SIZE // 2
    image = b.add("Unsqueeze", b.add("Transpose", "x", perm=[0, 2, 1]), b.ints(3))
    packed = b.conv(image, WIDTH, HEADS * (2 * size + SIZE), 1)
    four = b.add("Reshape", packed, b.ints(0, HEADS, 2 * size + SIZE, LENGTH))
    q, k, v = b.add("Split", four, b.ints(size, size, SIZE), outputs=3, axis=2)
    scores = b.add("MatMul", b.add("Transpose", q, perm=[0, 1, 3, 2]), k)
    weights = b.add("Softmax", b.add("Mul", scores, b.scalar(size**-0.5)), axis=-1)
    mixed = b.add("MatMul", v, b.add("Transpose", weights, perm=[0, 1, 3, 2]))
    mixed = b.add("Reshape", mixed, b.ints(0, INNER, LENGTH, 1))
    place = b.add("Reshape", v, b.ints(0, INNER, LENGTH, 1))
    place = b.conv(place, INNER, INNER, 3, group=INNER)
    y = b.conv(b.add("Add", mixed, place), INNER, WIDTH, 1)
    return b.add("Transpose", b.add("Squeeze", y, b.ints(3)), perm=[0, 2, 1])


FORMS: dict[str, Form] = {
    form.__name__: form
    for form in (
        separate, split, chunk, stacked_gather, stacked_slice, stacked_split, heads_then_three,
        heads_three_gather, scaled_before, scaled_by_shape, added_mask, chosen_mask,
        mask_per_head, relative_table, relative_buckets, rotate_half, rotate_pairs,
        rotate_strided, cross, einsum, heads_in_batch, normalised_queries,
        cosine_scores, shapes_at_run_time, class_tokens, windows, flat_tokens, convolved,
    )
}  # fmt: skip


def net(form: Form) -> onnx.ModelProto:
    """The form as a whole model, batch free."""
    b = Net(opset=17 if form is normalised_queries else 15)
    y = form(b)
    ends = [{name: ["n", n, WIDTH]} for name, n in zip(("x", y), b.lengths, strict=True)]
    return b.model(*(end | more for end, more in zip(ends, b.more, strict=True)))
