"""Mixtures of experts as exporters write them: 6 experts of 5 inner channels, width 8, 7 tokens."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from graphs import Builder

EXPERTS, INNER, WIDTH, TOKENS = 6, 5, 8, 7


def _router(b: Builder) -> str:
    """Logits [tokens, experts]."""
    return str(b.add("Gemm", "x", b.weight(EXPERTS, WIDTH), b.weight(EXPERTS), transB=1))


def _every_expert(b: Builder) -> str:
    """What all experts say: [experts, tokens, width]."""
    hidden = b.add("MatMul", b.add("Unsqueeze", "x", b.ints(0)), b.weight(EXPERTS, WIDTH, INNER))
    hidden = b.add("Relu", b.add("Add", hidden, b.weight(EXPERTS, 1, INNER)))
    return str(b.add("MatMul", hidden, b.weight(EXPERTS, INNER, WIDTH)))


def _weighed(b: Builder, gates: str) -> str:
    """The sum over experts; ``gates``: [tokens, experts]."""
    by_expert = b.add("Unsqueeze", b.add("Transpose", gates, perm=[1, 0]), b.ints(2))
    return str(b.add("ReduceSum", b.add("Mul", _every_expert(b), by_expert), b.ints(0), keepdims=0))


def _finished(b: Builder, y: str) -> onnx.ModelProto:
    return b.model({"x": [TOKENS, WIDTH]}, {y: [TOKENS, WIDTH]})


def dense() -> onnx.ModelProto:
    """Every expert answers, weighed by a Softmax."""
    b = Builder(1)
    return _finished(b, _weighed(b, b.add("Softmax", _router(b))))


def dense_einsum() -> onnx.ModelProto:
    b = Builder(2)
    gates = b.add("Softmax", _router(b))
    hidden = b.add("Einsum", "x", b.weight(EXPERTS, WIDTH, INNER), equation="td,edh->teh")
    said = b.add(
        "Einsum", b.add("Relu", hidden), b.weight(EXPERTS, INNER, WIDTH), equation="teh,ehd->ted"
    )
    return _finished(b, b.add("Einsum", said, gates, equation="ted,te->td"))


def dense_product() -> onnx.ModelProto:
    """The weighed sum as a product [tokens, 1, experts] x [tokens, experts, width]."""
    b = Builder(3)
    gates = b.add("Unsqueeze", b.add("Softmax", _router(b)), b.ints(1))
    said = b.add("Transpose", _every_expert(b), perm=[1, 0, 2])
    return _finished(b, b.add("Squeeze", b.add("MatMul", gates, said), b.ints(1)))


def _looked_up(b: Builder, weights: str, numbers: str, taken: int, by_nd: bool) -> onnx.ModelProto:
    """``taken`` experts for each token, their weights looked up; both [tokens, taken]."""

    def stacked(*shape: int) -> str:
        if by_nd:
            index = b.add("Unsqueeze", flat, b.ints(-1))
            return str(b.add("GatherND", b.weight(EXPERTS, *shape), index))
        return str(b.add("Gather", b.weight(EXPERTS, *shape), flat))

    flat = b.add("Reshape", numbers, b.ints(-1))
    wide = b.add("Expand", b.add("Unsqueeze", "x", b.ints(1)), b.ints(1, taken, 1))
    tokens = b.add("Reshape", wide, b.ints(TOKENS * taken, WIDTH, 1))
    hidden = b.add("Relu", b.add("MatMul", stacked(INNER, WIDTH), tokens))
    said = b.add("Squeeze", b.add("MatMul", stacked(WIDTH, INNER), hidden), b.ints(2))
    said = b.add("Mul", said, b.add("Reshape", weights, b.ints(-1, 1)))
    said = b.add("Reshape", said, b.ints(TOKENS, taken, WIDTH))
    return _finished(b, b.add("ReduceSum", said, b.ints(1), keepdims=0))


def top_two(by_nd: bool = False) -> onnx.ModelProto:
    """Two of a Softmax, made to sum to one again (Mixtral)."""
    b = Builder(4)
    values, numbers = b.add("TopK", b.add("Softmax", _router(b)), b.ints(2), outputs=2)
    values = b.add("Div", values, b.add("ReduceSum", values, b.ints(-1)))
    return _looked_up(b, values, numbers, 2, by_nd)


def softmax_after() -> onnx.ModelProto:
    """Two of the logits, then a Softmax over these; the numbers as 32 bits."""
    b = Builder(5)
    values, numbers = b.add("TopK", _router(b), b.ints(2), outputs=2)
    numbers = b.add("Cast", numbers, to=onnx.TensorProto.INT32)
    return _looked_up(b, b.add("Softmax", values), numbers, 2, False)


def biased() -> onnx.ModelProto:
    """Taken by shifted scores, weighed by the scores themselves (DeepSeek)."""
    b = Builder(6)
    scores = b.add("Sigmoid", _router(b))
    shifted = b.add("Add", scores, b.weight(EXPERTS))
    _, numbers = b.add("TopK", shifted, b.ints(3), outputs=2)
    values = b.add("GatherElements", scores, numbers, axis=1)
    return _looked_up(b, values, numbers, 3, False)


def switch() -> onnx.ModelProto:
    """The largest alone (Switch)."""
    b = Builder(7, opset=18)
    gates = b.add("Softmax", _router(b))
    numbers = b.add("ArgMax", gates, axis=-1, keepdims=1)
    return _looked_up(b, b.add("ReduceMax", gates, b.ints(-1)), numbers, 1, False)


def scattered() -> onnx.ModelProto:
    """Two of the logits put back among zeros; every expert answers."""
    b = Builder(8)
    values, numbers = b.add("TopK", _router(b), b.ints(2), outputs=2)
    zeros = b.constant(np.zeros((TOKENS, EXPERTS), np.float32))
    gates = b.add("ScatterElements", zeros, numbers, b.add("Softmax", values), axis=1)
    return _finished(b, _weighed(b, gates))


def one_hot() -> onnx.ModelProto:
    """Which experts were taken as zeros and ones [tokens, taken, experts]."""
    b = Builder(9)
    values, numbers = b.add("TopK", b.add("Softmax", _router(b)), b.ints(2), outputs=2)
    ends = b.constant(np.array([0, 1], np.float32))
    among = b.add("OneHot", numbers, b.constant(np.int64(EXPERTS)), ends)
    gates = b.add("Mul", among, b.add("Unsqueeze", values, b.ints(2)))
    return _finished(b, _weighed(b, b.add("ReduceSum", gates, b.ints(1), keepdims=0)))


def fused() -> onnx.ModelProto:
    """ONNX Runtime's own operator."""
    b = Builder(10)
    router = _router(b)
    weights = [b.weight(EXPERTS, INNER, WIDTH), b.weight(EXPERTS, INNER)]
    weights += [b.weight(EXPERTS, WIDTH, INNER), b.weight(EXPERTS, WIDTH)]
    y = b.add("MoE", "x", router, *weights, k=2, activation_type="gelu", domain="com.microsoft")
    return _finished(b, y)


