"""Networks of residual blocks in many forms, with the branches that are to be found in them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from graphs import Builder

WIDTH, HEADS, LENGTH, INNER = 8, 2, 5, 12
Form = tuple[onnx.ModelProto, list[str]]  # a model, and the kinds of its blocks in order


def linear(b: Builder, x: str, c_in: int, c_out: int) -> str:
    return str(b.add("Add", b.add("MatMul", x, b.weight(c_in, c_out)), b.weight(c_out)))


def normed(b: Builder, x: str) -> str:
    scale = b.constant((b.rng.random(WIDTH) + 0.5).astype(np.float32))
    return str(b.add("LayerNormalization", x, scale, b.weight(WIDTH)))


def heads(b: Builder, x: str) -> str:
    split = b.add("Reshape", x, b.ints(0, -1, HEADS, WIDTH // HEADS))
    return str(b.add("Transpose", split, perm=[0, 2, 1, 3]))


def attend(b: Builder, x: str, other: str = "", mask: str = "") -> str:
    """Attention of ``x`` to ``other``, to itself where there is none."""
    q, k, v = (heads(b, linear(b, t, WIDTH, WIDTH)) for t in (x, other or x, other or x))
    scores = b.add("MatMul", q, b.add("Transpose", k, perm=[0, 1, 3, 2]))
    if mask:
        scores = b.add("Add", scores, mask)
    mixed = b.add("MatMul", b.add("Softmax", scores), v)
    joined = b.add("Reshape", b.add("Transpose", mixed, perm=[0, 2, 1, 3]), b.ints(0, -1, WIDTH))
    return linear(b, joined, WIDTH, WIDTH)


def feed_forward(b: Builder, x: str) -> str:
    """With an activation that is itself x + 0.04 x³ inside."""
    h = linear(b, x, WIDTH, INNER)
    cubed = b.add("Mul", b.add("Mul", h, b.add("Mul", h, h)), b.constant(np.float32(0.04)))
    h = b.add("Mul", h, b.add("Tanh", b.add("Add", h, cubed)))
    return linear(b, h, INNER, WIDTH)


def finished(b: Builder, x: str) -> onnx.ModelProto:
    y = b.add("MatMul", x, b.weight(WIDTH, 3))
    return b.model({"x": ["n", LENGTH, WIDTH]}, {y: ["n", LENGTH, 3]})


def pre_norm(seed: int = 0, layers: int = 2) -> Form:
    b = Builder(seed)
    x = linear(b, "x", WIDTH, WIDTH)
    for _ in range(layers):
        x = b.add("Add", x, attend(b, normed(b, x)))
        x = b.add("Add", feed_forward(b, normed(b, x)), x)
    return finished(b, normed(b, x)), ["attention", "mlp"] * layers


def post_norm() -> Form:
    b = Builder()
    x = normed(b, "x")
    for _ in range(2):
        x = normed(b, b.add("Add", attend(b, x), x))
        x = normed(b, b.add("Add", feed_forward(b, x), x))
    return finished(b, x), ["attention", "mlp"] * 2


def masked() -> Form:
    """A mask from the sizes of the first block's own input, which comes in from the side."""
    b = Builder()
    x = linear(b, "x", WIDTH, WIDTH)
    size = b.add("Slice", b.add("Shape", x), b.ints(1), b.ints(2))
    count = b.add("Concat", size, size, axis=0)
    mask = b.add("Trilu", b.add("Expand", b.constant(np.float32(-1e4)), count), b.constant(1))
    for _ in range(2):
        x = b.add("Add", x, attend(b, normed(b, x), mask=mask))
    return finished(b, x), ["attention"] * 2


def crossed() -> Form:
    """A decoder's attention to states that the encoder computed from the same input."""
    b = Builder()
    states = normed(b, linear(b, "x", WIDTH, WIDTH))
    x = linear(b, "x", WIDTH, WIDTH)
    for _ in range(2):
        x = b.add("Add", x, attend(b, normed(b, x), states))
        x = b.add("Add", x, feed_forward(b, normed(b, x)))
    return finished(b, x), ["attention", "mlp"] * 2


def parallel(inside: bool) -> Form:
    """x + A(h) + M(h) with one normalisation h, added up from either end."""
    b = Builder()
    x = linear(b, "x", WIDTH, WIDTH)
    for _ in range(2):
        h = normed(b, x)
        a, m = attend(b, h), feed_forward(b, h)
        x = b.add("Add", b.add("Add", a, m), x) if inside else b.add("Add", b.add("Add", x, a), m)
    return finished(b, x), ["attention", "mlp"] * 2


def summed() -> Form:
    """One Sum of three."""
    b = Builder()
    x = linear(b, "x", WIDTH, WIDTH)
    h = normed(b, x)
    return finished(b, b.add("Sum", attend(b, h), x, feed_forward(b, h))), ["attention", "mlp"]


def shared_work() -> Form:
    """Two paths from one hidden layer that serves them alone are one branch."""
    b = Builder()
    x = linear(b, "x", WIDTH, WIDTH)
    h = b.add("Relu", linear(b, x, WIDTH, INNER))
    both = b.add("Add", linear(b, h, INNER, WIDTH), linear(b, h, INNER, WIDTH))
    return finished(b, b.add("Add", x, both)), ["mlp"]


