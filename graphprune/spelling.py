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
from typing import Any

import numpy as np
import onnx
from onnx import defs, helper

from graphprune.model import Array, Model, label, set_initializer
from graphprune.quantisation import Quantised, real
from graphprune.readings import MICROSOFT, Q, Reading, channels_last, reading_of
from graphprune.scaling import Scaled, Scaling
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
        if node.op_type == "DynamicQuantizeLinear" and len(node.output) > 2:
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
        tuple(home for home in walk.homes if home.name in result.initializers),
        {name: of for name, of in walk.swapped.items() if name in result.initializers},
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
        if axis is None or (axis >= 0 and zero and zero not in self.model.initializers):
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
        stored = self.model.initializers
        if axis >= 0 and zero in stored and stored[zero].dims != stored[scale].dims:
            point = np.resize(self.model.array(zero), tuple(stored[scale].dims))  # one for all
            zero = self._constant(f"{result}{ZERO}", point)
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
        zero = _at(node, second.zero)
        if maker is None or _at(node, first.zero) != maker.output[2] or weight is None:
            return False
        if zero not in {"", *self.model.initializers} or f"{weight.name}{REAL}" in self.same:
            return False
        if len(weight.dims) < 2:
            return False
        axis = second.axis % len(weight.dims)
        if zero and self.model.array(zero).size not in (1, weight.dims[axis]):
            return False
        lead = (1,) * (len(weight.dims) - 2) if reading.operator == "Conv" else ()
        found = Scaling(self.model, maker.output[1], (weight.dims[axis], *lead)).behind(index)
        if found is None:
            return False
        inputs = [maker.input[0], self._scaled_weight(weight, zero, axis, found)]
        y = self.model.nodes[found.last].output[0]
        if reading.operator == "Conv":
            bias, y = self._bias_behind(index, found, lead)
            self._operator(index, node, "Conv", [*inputs, bias], [y])
        elif found.keeps_add or len(weight.dims) != 2:
            self._operator(index, node, "MatMul", inputs, [y])
        else:
            bias, y = self._bias_behind(index, found, ())
            self._operator(index, node, "MatMul", inputs, [f"{y}{PRODUCT}"])
            self._add("Add", [f"{y}{PRODUCT}", bias], y)
        self.replaced.update([index, *found.nodes])
        return True

    def _scaled_weight(self, weight: onnx.TensorProto, zero: str, axis: int, found: Scaled) -> str:
        """The real weights of an integer product."""
        point = self.model.array(zero) if zero else np.zeros(())
        vector = max(found.factor.size, point.size) > 1
        shape = (weight.dims[axis],) if vector else ()
        name = f"{weight.name}{REAL}"
        scale = found.own
        if scale is None or self.model.array(scale).shape != shape:
            held = np.resize(found.factor, shape).astype(np.float32)
            scale = f"{name}{SCALE}"  # no initialiser, so that it stays as it is
            self._add("Identity", [self._constant(f"{scale}/held", held)], scale)
        if zero and point.shape != shape:
            zero = self._constant(f"{name}{ZERO}", np.resize(point, shape))
        return self._dequantise(weight.name, scale, zero, axis if vector else -1, name)

    def _bias_behind(self, index: int, found: Scaled, lead: tuple[int, ...]) -> tuple[str, str]:
        """The bias that an integer product has or gains, and the tensor behind it."""
        y = self.model.nodes[found.last].output[0]
        if found.bias is None:
            weight = self.model.initializers[self.model.nodes[index].input[1]]
            outputs = weight.dims[0 if lead else 1]
            return self._zeros(found.last, y, (outputs,), None, lead), y
        stored, value = found.bias
        bias = self._constant(f"{y}{BIAS}", value.reshape(-1))
        self.homes.append(Home(bias, index, stored=stored))
        return bias, y

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
        """A constant of that name, or of one like it: an earlier run may have left the same."""
        taken = self.model.initializers.keys() | self.model.producer.keys() | self.tensors.keys()
        while name in taken:
            name += "/again"
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


def _at(node: onnx.NodeProto, index: int | None) -> str:
    return node.input[index] if index is not None and index < len(node.input) else ""
