"""A quantised model spelled out, for statistics and repairs: every operator on integers as
DequantizeLinear, the float operator that it stands for, and QuantizeLinear.

    QLinearConv(x, w, y scale)  →  Conv(DequantizeLinear(x), DequantizeLinear(w)), QuantizeLinear

Weights stay the integers that they are, on their grid, under their names, so what repairs weights
behind a DequantizeLinear repairs these, and ``Spelled.back`` puts them into the operators again.
Integers that a DynamicQuantizeLinear made are read as what it was given, and the product of such
integers, its Cast and the Muls by scales are one float operator. A bias is there in any case, of
zeros where the operator has none but could.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import defs, helper

from graphprune.model import Array, Model, label, set_initializer
from graphprune.quantisation import Quantised, real
from graphprune.readings import MICROSOFT, Q, Reading, channels_last, reading_of
from graphprune.spelled import PRODUCT, Home, Spelled

ALONG_AXES = 13  # the opset from which DequantizeLinear takes a scale for each channel
ONE_AXIS = 13  # the opset from which Softmax is over one axis
LINEAR = ("Conv", "Gemm", "MatMul", "LSTM")
REAL, FLOAT = "/graphprune_real", "/graphprune_float"
BIAS, SCALE, ZERO = "/graphprune_bias", "/graphprune_scale", "/graphprune_zero_point"


def spelled(model: Model) -> Spelled:
    """The model spelled out; itself where there is nothing to spell."""
    walk = _Walk(model)
    for i, node in enumerate(model.nodes):
        reading = reading_of(node)
        if node.op_type == "DynamicQuantizeLinear" and len(node.output) > 1:
            walk.dynamic[node.output[0]] = node
        if i in walk.replaced or (reading is not None and walk.spells(i, node, reading)):
            continue
        walk.nodes.append(node)
    if not walk.replaced:
        return Spelled(model, model, {}, {}, frozenset(), frozenset())
    made = {o for node in walk.made for o in node.output}
    result = model.with_graph(walk.nodes, [*model.initializers.values(), *walk.tensors.values()])
    if MICROSOFT in {node.domain for node in walk.made} and MICROSOFT not in model.opsets:
        result.skeleton.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    return Spelled(
        model,
        result,
        walk.same,
        walk.stands_for,
        frozenset(walk.replaced),
        frozenset(made),
        tuple(walk.homes),
        walk.swapped,
    )


class _Walk:
    """Appends nodes; a node that cannot be spelled leaves no trace but unread constants."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.nodes: list[onnx.NodeProto] = []
        self.made: list[onnx.NodeProto] = []
        self.tensors: dict[str, onnx.TensorProto] = {}
        self.same: dict[str, tuple[str, bool]] = {}
        self.stands_for: dict[str, int] = {}
        self.replaced: set[int] = set()
        self.homes: list[Home] = []
        self.swapped: dict[str, tuple[str, Quantised]] = {}
        self.dynamic: dict[str, onnx.NodeProto] = {}  # integers → the node that made them
        self.known: dict[tuple[str, str, str], str] = {}  # integers, scale, zero point → reals

    def spells(self, index: int, node: onnx.NodeProto, reading: Reading) -> bool:
        """Append what the node stands for, if that can be said."""
        opset = next((a.i for a in node.attribute if a.name == "opset"), ONE_AXIS)
        other = (opset < ONE_AXIS) != (self.model.opsets.get("", 1) < ONE_AXIS)
        softmax = reading.operator == "Softmax" and other
        if reading.domain or channels_last(node) or softmax:
            return False
        inputs = reading.shown(node)
        if reading.operator == "LSTM":
            return self._recurrent(index, node, inputs)
        if inputs[0].scale is None and inputs[0].zero is not None:
            return self._product(index, node, reading)
        return self._plain(index, node, reading)

    # --- operators that scale what they give ---

    def _plain(self, index: int, node: onnx.NodeProto, reading: Reading) -> bool:
        inputs = [
            self._bias(index, node, q) if q.bias else self._real(node, q)
            for q in reading.shown(node)
        ]
        if None in inputs:
            return False
        names = [name or "" for name in inputs]
        while names and not names[-1]:
            names.pop()
        out = node.output[0]
        scaled = bool(reading.result) and bool(_at(node, reading.result[0]))
        result = f"{out}{FLOAT}" if scaled else out
        if reading.added is None:
            self._operator(index, node, reading.operator, names, [result])
        else:
            self._with_added(index, node, names, result, reading.added)
        if scaled:
            scale, zero = (_at(node, place) for place in reading.result)
            self._add("QuantizeLinear", [result, scale, zero], out)
            self.same[result] = out, False
        self.replaced.add(index)
        return True

    def _with_added(
        self, index: int, node: onnx.NodeProto, names: list[str], result: str, place: int
    ) -> None:
        """A product, and the float bias behind it."""
        bias = _at(node, place)
        weight = self.model.initializers.get(node.input[1])
        if not bias and weight is not None and len(weight.dims) == 2:
            bias = self._zeros(index, node.output[0], weight.dims[1:], place)
        if not bias:
            return self._operator(index, node, "MatMul", names, [result])
        self._operator(index, node, "MatMul", names, [f"{result}{PRODUCT}"])
        self._add("Add", [f"{result}{PRODUCT}", bias], result)

    def _real(self, node: onnx.NodeProto, q: Q) -> str | None:
        """Name of the numbers behind an input; ``None`` where they cannot be said."""
        name, scale, zero = _at(node, q.data), _at(node, q.scale), _at(node, q.zero)
        if not name or q.zero is None:
            return str(name)
        maker = self.dynamic.get(name)
        if maker is not None and list(maker.output[1:]) == [scale, zero]:
            return str(maker.input[0])
        key = name, scale, zero
        if key in self.known:
            return self.known[key]
        real_name = f"{name}{REAL}"
        if real_name in self.same:  # on another scale
            if name in self.model.initializers:
                return None
            real_name = f"{real_name}/{node.output[0]}"
        axis = self._axis(name, scale, q.axis)
        if axis is None:
            return None
        self.known[key] = self._dequantise(name, scale, zero, axis, real_name)
        return real_name

    def _axis(self, name: str, scale: str, axis: int) -> int | None:
        """-1 for one scale; ``None`` for scales that DequantizeLinear does not take."""
        stored, scales = (self.model.initializers.get(n) for n in (name, scale))
        if scales is None or not [size for size in scales.dims if size != 1]:
            return -1
        if stored is None or len(scales.dims) != 1:
            return None
        return axis % len(stored.dims)

    def _dequantise(self, name: str, scale: str, zero: str, axis: int, result: str) -> str:
        inputs = [name, scale, zero] if zero else [name, scale]
        given = {} if axis < 0 else {"axis": axis}
        old = bool(given) and self.model.opsets.get("", 1) < ALONG_AXES
        self._add("DequantizeLinear", inputs, result, domain=MICROSOFT if old else "", **given)
        self.same[result] = name, False
        return result

    def _bias(self, index: int, node: onnx.NodeProto, q: Q) -> str | None:
        """A bias of integers, in products of the scales of what is multiplied."""
        reading = reading_of(node)
        assert reading is not None
        stored = self.model.initializers
        first, second = (_at(node, other.scale) for other in reading.inputs[:2])
        name, weight = _at(node, q.data), stored.get(_at(node, reading.inputs[1].data))
        if weight is None or not {first, second} <= stored.keys():
            return None
        alpha = next((a.f for a in node.attribute if a.name == "alpha"), 1.0)
        scale = alpha * self.model.array(first).reshape(()) * self.model.array(second)
        turned = any(a.name == "transB" and a.i for a in node.attribute)
        outputs = weight.dims[0 if turned or reading.operator == "Conv" else 1]
        out = node.output[0]
        if name and (name not in stored or len(stored[name].dims) != 1):
            return None
        if not name or len(self.model.consumers[name]) > 1:
            was = self.model.array(name) if name else np.zeros(outputs, np.int32)
            name = self._constant(f"{out}{BIAS}", was)
            self.homes.append(Home(name, index, place=q.data))
        scale = scale.reshape(()) if scale.size == 1 else scale
        scales = self._constant(f"{out}{BIAS}{SCALE}", scale.astype(np.float32))
        axis = -1 if scale.ndim == 0 else 0
        result = f"{out}{BIAS}{REAL}"
        self._dequantise(name, scales, "", axis, result)
        return result

    # --- integer products that are scaled later ---

    def _product(self, index: int, node: onnx.NodeProto, reading: Reading) -> bool:
        """z = MatMulInteger(x, w), y = Cast(z) * (x scale * w scale)."""
        first, second = reading.inputs
        maker = self.dynamic.get(node.input[0])
        weight = self.model.initializers.get(node.input[1])
        if maker is None or _at(node, first.zero) != maker.output[2] or weight is None:
            return False
        found = _Scaling(self.model, maker.output[1]).behind(index)
        axis = second.axis % len(weight.dims)
        scale = None if found is None else _vector(found[0], weight, axis, reading.operator)
        if found is None or scale is None:
            return False
        _, last, members = found
        y = self.model.nodes[last].output[0]
        zero = _at(node, second.zero)
        point = self.model.array(zero) if zero in self.model.initializers else None
        if zero and point is None:
            return False
        vector = max(scale.size, 0 if point is None else point.size) > 1
        shape = (weight.dims[axis],) if vector else ()
        scales = self._own_scale(members, scale, shape)
        if scales is None:
            held = self._constant(f"{y}{SCALE}/held", np.resize(scale, shape).astype(np.float32))
            scales = f"{y}{SCALE}"
            self._add("Identity", [held], scales)  # no initialiser, so that it stays as it is
        if point is not None and point.shape != shape:
            zero = self._constant(f"{y}{ZERO}", np.resize(point, shape))
        name = f"{node.input[1]}{REAL}"
        if name in self.same:
            return False
        self._dequantise(node.input[1], scales, zero, axis if vector else -1, name)
        inputs = [maker.input[0], name]
        if reading.operator == "Conv":
            self._convolution(index, inputs, last, members)
        elif len(weight.dims) != 2 or self._adds(last, weight.dims[1:], reshaped=False):
            self._operator(index, node, "MatMul", inputs, [y])
        else:
            bias = self._zeros(last, y, weight.dims[1:], None)
            self._operator(index, node, "MatMul", inputs, [f"{y}{PRODUCT}"])
            self._add("Add", [f"{y}{PRODUCT}", bias], y)
        self.replaced.update([index, *members])
        return True

    def _own_scale(self, members: Sequence[int], scale: Array, dims: Sequence[int]) -> str | None:
        """The initialiser that alone is the scale of the weights, if there is one."""
        muls = [self.model.nodes[i] for i in members[1:]]
        made = [self.model.producer.get(name, -1) for node in muls for name in node.input]
        muls += [self.model.nodes[i] for i in made if i >= 0 and i not in members]
        names = [n for node in muls for n in node.input if n in self.model.initializers]
        if len(names) != 1 or not self.model.read_once(names[0]):
            return None
        found = self.model.array(names[0])
        same = found.shape == tuple(dims) and np.array_equal(found.reshape(-1), scale.reshape(-1))
        return names[0] if same else None

    def _convolution(self, index: int, inputs: list[str], last: int, members: list[int]) -> None:
        """With the bias that an Add behind it holds."""
        node = self.model.nodes[index]
        dims = self.model.initializers[node.input[1]].dims
        y = self.model.nodes[last].output[0]
        lead = (1,) * (len(dims) - 2)
        found = self._adds(last, (dims[0], *lead))
        if found is None:
            bias = self._zeros(last, y, (dims[0],), None, lead)
        else:
            place, stored, value = found
            members.append(place)
            y = self.model.nodes[place].output[0]
            bias = self._constant(f"{y}{BIAS}", value.reshape(-1))
            self.homes.append(Home(bias, index, stored=stored))
        self._operator(index, node, "Conv", [*inputs, bias], [y])

    def _adds(
        self, index: int, dims: Sequence[int], reshaped: bool = True
    ) -> tuple[int, str, Array] | None:
        """An Add of a constant of these dims that alone reads what a node gives: the Add, the
        initialiser that the constant is (or is reshaped from), and its value."""
        reader = _reader(self.model, self.model.nodes[index].output[0])
        if reader is None or self.model.nodes[reader].op_type != "Add":
            return None
        inputs = list(self.model.nodes[reader].input)
        inputs.remove(self.model.nodes[index].output[0])
        name = inputs[0]
        if name not in self.model.constant_names or not self.model.read_once(name):
            return None
        value = self.model.array(name)
        if value.size != np.prod(dims) or value.shape[-len(dims) :] != tuple(dims):
            return None
        if name not in self.model.initializers and reshaped:
            source = self.model.nodes[self.model.producer[name]]
            name = source.input[0] if source.op_type == "Reshape" else ""
        stored = name in self.model.initializers and self.model.read_once(name)
        return (reader, name, value) if stored else None

    # --- a LSTM ---

    def _recurrent(self, index: int, node: onnx.NodeProto, inputs: Sequence[Q]) -> bool:
        names = []
        for q in inputs:
            name = _at(node, q.data)
            if q.swapped:
                scale, zero = _at(node, q.scale), _at(node, q.zero)
                fixed = {name, scale, zero} - {""} <= self.model.initializers.keys()
                if not fixed or not self.model.read_once(name):
                    return False
                how = Quantised(q.axis, scale, zero or None)
                value = real(self.model, name, how).swapaxes(-1, -2)
                self.swapped[f"{name}{REAL}"] = name, how
                self.same[f"{name}{REAL}"] = name, True
                name = self._constant(f"{name}{REAL}", value)
            names.append(name)
        if not names[3]:
            directions, rows = self.model.initializers[node.input[1]].dims[::2]
            names[3] = self._zeros(index, node.output[0] or label(node), (directions, 2 * rows), 3)
        self._operator(index, node, "LSTM", names, list(node.output))
        self.replaced.add(index)
        return True

    # --- appending ---

    def _operator(
        self,
        index: int,
        node: onnx.NodeProto,
        operator: str,
        inputs: Sequence[str],
        outputs: list[str],
    ) -> None:
        known = defs.get_schema(operator, self.model.opsets.get("", 1), "").attributes
        plain = helper.make_node(operator, inputs, outputs, name=label(node))
        plain.attribute.extend(a for a in node.attribute if a.name in known)
        self._append(plain)
        if operator in LINEAR:
            self.stands_for[next(o for o in outputs if o)] = index

    def _add(
        self, operator: str, inputs: Sequence[str], output: str, domain: str = "", **given: Any
    ) -> None:
        self._append(helper.make_node(operator, inputs, [output], domain=domain, **given))

    def _append(self, node: onnx.NodeProto) -> None:
        self.nodes.append(node)
        self.made.append(node)

    def _constant(self, name: str, value: Array) -> str:
        self.tensors[name] = set_initializer(name, np.asarray(value))
        return name

    def _zeros(
        self,
        index: int,
        out: str,
        dims: Sequence[int],
        place: int | None,
        lead: tuple[int, ...] = (),
    ) -> str:
        """A bias of floats that the operator does not have yet."""
        name = self._constant(f"{out}{BIAS}", np.zeros(dims, np.float32))
        self.homes.append(Home(name, index, place=place, lead=lead))
        return name


