"""Weights and biases written back into the nodes of linear operators, as they are stored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count

import numpy as np
import onnx
from onnx import helper

from graphprune import external
from graphprune.linear import COPY_MARK, RECURRENT, Linear, Matrix, Weights, bias_scale
from graphprune.model import Array, Model, set_initializer
from graphprune.quantisation import (
    Quantised,
    grown,
    regridded,
    requantised,
    source_of,
)

Change = tuple["Linear", Matrix, Matrix]  # an operator, its new weights and its new bias


def rewritten(model: Model, changed: Sequence[Change]) -> Model:
    """The model with other weights and biases ([groups, out, in] and [groups, out]) in some nodes.

    An operator without a bias gains one. Arithmetic is in float64; what is stored keeps its type.
    """
    tensors = dict(model.initializers)
    nodes: dict[int, list[onnx.NodeProto]] = {}
    for change in changed:
        tensors |= stored(model, change, tensors)
        linear = change[0]
        if linear.bias is None and linear.affine:
            name = _bias_name(model, linear)
            nodes[linear.node] = _with_bias(model.nodes[linear.node], name)
            if name not in tensors:
                nodes[linear.node].insert(0, _bias_reading(name))
    computed = tensors.keys() & model.producer.keys()
    if not nodes and not computed:
        return replace(model, initializers=tensors)
    for name in computed:
        nodes[model.producer[name]] = []
    order = [n for i, node in enumerate(model.nodes) for n in nodes.get(i, [node])]
    return model.with_graph(order, tensors.values())


def stored(
    model: Model, change: Change, known: Weights | None = None
) -> dict[str, onnx.TensorProto]:
    """The initialisers that hold an operator's new weights and bias, by name.

    ``known`` are those of the model so far, where they have changed: a recurrent node's two halves
    share their bias.
    """
    linear, matrix, offset = change
    old = model.array(linear.weight)
    value = linear._stored(matrix, old.shape).astype(old.dtype)
    tensors, growth = _weights_in_place(model, linear, value)
    if not linear.affine:
        return tensors
    bias = offset.reshape(-1) / linear.beta
    name = linear.bias or _bias_name(model, linear)
    if linear.kind in RECURRENT:
        bias = _recurrent_bias(known or model.initializers, linear, name, bias)
    if linear.bias is None:
        return tensors | _new_bias(model, linear, name, bias.astype(old.dtype), growth)
    was = model.array(linear.bias)
    shape = was.shape if was.size == bias.size else bias.shape
    kept = bias.reshape(shape).astype(was.dtype)
    return tensors | _in_place_of(model, linear.bias, kept, growth)


def as_stored(model: Model, linear: Linear, tensors: Weights) -> Matrix | None:
    """The matrix that ``tensors``, as ``stored`` gives them, hold; ``None`` where they round
    nothing."""
    source = source_of(model, linear.weight)
    if source is None or source[0] not in tensors:
        return None
    name, how = source
    value, scale = (
        external.array(tensors[n]) if n in tensors else model.array(n)
        for n in (name, how.scale or "")
    )
    value = value.astype(np.float64)
    if how.zero_point is not None:
        value = value - how.spread(model.array(how.zero_point).astype(np.float64), value.ndim)
    return linear._unfolded(value * how.spread(scale.astype(np.float64), value.ndim))


def copy_names(model: Model, name: str, mark: str = COPY_MARK) -> Iterator[str]:
    """Names for copies of what ``name`` is of: none that the model has, which may be a result."""
    taken = model.initializers.keys() | model.producer.keys() | {v.name for v in model.inputs}
    return (new for i in count(1) if (new := f"{name}{mark}{i}") not in taken)


def _bias_name(model: Model, linear: Linear) -> str:
    """Of the bias that a node gains; both halves of a recurrent one share it, and each use of a
    weight has one of its own."""
    weight = model.nodes[linear.node].input[1]
    number = [i for i, _ in model.consumers[weight]].index(linear.node)
    name = f"{weight}/graphprune_bias"
    return f"{name}{COPY_MARK}{number}" if number else name


def _new_bias(
    model: Model, linear: Linear, name: str, bias: Array, growth: Array | None
) -> dict[str, onnx.TensorProto]:
    """A bias for an operator that has none: integers and their scale where its weight is such."""
    scale = bias_scale(model, linear)
    if scale is None:
        return {name: set_initializer(name, bias)}
    if growth is not None:
        scale = scale * growth.reshape(scale.shape)
    span = np.iinfo(np.int32)
    steps = np.rint(bias.astype(np.float64) / np.where(scale == 0, 1, scale))
    integers, scales = (f"{name}_{part}" for part in ("quantised", "scale"))
    return {
        integers: set_initializer(integers, np.clip(steps, span.min, span.max).astype(np.int32)),
        scales: set_initializer(scales, scale.astype(bias.dtype)),
    }


def _bias_reading(name: str) -> onnx.NodeProto:
    inputs = [f"{name}_{part}" for part in ("quantised", "scale")]
    return helper.make_node("DequantizeLinear", inputs, [name], name=name, axis=0)


def _weights_in_place(
    model: Model, linear: Linear, value: Array
) -> tuple[dict[str, onnx.TensorProto], Array | None]:
    """What holds an operator's weights from now on, and by how much the scale of integers grows,
    which is a bias's too: not at all where something else reads it."""
    source = source_of(model, linear.weight)
    if source is None or not _has_own_scale(model, source[1], linear):
        return _in_place_of(model, linear.weight, value), None
    name, how = source
    found = regridded(model, name, how, value)
    tensors = {name: set_initializer(name, found.integers)}
    return tensors | grown(model, how, found.growth), found.growth


