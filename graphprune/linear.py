"""Linear operators as matrix problems: Y = W X + b, one problem for each group of channels.

The pruning rules say what leaves; this file says only how such a node's arithmetic unfolds into
rows of a matrix, so that statistics and repairs need not know operators.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from graphprune.model import Array, Model
from graphprune.quantisation import (
    dequantised,
    source_of,
)

Matrix = NDArray[np.float64]
Attributes = Mapping[str, Any]
Weights = Mapping[str, onnx.TensorProto]
CONVOLUTIONS = ("Conv", "ConvTranspose")
RECURRENT = ("LSTM", "GRU", "RNN")
COPY_MARK = "/graphprune_use_"  # stands before the number in names of vectors that had one name
INNER = "graphprune_rank"  # ends the names of what a layer of lower rank has besides


@dataclass(frozen=True)
class Linear:
    """A node that computes ``y`` from ``x`` with constant weights.

    ``y`` is read after the bias, which may be a node of its own (MatMul, Add). A recurrent node is
    two of them, which have no such tensor (``y`` is ``None``): its gates from ``x``, and its gates
    from its states one step before, one group for each direction.
    """

    node: int
    kind: str
    x: str
    weight: str
    bias: str | None
    y: str | None
    groups: int
    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()  # before each spatial axis
    auto_pad: str = "NOTSET"
    transposed: bool = False  # weight is [out, in] where it is a plain matrix
    alpha: float = 1.0
    beta: float = 1.0
    bias_node: int | None = None  # the Add that holds the bias of a MatMul
    reverse: tuple[bool, ...] = ()  # of recurrent weights: whether each direction runs backwards
    affine: bool = True  # False: it has no bias, and none can be stored

    @property
    def taps(self) -> int:
        """Kernel positions: columns per input channel."""
        return math.prod(self.kernel)

    @property
    def contracted_axis(self) -> int:
        """The weight's axis that is summed over."""
        if self.kind in RECURRENT:
            return 2
        if self.kind == "ConvTranspose":
            return 0
        return 1 if self.kind == "Conv" or self.transposed else 0

    def columns(self, x: Array) -> int:
        """Columns of one group's matrix, for an input like ``x``."""
        if self.kind in CONVOLUTIONS:
            return int(x.shape[1]) // self.groups * self.taps
        return int(x.shape[-1])

    def matrix(self, model: Model) -> Matrix:
        """W: [groups, out, in], in float64, with Gemm's alpha multiplied in."""
        return self._unfolded(model.array(self.weight).astype(np.float64))

    def _unfolded(self, weight: Matrix) -> Matrix:
        if self.kind == "Conv":
            return weight.reshape(self.groups, len(weight) // self.groups, -1)
        if self.kind == "ConvTranspose":
            rows, columns = len(weight) // self.groups, weight.shape[1]
            parts = weight.reshape(self.groups, rows, columns, self.taps)
            return parts.transpose(0, 2, 1, 3).reshape(self.groups, columns, rows * self.taps)
        if self.kind in RECURRENT:
            return weight.reshape(self.groups, -1, weight.shape[2])
        return self.alpha * (weight if self.transposed else weight.T)[None]

    def offset(self, model: Model, outputs: int) -> Matrix:
        """b: [groups, out], zeros where the operator has none."""
        if self.bias is None:
            return np.zeros((self.groups, outputs // self.groups))
        bias = model.array(self.bias).astype(np.float64)
        if self.kind in RECURRENT:
            half = bias.reshape(len(bias), 2, -1)[:, int(bool(self.reverse))]
            return half.reshape(self.groups, -1)
        bias = np.broadcast_to(self.beta * bias.reshape(-1), (outputs,))
        return bias.reshape(self.groups, -1)

    def _stored(self, matrix: Matrix, shape: Sequence[int]) -> Matrix:
        """The weight array of that shape that ``matrix`` reads back from."""
        if self.kind == "ConvTranspose":
            rows, columns = shape[0] // self.groups, shape[1]
            parts = matrix.reshape(self.groups, columns, rows, self.taps)
            return parts.transpose(0, 2, 1, 3).reshape(shape)
        if self.kind == "Conv" or self.kind in RECURRENT:
            return matrix.reshape(shape)
        plain: Matrix = matrix[0] / self.alpha
        return plain if self.transposed else plain.T


def linears(model: Model, usable: Container[str] | None = None) -> list[Linear]:
    """Every node with constant weights of its own, in node order.

    Weights that several nodes read are left out: what repairs one would break the others. With
    ``usable`` names also weights that nodes compute from constants: behind integers or a Cast.
    """
    found = _found(model, model.initializers if usable is None else usable)
    return [one for one in found if len(model.consumers[one.weight]) == 1]


def shared(model: Model) -> list[tuple[Linear, ...]]:
    """Nodes that read the same stored weight, in the same way, and that nothing else reads: in node
    order, and those of one weight together. Biases are of their own."""
    uses: dict[str, list[Linear]] = {}
    for one in _found(model, model.initializers):
        uses.setdefault(one.weight, []).append(one)
    return [
        tuple(found)
        for weight, found in uses.items()
        if len(model.consumers[weight]) == len(found) > 1
        and len({(u.kind, u.groups, u.transposed, u.alpha) for u in found}) == 1
        and found[0].kind not in RECURRENT
    ]


def _found(model: Model, usable: Container[str]) -> Iterator[Linear]:
    for i, node in enumerate(model.nodes):
        linear = _linear(model, i, node, usable)
        for one in (linear, _of_states(model, linear)):
            if one is not None and not {one.weight, one.bias} & model.output_names:
                yield one


def repairable(model: Model) -> list[Linear]:
    """Those that can be rewritten as they are stored: integers too, with a bias of integers, or
    without one where the operator takes none."""
    integers = dequantised(model)
    found = linears(model, model.initializers.keys() | integers.keys())
    return [replace(k, affine=k.weight not in integers or _may_shift(model, k)) for k in found]


def _may_shift(model: Model, linear: Linear) -> bool:
    return linear.bias is not None or bias_scale(model, linear) is not None


def bias_scale(model: Model, linear: Linear) -> Array | None:
    """The scale that a bias of integers has: that of the input times those of the weight.

    ``None`` where the input is no quantised tensor, or the operator takes no bias.
    """
    source = source_of(model, linear.weight)
    index = model.producer.get(linear.x)
    takes = linear.kind == "Conv" or (linear.kind == "Gemm" and linear.alpha == 1)
    if source is None or index is None or not takes or model.opsets.get("", 1) < 13:
        return None
    reading = model.nodes[index]
    if reading.op_type != "DequantizeLinear" or reading.input[1] not in model.initializers:
        return None
    scale, weights = model.array(reading.input[1]), model.array(source[1].scale or "")
    return None if scale.size != 1 else np.asarray(scale.reshape(()) * weights)


def _linear(
    model: Model, index: int, node: onnx.NodeProto, usable: Container[str]
) -> Linear | None:
    if node.domain or node.op_type not in READ or len(node.input) < 2:
        return None
    if node.op_type in RECURRENT:
        usable = model.initializers
    if node.input[0] in model.constant_names or node.input[1] not in usable:
        return None
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    place = 3 if node.op_type in RECURRENT else 2
    bias = node.input[place] if len(node.input) > place and node.input[place] else None
    if node.op_type == "Gemm" and attributes.get("beta", 1.0) == 0:
        bias = None  # whatever stands there; as JAX writes it
    if bias is not None and (bias not in usable or len(model.consumers[bias]) != 1):
        return None
    stored = [model.initializers[n] for n in node.input[1:] if n in model.initializers]
    if any(tensor.data_type == onnx.TensorProto.STRING for tensor in stored):
        return None  # damaged: ONNX Runtime says so
    common = Linear(index, node.op_type, node.input[0], node.input[1], bias, node.output[0], 1)
    return READ[node.op_type](model, common, attributes)


def _recurrent(model: Model, common: Linear, attributes: Attributes) -> Linear | None:
    flat = len(model.initializers[common.weight].dims) != 3
    return None if flat or attributes.get("layout", 0) else replace(common, y=None)


def _of_states(model: Model, linear: Linear | None) -> Linear | None:
    """The recurrent weights of a node, beside its input weights ``linear``.

    That a GRU may reset states before its last gate reads them is left out of the account.
    """
    if linear is None or linear.kind not in RECURRENT:
        return None
    node = model.nodes[linear.node]
    weight, states = node.input[2], node.output[0]
    if weight not in model.initializers or not states:
        return None
    way = next((a.s for a in node.attribute if a.name == "direction"), b"forward")
    reverse = {b"forward": (False,), b"reverse": (True,)}.get(way, (False, True))
    return replace(linear, x=states, weight=weight, groups=len(reverse), reverse=reverse)


def _convolution(model: Model, common: Linear, attributes: Attributes) -> Linear | None:
    shape = _dims(model, common.weight)
    spatial = len(shape) - 2
    groups = int(attributes.get("group", 1))
    if spatial < 0 or groups < 1 or shape[0] % groups:
        return None
    outputs = shape[0] if common.kind == "Conv" else shape[1] * groups
    if common.bias is not None and list(_dims(model, common.bias)) != [outputs]:
        return None  # damaged: ONNX Runtime says so
    auto = attributes.get("auto_pad", b"NOTSET")
    pads = attributes.get("pads") or [0] * (2 * spatial)
    ones = (1,) * spatial
    if attributes.get("output_shape"):
        return None
    auto_pad = auto.decode()
    if common.kind == "ConvTranspose" and auto_pad not in ("NOTSET", "VALID"):
        return None
    return replace(
        common,
        groups=groups,
        kernel=shape[2:],
        strides=tuple(attributes.get("strides") or ones),
        dilations=tuple(attributes.get("dilations") or ones),
        pads=tuple(pads[:spatial]),
        auto_pad=auto_pad,
    )


def _gemm(model: Model, common: Linear, attributes: Attributes) -> Linear | None:
    alpha, beta = (float(attributes.get(key, 1.0)) for key in ("alpha", "beta"))
    flat = len(_dims(model, common.weight)) == 2
    beta = beta if common.bias is not None else 1.0  # of a bias that it may gain
    if alpha == 0 or attributes.get("transA", 0) or not flat:
        return None
    transposed = bool(attributes.get("transB", 0))
    outputs = _dims(model, common.weight)[0 if transposed else 1]
    if common.bias is not None:
        dims = _dims(model, common.bias)
        if math.prod(dims) not in (1, outputs) or list(dims[-1:]) not in ([], [1], [outputs]):
            return None
        if math.prod(dims) == outputs and list(dims[-1:]) != [outputs]:
            return None  # one number for each row
    return replace(common, transposed=transposed, alpha=alpha, beta=beta)


def _product(model: Model, common: Linear, attributes: Attributes) -> Linear | None:
    """A MatMul; where its only reader adds a constant vector, that vector is its bias."""
    shape = _dims(model, common.weight)
    if len(shape) != 2 or common.y is None:
        return None
    return _with_added_bias(model, common, common.y, shape[1])


def _dims(model: Model, name: str) -> tuple[int, ...]:
    if name in model.initializers:
        return tuple(model.initializers[name].dims)
    return tuple(model.array(name).shape)


def _with_added_bias(model: Model, common: Linear, y: str, outputs: int) -> Linear:
    readers = model.consumers.get(y, [])
    if len(readers) != 1 or y in model.output_names or readers[0][1] < 0:
        return common
    place, position = readers[0]
    node = model.nodes[place]
    if node.op_type != "Add" or node.domain:
        return common
    other = node.input[1 - position]
    if other not in model.initializers or len(model.consumers[other]) != 1:
        return common
    dims = tuple(model.initializers[other].dims)
    if math.prod(dims) != outputs or dims[-1:] != (outputs,):
        return common
    return replace(common, bias=other, y=node.output[0], bias_node=place)


READ: dict[str, Callable[[Model, Linear, Attributes], Linear | None]] = {
    **dict.fromkeys(CONVOLUTIONS, _convolution),
    **dict.fromkeys(RECURRENT, _recurrent),
    "Gemm": _gemm,
    "MatMul": _product,
}
