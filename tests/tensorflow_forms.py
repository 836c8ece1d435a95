"""Networks as tf2onnx and keras2onnx write them."""

from __future__ import annotations

import numpy as np
import onnx
from exporter_nets import Net, form
from onnx import TensorProto


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
