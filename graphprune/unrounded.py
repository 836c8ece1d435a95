"""A quantised model without its rounding, for proofs.

Where a float is rounded to an integer, a difference of 1e-7 may become a whole step, so two models
that compute the same in another order need not agree in their last bits, and after some layers in
any. Without the rounding they must: every quantised operator is read as the float one that it
stands for, and integers become the numbers (no longer whole ones) that would have been rounded.
Ranges still clip; scales, zero points and the stored weights are those of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, defs, helper

from graphprune import external
from graphprune.coupling import FLOAT_TYPES
from graphprune.errors import ModelError
from graphprune.model import Array, Model, label, set_initializer
from graphprune.readings import Q, Reading, channels_last, reading_of

ROUNDS = {"QuantizeLinear", "DynamicQuantizeLinear", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM"}
SMALL_TYPES = {TensorProto.INT8, TensorProto.UINT8, TensorProto.INT16, TensorProto.UINT16}
ARITHMETIC = {"Add", "Sub", "Mul", "Div", "Max", "Min", "Where", "Concat"}
ONE_AXIS = 13  # the opset from which Softmax is over one axis


def rounds(model: Model) -> bool:
    """Whether some activation is rounded to integers."""
    for node in model.nodes:
        reading = reading_of(node)
        quantises = node.op_type in ROUNDS or (reading is not None and bool(reading.result))
        if quantises and not model.constant_names.issuperset(node.output):
            return True
    return False


def unrounded(model: Model) -> Model:
    """The model in floats; its integer outputs become floats too.

    Raises ``ModelError`` for what cannot be read so.
    """
    walk = _Walk(model)
    for node in model.nodes:
        if all(name in model.constant_names for name in node.output if name):
            walk.nodes.append(node)
        else:
            walk.read(node)
    tensors = [*model.initializers.values(), *walk.tensors.values()]
    result = model.with_graph(walk.nodes, tensors, value_info=[])
    for value in result.skeleton.graph.output:
        if value.name in walk.coded:
            value.ClearField("type")  # ONNX Runtime infers it
    return result


class _Walk:
    """Appends the float nodes; ``coded`` are floats where the model has integers."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: dict[str, onnx.TensorProto] = {}
        self.coded: set[str] = set()
        self.cast: set[str] = set()  # to integers, such as a bias that is quantised at run time
        self.small = {v.name for v in model.inputs if v.type.tensor_type.elem_type in SMALL_TYPES}
        self.small |= {t.name for t in model.initializers.values() if t.data_type in SMALL_TYPES}

    def read(self, node: onnx.NodeProto) -> None:
        reading = reading_of(node)
        special: dict[str, Callable[[onnx.NodeProto], None]] = {
            "QuantizeLinear": self._quantise,
            "DequantizeLinear": self._dequantise,
            "DynamicQuantizeLinear": self._dynamic,
        }
        if reading is not None:
            self._as_float(node, reading)
        elif node.op_type in special:
            special[node.op_type](node)
        else:
            self._other(node)

    def _quantise(self, node: onnx.NodeProto) -> None:
        _refuse_blocks(node)
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        self._code(self._float(node.input[0]), node.output[0], node, (1, 2), axis)

    def _dequantise(self, node: onnx.NodeProto) -> None:
        if node.input[0] not in self.coded:
            return self.nodes.append(node)
        _refuse_blocks(node)
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        self._number(node, Q(0, 1, 2, axis), node.output[0])

    def _dynamic(self, node: onnx.NodeProto) -> None:
        """Without rounding any scale does; one and a zero point of nought are the simplest."""
        self._add("Identity", [node.input[0]], node.output[0])
        outputs = [*node.output, "", ""]
        for name, value in ((outputs[1], np.float32(1)), (outputs[2], np.uint8(0))):
            if name:
                self._add("Identity", [self._constant(f"{name}/one", np.asarray(value))], name)
        self.coded.add(node.output[0])

    def _as_float(self, node: onnx.NodeProto, reading: Reading) -> None:
        opset = next((a.i for a in node.attribute if a.name == "opset"), ONE_AXIS)
        own = self.model.opsets.get("", 1)
        other = reading.operator == "Softmax" and (opset < ONE_AXIS) != (own < ONE_AXIS)
        if channels_last(node) or other:
            raise ModelError(f"{node.op_type} has no equal in floats", f"node {label(node)!r}")
        inputs = [self._number(node, q) for q in reading.shown(node)]
        while inputs and not inputs[-1]:
            inputs.pop()
        result = f"{node.output[0]}/float"
        outputs = [result, *node.output[1:]]
        plain = helper.make_node(reading.operator, inputs, outputs, domain=reading.domain)
        known = None if reading.domain else defs.get_schema(reading.operator, own, "").attributes
        plain.attribute.extend(a for a in node.attribute if known is None or a.name in known)
        self.nodes.append(plain)
        if reading.added is not None and _at(node, reading.added):
            result = self._add("Add", [result, _at(node, reading.added)])
        if reading.result and _at(node, reading.result[0]):
            return self._code(result, node.output[0], node, reading.result, 1)
        self._add("Identity", [result], node.output[0])
        self.coded.add(node.output[0])

    def _other(self, node: onnx.NodeProto) -> None:
        """Any operator: what it reads beside the floats that were integers becomes floats too."""
        to = next((a.i for a in node.attribute if a.name == "to"), 0)
        if not self.coded.intersection(node.input):
            moved = node.op_type != "Cast" and not self.cast.isdisjoint(node.input[:1])
            if to in {*SMALL_TYPES, TensorProto.INT32} or moved:
                self.cast.add(node.output[0])
            return self.nodes.append(node)
        new = onnx.NodeProto()
        new.CopyFrom(node)
        for i, name in enumerate(new.input if not node.domain else ()):
            if name in self.small or (name in self.cast and node.op_type in ARITHMETIC):
                new.input[i] = self._float(name)
        self.nodes.append(new)
        if to not in FLOAT_TYPES:
            self.coded.update(name for name in node.output if name)

    def _number(self, node: onnx.NodeProto, q: Q, output: str = "") -> str:
        """Name of the real numbers behind an input: (q - zero point) * scale."""
        name = _at(node, q.data)
        if not name or (q.zero is None and not q.bias):
            return name
        value = self._float(name)
        if q.bias:
            return self._scaled_bias(node, value)
        if _at(node, q.zero):
            value = self._add("Sub", [value, self._along(node, q, q.zero)])
        if _at(node, q.scale):
            value = self._add("Mul", [value, self._along(node, q, q.scale)])
        if q.swapped:
            order = [*range(len(self.model.initializers[name].dims))]
            value = self._add("Transpose", [value], perm=[*order[:-2], order[-1], order[-2]])
        return self._add("Identity", [value], output) if output else value

    def _scaled_bias(self, node: onnx.NodeProto, value: str) -> str:
        """A bias counts in products of the scales of what is multiplied (and of Gemm's alpha)."""
        reading = reading_of(node)
        assert reading is not None
        first, second = (_at(node, q.scale) for q in reading.inputs[:2])
        alpha = next((a.f for a in node.attribute if a.name == "alpha"), 1.0)
        factor = self._constant(f"{node.output[0]}/alpha", np.float32(alpha))
        for name in (first, second, factor):
            value = self._add("Mul", [value, name])
        return value

    def _code(
        self, source: str, output: str, node: onnx.NodeProto, place: Sequence[int], axis: int
    ) -> None:
        """source / scale + zero point within the range of the type, unrounded."""
        scale, zero = place
        value = self._add("Div", [source, self._along(node, Q(0, axis=axis), scale)])
        if _at(node, zero):
            value = self._add("Add", [value, self._along(node, Q(0, axis=axis), zero)])
        low, high = self._range(_at(node, zero))
        bounds = [self._constant(f"{output}/{n}", np.float32(n)) for n in (low, high)]
        self._add("Clip", [value, *bounds], output)
        self.coded.add(output)

    def _range(self, zero: str) -> tuple[int, int]:
        stored = self.model.initializers.get(zero)
        if stored is None:
            return 0, 255
        dtype = helper.tensor_dtype_to_np_dtype(stored.data_type)
        if dtype.kind not in "iu":
            raise ModelError("numbers of few bits that are no integers", f"tensor {zero!r}")
        span = np.iinfo(dtype)
        return int(span.min), int(span.max)

    def _along(self, node: onnx.NodeProto, q: Q, place: int | None) -> str:
        """A scale or zero point in floats, in the shape that meets the input."""
        name = _at(node, place)
        stored = self.model.initializers.get(name)
        size = int(np.prod(stored.dims, dtype=np.int64)) if stored is not None else 1
        if stored is None or size == 1:
            return self._float(name)
        array = external.array(stored).astype(np.float32)
        data = self.model.initializers.get(_at(node, q.data))
        if array.ndim == 1 and q.axis != -1:
            if data is None:
                raise ModelError("activations with a scale for each channel", label(node))
            array = array.reshape([-1 if i == q.axis else 1 for i in range(len(data.dims))])
        elif data is not None and 1 < array.ndim == len(data.dims) - 1:
            array = np.expand_dims(array, -2)
        return self._constant(f"{node.output[0]}/{place}", array)

    def _float(self, name: str) -> str:
        return self._add("Cast", [name], to=TensorProto.FLOAT)

    def _add(self, operator: str, inputs: list[str], output: str = "", **given: Any) -> str:
        output = output or f"graphprune/unrounded_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [output], **given))
        return output

    def _constant(self, name: str, value: Array | np.generic) -> str:
        self.tensors[name] = set_initializer(name, np.asarray(value))
        return name


def _at(node: onnx.NodeProto, index: int | None) -> str:
    return node.input[index] if index is not None and index < len(node.input) else ""


def _refuse_blocks(node: onnx.NodeProto) -> None:
    if any(a.name == "block_size" and a.i for a in node.attribute):
        raise ModelError("activations with a scale for each block", f"node {label(node)!r}")