def _has_own_scale(model: Model, how: Quantised, linear: Linear) -> bool:
    """Whether the scale of an operator's weights may change, and that of its bias with it."""
    bias = None if linear.bias is None else source_of(model, linear.bias)
    if linear.bias is not None and linear.bias not in model.initializers and bias is None:
        return False
    scales = [name for name in (how.scale, bias and bias[1].scale) if name]
    own = all(n in model.initializers and model.read_once(n) for n in scales)
    return own and len({int(np.prod(model.initializers[n].dims)) for n in scales}) == 1


def _in_place_of(
    model: Model, name: str, value: Array, growth: Array | None = None
) -> dict[str, onnx.TensorProto]:
    """What holds a weight from now on: its initialiser, or the integers that it is read from."""
    source = source_of(model, name)
    if source is not None:
        integers = requantised(model, *source, value, growth)
        found = {source[0]: set_initializer(source[0], integers)}
        return found | grown(model, source[1], growth)
    tensor = set_initializer(name, value)
    if name in model.initializers:
        tensor.doc_string = model.initializers[name].doc_string
    return {name: tensor}


def _with_bias(node: onnx.NodeProto, bias: str) -> list[onnx.NodeProto]:
    """The node reading a bias; a MatMul, which cannot, followed by an Add."""
    new = onnx.NodeProto()
    new.CopyFrom(node)
    if node.op_type == "MatMul":
        new.output[0] = f"{node.output[0]}/graphprune_product"
        add = helper.make_node("Add", [new.output[0], bias], [node.output[0]], name=f"{bias}_add")
        return [new, add]
    if node.op_type == "Gemm":  # a factor of the bias that was not there
        keep = [a for a in node.attribute if a.name != "beta"]
        del new.attribute[:]
        new.attribute.extend(keep)
    place = 3 if node.op_type in RECURRENT else 2
    while len(new.input) <= place:
        new.input.append("")
    new.input[place] = bias
    return [new]


def _recurrent_bias(known: Weights, linear: Linear, name: str, bias: Matrix) -> Matrix:
    """[directions, both halves]: one half is new, the other stays (or is zeros)."""
    new = bias.reshape(known[linear.weight].dims[0], -1)
    halves = np.zeros((len(new), 2, new.shape[1]))
    if name in known:
        halves = external.array(known[name]).astype(np.float64).reshape(halves.shape)
    halves[:, int(bool(linear.reverse))] = new
    return halves.reshape(len(new), -1)
