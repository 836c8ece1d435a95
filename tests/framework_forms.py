"""Networks as Paddle, older frameworks and detectors' exporters write them."""

from __future__ import annotations

import numpy as np
import onnx
from exporter_nets import Net, form
from onnx import helper

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