def counted() -> onnx.ModelProto:
    """Something else reads the numbers: here nothing may move."""
    b = Builder(11)
    values, numbers = b.add("TopK", b.add("Softmax", _router(b)), b.ints(1), outputs=2)
    last = b.add("Equal", numbers, b.constant(np.int64(EXPERTS - 1)))
    values = b.add("Where", last, b.constant(np.float32(0)), values)
    return _looked_up(b, values, numbers, 1, False)


def _own(b: Builder) -> str:
    """An expert with weights of its own."""
    hidden = b.add("Relu", b.add("MatMul", "x", b.weight(WIDTH, INNER)))
    return str(b.add("MatMul", hidden, b.weight(INNER, WIDTH)))


def stacked() -> onnx.ModelProto:
    """What experts with weights of their own say is stacked, weighed and summed."""
    b = Builder(12)
    gates = b.add("Unsqueeze", b.add("Softmax", _router(b)), b.ints(2))
    said = [b.add("Unsqueeze", _own(b), b.ints(1)) for _ in range(EXPERTS)]
    weighed = b.add("Mul", b.add("Concat", *said, axis=1), gates)
    return _finished(b, b.add("ReduceSum", weighed, b.ints(1), keepdims=0))


def added(sliced: bool = False, residual: bool = False) -> onnx.ModelProto:
    """What experts with weights of their own say is weighed, each by its column, and added up."""
    b = Builder(13)
    gates = b.add("Softmax", _router(b))
    if sliced:
        columns = [b.add("Slice", gates, b.ints(i), b.ints(i + 1), b.ints(1)) for i in range(6)]
    else:
        columns = b.add("Split", gates, outputs=EXPERTS, axis=1)
    y = "x" if residual else ""
    for column in columns:
        said = b.add("Mul", _own(b), column)
        y = b.add("Add", y, said) if y else said
    return _finished(b, y)


