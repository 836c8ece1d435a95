"""Networks as exporters other than PyTorch's write them: half of the work leaves, and is proved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import Builder
from onnx import TensorProto, helper

from graphprune.api import prune

Form = Callable[[], onnx.ModelProto]
FORMS: dict[str, Form] = {}


def form(make: Form) -> Form:
    FORMS[make.__name__] = make
    return make


class Net(Builder):
    """A builder with what several exporters have in common."""

    def floats(self, *shape: int) -> np.ndarray:
        scale = 1 / np.sqrt(max(1, np.prod(shape[1:])))
        return (self.rng.standard_normal(shape) * scale).astype(np.float32)

    def shape_of(self, x: str, *axes: int) -> list[str]:
        """One-element lists of 32-bit integers, cut from the shape as TensorFlow does."""
        shape = self.add("Cast", self.add("Shape", x), to=TensorProto.INT32)
        return [
            self.add("Slice", shape, self.ints(a), self.ints(a + 1), self.ints(0)) for a in axes
        ]

    def reshape_to(self, x: str, *sizes: str | int) -> str:
        """Sizes computed in 32 bits, as TensorFlow's are."""
        parts = [s if isinstance(s, str) else self.constant(np.int32([s])) for s in sizes]
        joined = self.add("Concat", *parts, axis=0)
        return str(self.add("Reshape", x, self.add("Cast", joined, to=TensorProto.INT64)))

    def same(self, x: str, c_in: int, c_out: int, kernel: int = 3, **more: Any) -> str:
        weight = self.weight(c_out, c_in // more.get("group", 1), kernel, kernel)
        return str(self.add("Conv", x, weight, self.weight(c_out), auto_pad="SAME_UPPER", **more))


# --- tf2onnx and keras2onnx


@form
def channels_last_ends() -> onnx.ModelProto:
    """Transposes at both ends, a scale and an offset for each channel, spatial means, a softmax."""
    b = Net(opset=13)
    x = b.add("Transpose", "x", perm=[0, 3, 1, 2])
    x = b.same(x, 3, 16, strides=[2, 2])
    x = b.add("Mul", x, b.constant(b.floats(1, 16, 1, 1)))
    x = b.add(
        "Clip",
        b.add("Add", x, b.constant(b.floats(1, 16, 1, 1))),
        b.constant(np.float32(0)),
        b.constant(np.float32(6)),
    )
    x = b.add("Relu", b.same(x, 16, 16))
    x = b.add("Transpose", x, perm=[0, 2, 3, 1])
    x = b.add("ReduceMean", x, axes=[1, 2], keepdims=0)
    y = b.add("Softmax", b.add("Add", b.add("MatMul", x, b.weight(16, 5)), b.weight(5)))
    return b.model({"x": ["n", 16, 16, 3]}, {y: ["n", 5]})


@form
def channels_last_between() -> onnx.ModelProto:
    """Every convolution between two Transposes; bias and activation on channels that come last."""
    b = Net(opset=11)
    x, c = "x", 3
    for out in (12, 20, 6):
        x = b.add("Transpose", x, perm=[0, 3, 1, 2])
        x = b.add("Conv", x, b.weight(out, c, 3, 3), pads=[0, 0, 1, 1])
        x = b.add("Transpose", x, perm=[0, 2, 3, 1])
        x = b.add("Relu", b.add("Add", x, b.weight(out)))
        c = out
    return b.model({"x": [1, 9, 9, 3]}, {x: [1, 6, 6, 6]})


@form
def depthwise_weights_reshaped() -> onnx.ModelProto:
    """A separable convolution whose weights [h, w, in, multiplier] are turned at run time."""
    b = Net(opset=12)
    x = b.add("Relu", b.same("x", 3, 12))
    weight = b.add("Transpose", b.constant(b.floats(3, 3, 12, 1)), perm=[3, 2, 0, 1])
    weight = b.add("Reshape", weight, b.ints(12, 1, 3, 3))
    x = b.add("Conv", x, weight, group=12, pads=[1, 1, 1, 1])
    point = b.add("Transpose", b.constant(b.floats(1, 1, 12, 20)), perm=[3, 2, 0, 1])
    x = b.add("Relu", b.add("Conv", x, point))
    y = b.same(x, 20, 4, 1)
    return b.model({"x": [1, 3, 8, 8]}, {y: [1, 4, 8, 8]})


@form
def flattened_by_its_shape() -> onnx.ModelProto:
    """[batch, -1], the batch read from the shape, behind a Transpose to channels last."""
    b = Net(opset=11)
    x = b.add("MaxPool", b.add("Relu", b.same("x", 3, 16)), kernel_shape=[2, 2], strides=[2, 2])
    x = b.add("Transpose", x, perm=[0, 2, 3, 1])
    x = b.reshape_to(x, *b.shape_of(x, 0), 4 * 4 * 16)
    x = b.add("Relu", b.add("Add", b.add("MatMul", x, b.weight(256, 24)), b.weight(24)))
    y = b.add("MatMul", x, b.weight(24, 5))
    return b.model({"x": ["n", 3, 8, 8]}, {y: ["n", 5]})


@form
def resized_by_its_shape() -> onnx.ModelProto:
    """Sizes for Resize from another branch's shape, in 32 bits and back."""
    b = Net(opset=11)
    high = b.add("Relu", b.same("x", 3, 12))
    low = b.add("Relu", b.same(high, 12, 12, strides=[2, 2]))
    sides = b.shape_of(high, 2, 3)
    start = b.add("Slice", b.add("Shape", low), b.ints(0), b.ints(2), b.ints(0))
    sizes = b.add(
        "Concat",
        start,
        b.add("Cast", b.add("Concat", *sides, axis=0), to=TensorProto.INT64),
        axis=0,
    )
    none = b.constant(np.zeros(0, np.float32))
    up = b.add("Resize", low, none, none, sizes, mode="nearest", nearest_mode="floor")
    y = b.same(b.add("Concat", up, high, axis=1), 24, 4)
    return b.model({"x": ["n", 3, "h", "w"]}, {y: ["n", 4, "h", "w"]})


@form
def transposed_and_cropped() -> onnx.ModelProto:
    """A transposed convolution, cut to the size that it was asked for."""
    b = Net(opset=13)
    x = b.add("Relu", b.same("x", 3, 16, strides=[2, 2]))
    x = b.add("ConvTranspose", x, b.weight(16, 12, 3, 3), strides=[2, 2])
    height, width = b.shape_of("x", 2, 3)
    ends = b.add("Cast", b.add("Concat", height, width, axis=0), to=TensorProto.INT64)
    x = b.add("Slice", x, b.ints(0, 0), ends, b.ints(2, 3))
    x = b.add("Relu", b.add("Add", x, b.constant(b.floats(1, 12, 1, 1))))
    y = b.same(x, 12, 4)
    return b.model({"x": ["n", 3, 8, 8]}, {y: ["n", 4, 8, 8]})


@form
def dilated_by_batches() -> onnx.ModelProto:
    """SpaceToBatch: rows and columns are folded into the batch around a convolution."""
    b = Net(opset=13)
    x = b.add("Relu", b.same("x", 3, 12))
    x = b.add("Transpose", b.add("Pad", x, b.ints(0, 0, 2, 2, 0, 0, 2, 2)), perm=[1, 0, 2, 3])
    x = b.add("Reshape", x, b.ints(12, 1, 6, 2, 6, 2))
    x = b.add("Reshape", b.add("Transpose", x, perm=[3, 5, 1, 0, 2, 4]), b.ints(4, 12, 6, 6))
    x = b.add("Conv", x, b.weight(20, 12, 3, 3))
    x = b.add("Reshape", x, b.ints(2, 2, 1, 20, 4, 4))
    x = b.add("Reshape", b.add("Transpose", x, perm=[2, 3, 4, 0, 5, 1]), b.ints(1, 20, 8, 8))
    y = b.same(b.add("Relu", x), 20, 4)
    return b.model({"x": [1, 3, 8, 8]}, {y: [1, 4, 8, 8]})


@form
def moments_and_scale() -> onnx.ModelProto:
    """Normalisation over positions by its parts, as Keras writes an instance's."""
    b = Net(opset=12)
    x = b.add("Transpose", b.same("x", 3, 16), perm=[0, 2, 3, 1])
    mean = b.add("ReduceMean", x, axes=[1, 2], keepdims=1)
    difference = b.add("Sub", x, mean)
    variance = b.add("ReduceMean", b.add("Mul", difference, difference), axes=[1, 2], keepdims=1)
    inverse = b.add(
        "Reciprocal", b.add("Sqrt", b.add("Add", variance, b.constant(np.float32(1e-3))))
    )
    factor = b.add("Mul", inverse, b.weight(16))
    shift = b.add("Sub", b.weight(16), b.add("Mul", mean, factor))
    x = b.add("Relu", b.add("Add", b.add("Mul", x, factor), shift))
    y = b.same(b.add("Transpose", x, perm=[0, 3, 1, 2]), 16, 4)
    return b.model({"x": [1, 3, 8, 8]}, {y: [1, 4, 8, 8]})


@form
def tokens_in_rows() -> onnx.ModelProto:
    """BERT as TensorFlow has it: tokens are rows of a matrix, heads come and go by Reshape."""
    b = Net(opset=13)
    width, heads, size = 12, 8, 6
    batch, length = b.shape_of("x", 0, 1)
    rows = b.reshape_to("x", -1, width)

    def project() -> str:
        made = b.add(
            "Add", b.add("MatMul", rows, b.weight(width, heads * size)), b.weight(heads * size)
        )
        return str(
            b.add("Transpose", b.reshape_to(made, batch, length, heads, size), perm=[0, 2, 1, 3])
        )

    q, k, v = project(), project(), project()
    scores = b.add("MatMul", q, b.add("Transpose", k, perm=[0, 1, 3, 2]))
    scores = b.add("Mul", scores, b.constant(np.float32(size**-0.5)))
    mixed = b.add("Transpose", b.add("MatMul", b.add("Softmax", scores), v), perm=[0, 2, 1, 3])
    flat = b.reshape_to(mixed, -1, heads * size)
    y = b.add("Add", b.add("MatMul", flat, b.weight(heads * size, width)), b.weight(width))
    y = b.reshape_to(b.add("Add", y, rows), batch, length, width)
    return b.model({"x": ["n", 5, width]}, {y: ["n", 5, width]})


@form
def every_step_alike() -> onnx.ModelProto:
    """TimeDistributed: steps join the batch and leave it again; then a recurrent layer."""
    b = Net(opset=11)
    batch, steps = b.shape_of("x", 0, 1)
    x = b.reshape_to("x", -1, 1, 8, 8)
    x = b.add("MaxPool", b.add("Relu", b.same(x, 1, 12)), kernel_shape=[2, 2], strides=[2, 2])
    x = b.reshape_to(x, -1, 12 * 16)
    x = b.add("Relu", b.add("Gemm", x, b.weight(192, 20), b.weight(20)))
    x = b.add("Transpose", b.reshape_to(x, batch, steps, 20), perm=[1, 0, 2])
    _, last = b.add(
        "GRU",
        x,
        b.weight(1, 36, 20),
        b.weight(1, 36, 12),
        b.weight(1, 72),
        outputs=2,
        hidden_size=12,
        linear_before_reset=1,
    )
    y = b.add("MatMul", b.add("Squeeze", last, axes=[0]), b.weight(12, 5))
    return b.model({"x": ["n", 3, 8, 8]}, {y: ["n", 5]})


@form
def text_by_convolution() -> onnx.ModelProto:
    """Embedding, a one-dimensional convolution as a flat two-dimensional one, the largest of all
    steps, and squeeze and excite by Reshape."""
    b = Net(opset=12)
    x = b.add("Transpose", b.add("Unsqueeze", "x", axes=[1]), perm=[0, 3, 1, 2])
    x = b.add("Conv", x, b.weight(16, 6, 1, 3), pads=[0, 1, 0, 1])
    x = b.add("Squeeze", b.add("Transpose", x, perm=[0, 2, 3, 1]), axes=[1])
    x = b.add("Relu", b.add("Add", x, b.weight(16)))
    s = b.reshape_to(b.add("ReduceMean", x, axes=[1], keepdims=0), *b.shape_of(x, 0), 1, 16)
    s = b.add("Relu", b.add("MatMul", s, b.weight(16, 6)))
    x = b.add("Mul", x, b.add("Sigmoid", b.add("MatMul", s, b.weight(6, 16))))
    negative = b.add("Neg", b.add("Relu", b.add("Neg", x)))
    x = b.add("Add", b.add("Relu", x), b.add("Mul", negative, b.weight(16)))
    y = b.add("MatMul", b.add("ReduceMax", x, axes=[1], keepdims=0), b.weight(16, 5))
    return b.model({"x": ["n", 10, 6]}, {y: ["n", 5]})


@form
def groups_by_split() -> onnx.ModelProto:
    """A grouped convolution as pieces, each with its own; then a shuffle on channels that come
    last, and pixels out of channels."""
    b = Net(opset=11)
    x = b.add("Relu", b.conv("x", 3, 16))
    pieces = b.add("Split", x, outputs=4, axis=1)
    x = b.add("Concat", *(b.conv(piece, 4, 8) for piece in pieces), axis=1)
    x = b.add("Transpose", b.add("Relu", x), perm=[0, 2, 3, 1])
    x = b.add("Reshape", x, b.ints(-1, 8, 8, 4, 8))
    x = b.add("Reshape", b.add("Transpose", x, perm=[0, 1, 2, 4, 3]), b.ints(-1, 8, 8, 32))
    x = b.conv(b.add("Transpose", x, perm=[0, 3, 1, 2]), 32, 16)
    x = b.add("Transpose", b.add("DepthToSpace", x, blocksize=2), perm=[0, 2, 3, 1])
    x = b.add("Transpose", b.add("Tanh", x), perm=[0, 3, 1, 2])
    y = b.conv(x, 4, 3)
    return b.model({"x": [1, 3, 8, 8]}, {y: [1, 3, 16, 16]})


@form
def normalised_features() -> onnx.ModelProto:
    """Weights behind a Transpose, features over their length, distances to some centres."""
    b = Net(opset=13)
    h = b.add("Relu", b.add("MatMul", "x", b.add("Transpose", b.weight(24, 8), perm=[1, 0])))
    h = b.add("Relu", b.add("Gemm", h, b.weight(24, 16), b.weight(16)))
    square = b.add("ReduceSum", b.add("Mul", h, h), b.ints(1), keepdims=1)
    h = b.add(
        "Mul",
        h,
        b.add("Reciprocal", b.add("Sqrt", b.add("Max", square, b.constant(np.float32(1e-12))))),
    )
    difference = b.add("Sub", b.add("Unsqueeze", h, b.ints(1)), b.constant(b.floats(1, 5, 16)))
    y = b.add("Neg", b.add("ReduceSumSquare", difference, axes=[2], keepdims=0))
    return b.model({"x": ["n", 8]}, {y: ["n", 5]})


# --- Paddle


@form
def hard_swish_by_its_parts() -> onnx.ModelProto:
    """x * clip(x + 3, 0, 6) / 6, squeeze and excite with a hard sigmoid."""
    b = Net(opset=11)

    def swish(x: str) -> str:
        clipped = b.add(
            "Clip",
            b.add("Add", x, b.constant(np.float32([3]))),
            b.constant(np.float32(0)),
            b.constant(np.float32(6)),
        )
        return str(b.add("Div", b.add("Mul", x, clipped), b.constant(np.float32([6]))))

    x = swish(b.norm(b.conv("x", 3, 16), 16))
    s = b.add("Relu", b.conv(b.add("GlobalAveragePool", x), 16, 8, 1))
    x = b.add("Mul", x, b.add("HardSigmoid", b.conv(s, 8, 16, 1), alpha=0.2, beta=0.5))
    x = swish(b.norm(b.conv(x, 16, 24, 5), 24))
    y = b.conv(x, 24, 4, 1)
    return b.model({"x": ["n", 3, 8, 8]}, {y: ["n", 4, 8, 8]})


@form
def pyramid_of_nearest_neighbours() -> onnx.ModelProto:
    """A feature pyramid: scales as constants, sums from the top down, all levels joined."""
    b = Net(opset=11)
    levels, c, x = [], 3, "x"
    for out in (8, 12, 16):
        x = b.add("Relu", b.add("Conv", x, b.weight(out, c, 3, 3), strides=[2, 2], pads=[1] * 4))
        levels.append(b.conv(x, out, 16, 1))
        c = out
    none = b.constant(np.zeros(0, np.float32))

    def up(t: str, times: int) -> str:
        scales = b.constant(np.float32([1, 1, times, times]))
        return str(
            b.add(
                "Resize",
                t,
                none,
                scales,
                mode="nearest",
                coordinate_transformation_mode="asymmetric",
                nearest_mode="floor",
            )
        )

    middle = b.add("Add", levels[1], up(levels[2], 2))
    low = b.add("Add", levels[0], up(middle, 2))
    parts = [up(b.conv(t, 16, 4), n) for t, n in ((levels[2], 4), (middle, 2), (low, 1))]
    x = b.add("Relu", b.norm(b.conv(b.add("Concat", *parts, axis=1), 12, 12), 12))
    x = b.add("Relu", b.add("ConvTranspose", x, b.weight(12, 8, 2, 2), b.weight(8), strides=[2, 2]))
    y = b.add(
        "Sigmoid", b.add("ConvTranspose", x, b.weight(8, 1, 2, 2), b.weight(1), strides=[2, 2])
    )
    return b.model({"x": [1, 3, 16, 16]}, {y: [1, 1, 32, 32]})


@form
def mixing_of_five_axes() -> onnx.ModelProto:
    """SVTR: queries, keys and values from one product, [0, -1, 3, heads, size], cut by Slice."""
    b = Net(opset=11)
    heads, size, width = 8, 6, 12
    x = b.add(
        "Transpose", b.add("Reshape", b.conv("x", 3, width), b.ints(0, width, 12)), perm=[0, 2, 1]
    )
    made = b.add(
        "Add", b.add("MatMul", x, b.weight(width, 3 * heads * size)), b.weight(3 * heads * size)
    )
    made = b.add(
        "Transpose", b.add("Reshape", made, b.ints(0, -1, 3, heads, size)), perm=[2, 0, 3, 1, 4]
    )
    q, k, v = (
        b.add("Squeeze", b.add("Slice", made, b.ints(i), b.ints(i + 1), b.ints(0)), axes=[0])
        for i in range(3)
    )
    q = b.add("Mul", q, b.constant(np.float32([size**-0.5])))
    scores = b.add("Softmax", b.add("MatMul", q, b.add("Transpose", k, perm=[0, 1, 3, 2])), axis=-1)
    mixed = b.add("Transpose", b.add("MatMul", scores, v), perm=[0, 2, 1, 3])
    x = b.add(
        "Add",
        x,
        b.add(
            "MatMul",
            b.add("Reshape", mixed, b.ints(0, -1, heads * size)),
            b.weight(heads * size, width),
        ),
    )
    y = b.add("MatMul", x, b.weight(width, 5))
    return b.model({"x": [1, 3, 2, 6]}, {y: [1, 12, 5]})


# --- older frameworks and opsets


@form
def weights_among_the_inputs() -> onnx.ModelProto:
    """Caffe2 and early MXNet: every initialiser is an input too; nothing else is said."""
    b = Net(opset=8)
    x = b.add("Relu", b.norm(b.conv("x", 3, 16), 16))
    x = b.add("AveragePool", b.add("Relu", b.conv(x, 16, 16)), kernel_shape=[2, 2], strides=[2, 2])
    x = b.add("Reshape", x, b.ints(1, 256))
    y = b.add("Softmax", b.add("Gemm", x, b.weight(5, 256), b.weight(5), transB=1))
    model = b.model({"x": [1, 3, 8, 8]}, {y: [1, 5]}, ir_version=4)
    model.ir_version = 3
    for t in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(t.name, t.data_type, t.dims))
    return model