@dataclass(frozen=True)
class _Scaling:
    """The Muls behind a product of integers; ``x_scale`` is the scale of the activations."""

    model: Model
    x_scale: str

    def behind(self, index: int) -> tuple[Array, int, list[int]] | None:
        """What the weights are multiplied with, the last node, and all from the Cast to it."""
        cast = _reader(self.model, self.model.nodes[index].output[0])
        if cast is None or self.model.nodes[cast].op_type != "Cast":
            return None
        if next(a.i for a in self.model.nodes[cast].attribute if a.name == "to") != 1:
            return None
        factor, scaled, nodes = np.ones((), np.float64), False, [cast]
        while True:
            y = self.model.nodes[nodes[-1]].output[0]
            reader = _reader(self.model, y)
            found = None if reader is None else self._factor(reader, y)
            if reader is None or found is None or (found[1] and scaled):
                break
            factor, scaled = factor * found[0], scaled or found[1]
            nodes.append(reader)
        return (factor, nodes[-1], nodes) if scaled else None

    def _factor(self, index: int, y: str) -> tuple[Array, bool] | None:
        """What a Mul multiplies ``y`` with, and whether the activations' scale (as one) is in."""
        node = self.model.nodes[index]
        if node.op_type != "Mul" or node.domain or node.input[0] == node.input[1]:
            return None
        name = next(n for n in node.input if n != y)
        if name == self.x_scale:
            return np.ones(()), True
        if name in self.model.constant_names:
            return self.model.array(name).astype(np.float64), False
        source = self.model.producer.get(name)
        if source is None or self.x_scale not in self.model.nodes[source].input:
            return None
        found = self._factor(source, self.x_scale)
        return None if found is None else (found[0], True)


def _vector(scale: Array, weight: onnx.TensorProto, axis: int, operator: str) -> Array | None:
    """A scale as one number or one for each output; ``None`` for any other."""
    if scale.size == 1:
        return scale.reshape(1)
    behind = len(weight.dims) - 2 if operator == "Conv" else 0
    wanted = (weight.dims[axis], *(1,) * behind)
    if scale.size != weight.dims[axis] or scale.shape[-len(wanted) :] != wanted:
        return None
    return scale.reshape(-1)


def _reader(model: Model, name: str) -> int | None:
    return model.consumers[name][0][0] if model.read_once(name) else None


def _at(node: onnx.NodeProto, index: int | None) -> str:
    return node.input[index] if index is not None and index < len(node.input) else ""