def picked() -> onnx.ModelProto:
    """As ``added``, but each column is picked as one position: nothing may move."""
    b = Builder(14)
    gates = b.add("Softmax", _router(b))
    said = []
    for i in range(EXPERTS):
        column = b.add("Gather", gates, b.constant(np.int64(i)), axis=1)
        said.append(b.add("Mul", _own(b), b.add("Unsqueeze", column, b.ints(1))))
    return _finished(b, b.add("Sum", *said))


def parted() -> onnx.ModelProto:
    """As ``added``, but the sum of the first two is read by more than a sum: both may not leave."""
    b = Builder(15)
    columns = b.add("Split", b.add("Softmax", _router(b)), outputs=EXPERTS, axis=1)
    said = [b.add("Mul", _own(b), column) for column in columns]
    first = b.add("Exp", b.add("Add", said[0], said[1]))
    return _finished(b, b.add("Sum", first, *said[2:]))


Form = Callable[[], onnx.ModelProto]


def quantised() -> onnx.ModelProto:
    """ONNX Runtime's own operator with weights of 4 bits, two in a byte."""
    b = Builder(16)
    router = _router(b)

    def bits(*shape: int) -> str:
        return str(b.constant(b.rng.integers(0, 256, shape).astype(np.uint8)))

    weights = [bits(EXPERTS, 16, WIDTH // 2), b.weight(EXPERTS, 16), b.weight(EXPERTS, 16)]
    weights += [bits(EXPERTS, WIDTH, 8), b.weight(EXPERTS, WIDTH), b.weight(EXPERTS, WIDTH)]
    given = {"k": 2, "activation_type": "gelu", "expert_weight_bits": 4}
    return _finished(b, b.add("QMoE", "x", router, *weights, domain="com.microsoft", **given))


def unrolled() -> onnx.ModelProto:
    """A loop over the experts, unrolled: each looks for its own tokens and adds to their rows."""
    b = Builder(17, opset=18)
    values, numbers = b.add("TopK", b.add("Softmax", _router(b)), b.ints(2), outputs=2)
    y = b.constant(np.zeros((TOKENS, WIDTH), np.float32))
    for expert in range(EXPERTS):
        mine = b.add("Equal", numbers, b.constant(np.int64(expert)))
        places = b.add("Transpose", b.add("NonZero", mine), perm=[1, 0])
        rows = b.add("Slice", places, b.ints(0), b.ints(1), b.ints(1))
        hidden = b.add("MatMul", b.add("GatherND", "x", rows), b.weight(WIDTH, INNER))
        said = b.add("MatMul", b.add("Relu", hidden), b.weight(INNER, WIDTH))
        gate = b.add("Unsqueeze", b.add("GatherND", values, places), b.ints(1))
        y = b.add("ScatterND", y, rows, b.add("Mul", said, gate), reduction="add")
    return _finished(b, y)


LEAVE: dict[str, tuple[Form, int]] = {  # with as many as are taken
    "dense": (dense, 1),
    "dense, Einsum": (dense_einsum, 1),
    "dense, product": (dense_product, 1),
    "two, Gather": (top_two, 2),
    "two, GatherND": (lambda: top_two(by_nd=True), 2),
    "two, Softmax after": (softmax_after, 2),
    "three, biased": (biased, 3),
    "one": (switch, 1),
    "two, scattered": (scattered, 2),
    "two, OneHot": (one_hot, 2),
    "fused": (fused, 2),
    "fused, 4 bits": (quantised, 2),
    "apart, stacked": (stacked, 1),
    "apart, added": (added, 1),
    "apart, sliced": (lambda: added(sliced=True), 1),
}
STAY: dict[str, tuple[Form, str]] = {
    "counted": (counted, "Equal: positions along the axis are read as numbers"),
    "parted": (parted, "Softmax takes statistics over the axis"),
    "picked": (picked, "Softmax takes statistics over the axis"),
    "unrolled": (unrolled, "Equal: positions along the axis are read as numbers"),
}