def scaled() -> Form:
    """Layer scale on the branch, and a shortcut through operators that hand their input on."""
    b = Builder()
    x = linear(b, "x", WIDTH, WIDTH)
    for kind in ("Identity", "Dropout"):
        branch = b.add("Mul", feed_forward(b, normed(b, x)), b.weight(WIDTH))
        x = b.add("Add", b.add("Dropout", branch), b.add(kind, x))
    return finished(b, x), ["mlp"] * 2


def cast() -> Form:
    """The branch at float64, cast on the way in and out; the shortcut is cast there and back."""
    b = Builder()
    x = linear(b, "x", WIDTH, WIDTH)
    there = b.add("Cast", x, to=onnx.TensorProto.DOUBLE)
    wide = b.add("MatMul", there, b.constant(b.rng.standard_normal((WIDTH, WIDTH)) / 3))
    x = b.add("Cast", b.add("Add", wide, there), to=onnx.TensorProto.FLOAT)
    return finished(b, x), ["mlp"]


def residual_cnn(opset: int = 17) -> Form:
    """A ResNet: identity shortcuts, and one that is a projection."""
    b = Builder(0, opset)
    x = b.add("Relu", b.norm(b.conv("x", 3, WIDTH), WIDTH))
    for _ in range(2):
        h = b.add("Relu", b.norm(b.conv(x, WIDTH, 6), 6))
        x = b.add("Relu", b.add("Add", b.norm(b.conv(h, 6, WIDTH), WIDTH), x))
    h = b.conv(b.add("Relu", b.conv(x, WIDTH, 6)), 6, INNER)
    x = b.add("Relu", b.add("Add", h, b.conv(x, WIDTH, INNER, 1)))
    h = b.conv(b.add("Relu", b.conv(x, INNER, 6)), 6, INNER)
    x = b.add("Relu", b.add("Add", x, h))
    pooled = b.add("Flatten", b.add("GlobalAveragePool", x))
    y = b.add("MatMul", pooled, b.weight(INNER, 3))
    return b.model({"x": ["n", 3, 6, 6]}, {y: ["n", 3]}), ["convolution"] * 3


def inverted() -> Form:
    """Depthwise, squeeze and excite, no activation after the sum."""
    b = Builder()
    x = b.conv("x", 3, WIDTH)
    for _ in range(2):
        h = b.add("Relu", b.conv(x, WIDTH, INNER, 1))
        h = b.conv(h, INNER, INNER, 3, group=INNER)
        s = b.add("GlobalAveragePool", h)
        s = b.conv(b.add("Relu", b.conv(s, INNER, 4, 1)), 4, INNER, 1)
        h = b.add("Mul", h, b.add("Sigmoid", s))
        x = b.add("Add", b.conv(h, INNER, WIDTH, 1), x)
    y = b.add("Conv", x, b.weight(2, WIDTH, 1, 1))
    return b.model({"x": [1, 3, 6, 6]}, {y: [1, 2, 6, 6]}), ["convolution"] * 2


def nested() -> Form:
    """Residual in residual."""
    b = Builder()
    start = x = b.conv("x", 3, WIDTH)
    for _ in range(2):
        x = b.add("Add", x, b.conv(b.add("Relu", b.conv(x, WIDTH, 6)), 6, WIDTH))
    x = b.add("Add", start, b.conv(x, WIDTH, WIDTH))
    y = b.add("Conv", x, b.weight(2, WIDTH, 1, 1))
    return b.model({"x": [1, 3, 6, 6]}, {y: [1, 2, 6, 6]}), ["convolution"] * 3


def at_the_ends() -> Form:
    """The first block starts at the graph's input, the last one ends as its output."""
    b = Builder()
    x = b.add("Add", "x", feed_forward(b, "x"))
    y = b.add("Add", x, feed_forward(b, normed(b, x)))
    ends = ["n", LENGTH, WIDTH]
    return b.model({"x": ends}, {y: ends}), ["mlp"] * 2


def kept_inside() -> Form:
    """Keys that are an output of the model stay, with all that they need."""
    b = Builder()
    x = linear(b, "x", WIDTH, WIDTH)
    h = normed(b, x)
    keys = linear(b, h, WIDTH, WIDTH)
    x = b.add("Add", x, attend(b, h, keys))
    y = b.add("MatMul", x, b.weight(WIDTH, 3))
    ends = {y: ["n", LENGTH, 3], keys: ["n", LENGTH, WIDTH]}
    return b.model({"x": ["n", LENGTH, WIDTH]}, ends), ["attention"]


def no_blocks() -> Form:
    """A sum of two projections, a sum that is broadcast, a branch that a later node reads too."""
    b = Builder()
    x = b.add("Add", linear(b, "x", WIDTH, WIDTH), linear(b, "x", WIDTH, WIDTH))
    mean = b.add("ReduceMean", feed_forward(b, x), axes=[1], keepdims=1)
    x = b.add("Add", x, mean)
    branch = linear(b, x, WIDTH, WIDTH)
    x = b.add("Mul", b.add("Add", x, branch), branch)
    return finished(b, x), []


FORMS: dict[str, Callable[[], Form]] = {
    "pre-norm": pre_norm,
    "post-norm": post_norm,
    "mask from the side": masked,
    "cross attention": crossed,
    "parallel, outwards": lambda: parallel(False),
    "parallel, inside first": lambda: parallel(True),
    "one Sum": summed,
    "shared work": shared_work,
    "layer scale": scaled,
    "cast": cast,
    "residual CNN": residual_cnn,
    "inverted residual": inverted,
    "nested": nested,
    "at the ends": at_the_ends,
    "kept inside": kept_inside,
    "none": no_blocks,
}