@form
def weights_of_many_axes() -> onnx.ModelProto:
    """CNTK: a matrix of [channels, height, width, out], reshaped to meet the flat features."""
    b = Net(opset=8)
    x = b.add("Conv", "x", b.weight(16, 3, 5, 5), auto_pad="SAME_UPPER", dilations=[1, 1])
    x = b.add("Relu", b.add("Add", x, b.constant(b.floats(16, 1, 1))))
    x = b.add(
        "Conv",
        b.add("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2]),
        b.weight(20, 16, 3, 3),
        auto_pad="SAME_UPPER",
    )
    x = b.add("Reshape", b.add("Relu", x), b.ints(1, 320))
    w = b.add("Reshape", b.constant(b.floats(20, 4, 4, 5)), b.ints(320, 5))
    y = b.add("Add", b.add("MatMul", x, w), b.constant(b.floats(1, 5)))
    return b.model({"x": [1, 3, 8, 8]}, {y: [1, 5]})


@form
def faces() -> onnx.ModelProto:
    """MXNet: PRelu with [C, 1, 1], a first scaling of the pixels, BatchNormalization at the end."""
    b = Net(opset=8)
    x = b.add(
        "Mul", b.add("Sub", "x", b.constant(np.float32(127.5))), b.constant(np.float32(0.0078125))
    )
    x = b.norm(b.conv(x, 3, 16), 16)
    x = b.add("PRelu", x, b.constant(b.floats(16, 1, 1)))
    inner = b.add(
        "PRelu", b.norm(b.conv(b.norm(x, 16), 16, 24), 24), b.constant(b.floats(24, 1, 1))
    )
    x = b.add("Add", x, b.norm(b.conv(inner, 24, 16), 16))
    x = b.add("Dropout", b.norm(x, 16))
    x = b.add("Gemm", b.add("Flatten", x), b.weight(6, 16 * 64), b.weight(6), transB=1)
    y = b.norm(x, 6)
    return b.model({"x": [1, 3, 8, 8]}, {y: [1, 6]})


@form
def upsampled_in_opset_7() -> onnx.ModelProto:
    """Scales and pads in attributes, equal pieces by Split, an outer axis by Unsqueeze."""
    b = Net(opset=7)
    x = b.add("LeakyRelu", b.norm(b.conv("x", 3, 16), 16), alpha=0.1)
    first, second = b.add("Split", x, outputs=2, axis=1)
    x = b.add("Max", b.conv(first, 8, 12), b.conv(second, 8, 12))
    x = b.add(
        "Upsample",
        b.add("Pad", x, pads=[0, 0, 1, 1, 0, 0, 1, 1]),
        mode="nearest",
        scales=[1.0, 1.0, 2.0, 2.0],
    )
    y = b.add("Conv", x, b.weight(4, 12, 3, 3))
    return b.model({"x": [1, 3, 8, 8]}, {y: [1, 4, 18, 18]})


@form
def scales_as_nodes() -> onnx.ModelProto:
    """CoreML: scale and bias of [C, 1, 1] behind a convolution, explicit pads, a flat product."""
    b = Net(opset=10)
    x = b.add("Conv", b.add("Pad", "x", pads=[0, 0, 1, 1, 0, 0, 1, 1]), b.weight(16, 3, 3, 3))
    x = b.add(
        "Add", b.add("Mul", x, b.constant(b.floats(16, 1, 1))), b.constant(b.floats(16, 1, 1))
    )
    x = b.add("Elu", x)
    x = b.add("ThresholdedRelu", b.conv(x, 16, 12), alpha=0.1)
    x = b.add("Flatten", b.add("ReduceSum", x, axes=[2, 3], keepdims=1))
    y = b.add("Add", b.add("MatMul", x, b.weight(12, 5)), b.weight(5))
    return b.model({"x": [1, 3, 8, 8]}, {y: [1, 5]})


# --- detection


@form
def anchors() -> onnx.ModelProto:
    """YOLO: every second row and column joined, anchors beside the classes, boxes by pieces."""
    b = Net(opset=13)

    def every(x: str, row: int, column: int) -> str:
        far = 2**31 - 1
        x = b.add("Slice", x, b.ints(row), b.ints(far), b.ints(2), b.ints(2))
        return str(b.add("Slice", x, b.ints(column), b.ints(far), b.ints(3), b.ints(2)))

    x = b.add("Concat", *(every("x", r, c) for c in (0, 1) for r in (0, 1)), axis=1)
    x = b.conv(x, 12, 16)
    x = b.add("Mul", x, b.add("Sigmoid", x))
    pools = [b.add("MaxPool", x, kernel_shape=[k, k], pads=[k // 2] * 4) for k in (3, 5)]
    x = b.add("Relu", b.conv(b.add("Concat", x, *pools, axis=1), 48, 16, 1))
    x = b.add("Reshape", b.conv(x, 16, 21, 1), b.ints(1, 3, 7, 4, 4))
    x = b.add("Sigmoid", b.add("Transpose", x, perm=[0, 1, 3, 4, 2]))
    place, size, rest = b.add("Split", x, b.ints(2, 2, 3), outputs=3, axis=4)
    place = b.add(
        "Mul", b.add("Add", place, b.constant(b.floats(1, 1, 4, 4, 2))), b.constant(np.float32(8))
    )
    size = b.add(
        "Mul",
        b.add("Pow", b.add("Mul", size, b.constant(np.float32(2))), b.constant(np.float32(2))),
        b.constant(b.floats(1, 3, 1, 1, 2)),
    )
    y = b.add("Reshape", b.add("Concat", place, size, rest, axis=4), b.ints(1, -1, 7))
    return b.model({"x": [1, 3, 8, 8]}, {y: [1, 48, 7]})


@form
def boxes_that_are_picked() -> onnx.ModelProto:
    """SSD: two levels of boxes and scores, then the best by NonMaxSuppression."""
    b = Net(opset=11)
    x = b.add("Relu", b.conv("x", 3, 16))
    low = b.add("Relu", b.add("Conv", x, b.weight(20, 16, 3, 3), strides=[2, 2], pads=[1] * 4))
    boxes, scores = [], []
    for t, c in ((x, 16), (low, 20)):
        for into, each in ((boxes, 4), (scores, 3)):
            made = b.add("Transpose", b.conv(t, c, 2 * each), perm=[0, 2, 3, 1])
            into.append(b.add("Reshape", made, b.ints(1, -1, each)))
    boxes, scores = b.add("Concat", *boxes, axis=1), b.add("Concat", *scores, axis=1)
    scores = b.add("Transpose", b.add("Softmax", scores, axis=2), perm=[0, 2, 1])
    limits = b.ints(5), b.constant(np.float32([0.5])), b.constant(np.float32([0.1]))
    found = b.add("NonMaxSuppression", boxes, scores, *limits)
    at = b.add("Squeeze", b.add("Slice", found, b.ints(2), b.ints(3), b.ints(1)), axes=[1])
    y = b.add("Gather", b.add("Squeeze", boxes, axes=[0]), at, axis=0)
    return b.model({"x": [1, 3, 8, 8]}, {y: ["k", 4], scores: [1, 3, 160]})


def perceptron(zipped: bool) -> onnx.ModelProto:
    """scikit-learn's MLPClassifier behind a scaler: classes by ArgMax, a map of probabilities."""
    b = Net(opset=13)
    ml = "ai.onnx.ml"
    x = b.add("Scaler", "x", domain=ml, offset=[0.5] * 8, scale=[2.0] * 8)
    x = b.add(
        "Relu",
        b.add("Add", b.add("MatMul", b.add("Cast", x, to=1), b.weight(8, 24)), b.weight(1, 24)),
    )
    x = b.add("Relu", b.add("Add", b.add("MatMul", x, b.weight(24, 16)), b.weight(1, 16)))
    scores = b.add("Softmax", b.add("Add", b.add("MatMul", x, b.weight(16, 3)), b.weight(1, 3)))
    best = b.add("ArgMax", scores, axis=1)
    label = b.add("ArrayFeatureExtractor", b.ints(0, 1, 2), best, domain=ml)
    label = b.add("Cast", b.add("Reshape", label, b.ints(-1)), to=TensorProto.INT64)
    norm = b.add("Normalizer", scores, domain=ml, norm="L1")
    tensor = helper.make_tensor_value_info
    ends = [tensor(label, TensorProto.INT64, ["n"]), tensor(norm, TensorProto.FLOAT, ["n", 3])]
    if zipped:
        made = b.add("ZipMap", norm, domain=ml, classlabels_int64s=[0, 1, 2])
        kind = helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(1, []))
        ends[1] = helper.make_value_info(made, helper.make_sequence_type_proto(kind))
    start = tensor("x", TensorProto.FLOAT, ["n", 8])
    graph = helper.make_graph(b.nodes, "g", [start], ends, b.initializers)
    opsets = [helper.make_opsetid("", 13), helper.make_opsetid(ml, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


FORMS["perceptron"] = lambda: perceptron(zipped=False)
FORMS["perceptron with a map"] = lambda: perceptron(zipped=True)


@pytest.mark.parametrize("name", FORMS)
def test_half_of_the_work_leaves(name: str) -> None:
    result = prune(FORMS[name](), flops=0.5, round_to=1, min_channels=1, fast=True, measure=False)
    assert result.verdict.passed
    assert result.after.macs <= 0.5 * result.before.macs


def test_a_map_by_default_options() -> None:
    """What measures outputs takes maps for what they hold."""
    result = prune(perceptron(zipped=True), flops=0.5, samples=16, rounds=3, cache=False)
    assert result.verdict.passed
    assert result.verdict.output_difference is not None
    assert 0 < result.verdict.output_difference < 1


def test_a_sequence_by_default_options() -> None:
    """All levels of a detector as one sequence."""
    b = Net(opset=13)
    x = b.add("Relu", b.conv("x", 3, 16))
    low = b.add("Relu", b.add("Conv", x, b.weight(16, 16, 3, 3), strides=[2, 2]))
    y = b.add("SequenceConstruct", b.conv(x, 16, 4), b.conv(low, 16, 4))
    kind = helper.make_tensor_type_proto(TensorProto.FLOAT, None)
    end = helper.make_value_info(y, helper.make_sequence_type_proto(kind))
    start = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])
    graph = helper.make_graph(b.nodes, "g", [start], [end], b.initializers)
    opsets = [helper.make_opsetid("", 13)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    result = prune(model, flops=0.5, samples=16, rounds=3, cache=False)
    assert result.verdict.passed
    assert result.after.macs <= 0.5 * result.before.macs
