"""What stands behind a product of integers: its scales and its bias.

    z = MatMulInteger(x, w)    y = Cast(z) * (x scale * w scale) + bias

The bias may also be added to z, divided by the scales and rounded (ONNX Runtime's quantiser before
1.7 wrote it so).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from graphprune.model import Array, Model

FLOAT = 1  # what a Cast goes to
ROUNDING = ("Cast", "Floor", "Round", "Reshape")


@dataclass(frozen=True)
class Scaled:
    """``factor`` is what the weights are multiplied with, in one number or one for each output.

    ``nodes`` lead from the product to ``last``, which gives real numbers. ``bias`` is the
    initialiser that is added on the way, and its value; ``keeps_add`` says that the Add behind
    ``last`` has one. ``own`` is the initialiser that alone is ``factor``, read for nothing else.
    """

    factor: Array
    nodes: tuple[int, ...]
    bias: tuple[str, Array] | None
    keeps_add: bool
    own: str | None

    @property
    def last(self) -> int:
        return self.nodes[-1]


@dataclass
class Scaling:
    """``x_scale`` is the scale of the activations; what differs by output is of shape ``outputs``:
    that of the outputs and of what stands behind them."""

    model: Model
    x_scale: str
    outputs: Sequence[int]
    muls: set[int] = field(default_factory=set)  # that scales go into
    divides: set[int] = field(default_factory=set)  # what a bias is made whole with

    def behind(self, index: int) -> Scaled | None:
        """From the product's only reader on; ``None`` where it is read in another way."""
        at, path, bias = self._reader(index), [], None
        if at is not None and self.model.nodes[at].op_type == "Add":
            bias = self._rounded(at, self.model.nodes[index].output[0])
            path, at = [at], self._reader(at) if bias else None
        factor = None if at is None or not self._casts(at) else self._multiplied([*path, at])
        if factor is None:
            return None
        vector, path = factor
        own = self._own(vector, path)
        if bias is not None:
            same = np.array_equal(bias[2].reshape(-1), vector)
            return Scaled(vector, tuple(path), bias[:2], False, own) if same else None
        added = self._added(path[-1])
        if added is None or len(self.outputs) == 1:  # that of a matrix stays as it stands
            return Scaled(vector, tuple(path), None, added is not None, own)
        add, name, value = added
        return Scaled(vector, (*path, add), (name, value), False, own)

    def _casts(self, index: int) -> bool:
        node = self.model.nodes[index]
        to = next((a.i for a in node.attribute if a.name == "to"), 0)
        return node.op_type == "Cast" and to == FLOAT

    def _multiplied(self, path: list[int]) -> tuple[Array, list[int]] | None:
        """All that the end of the path is multiplied with, and the path to there."""
        factor, scaled = np.ones((), np.float64), False
        while (at := self._reader(path[-1])) is not None:
            found = self._factor(at, self.model.nodes[path[-1]].output[0])
            if found is None or (found[1] and scaled):
                break
            self.muls.add(at)
            factor, scaled = factor * found[0], scaled or found[1]
            path.append(at)
        vector = self._vector(factor)
        return (vector, path) if scaled and vector is not None else None

    def _reader(self, index: int) -> int | None:
        name = self.model.nodes[index].output[0]
        return self.model.consumers[name][0][0] if self.model.read_once(name) else None

    def _factor(self, index: int, y: str) -> tuple[Array, bool] | None:
        """What a Mul multiplies ``y`` with, and whether the activations' scale (as one) is in."""
        node = self.model.nodes[index]
        if node.op_type != "Mul" or node.domain or node.input[0] == node.input[1]:
            return None
        return self._scale(next(n for n in node.input if n != y))

    def _scale(self, name: str) -> tuple[Array, bool] | None:
        if name == self.x_scale:
            return np.ones(()), True
        if name in self.model.constant_names:
            return self.model.array(name).astype(np.float64), False
        source = self.model.producer.get(name)
        if source is None or self.x_scale not in self.model.nodes[source].input:
            return None
        found = self._factor(source, self.x_scale)
        if found is None or found[1]:
            return None
        self.muls.add(source)
        return found[0], True

    def _rounded(self, index: int, z: str) -> tuple[str, Array, Array] | None:
        """A bias that is rounded to integers when the model runs: bias / (x scale * w scale)."""
        name = next((n for n in self.model.nodes[index].input if n != z), z)
        while True:
            source = self.model.producer.get(name)
            if source is None or not self.model.read_once(name):
                return None
            node = self.model.nodes[source]
            if node.op_type not in ROUNDING:
                break
            name = node.input[0]
        if node.op_type != "Div" or node.input[0] not in self.model.initializers:
            return None
        self.divides.add(source)
        found = self._scale(node.input[1])
        value = self.model.array(node.input[0])
        if found is None or not found[1] or value.size != self.outputs[0]:
            return None
        return (node.input[0], value, found[0]) if self.model.read_once(node.input[0]) else None

    def _vector(self, factor: Array) -> Array | None:
        """One number or one for each output; ``None`` for any other."""
        if factor.size == 1:
            return factor.reshape(1)
        mine = factor.shape[-len(self.outputs) :] == tuple(self.outputs)
        return factor.reshape(-1) if mine and factor.size == self.outputs[0] else None

    def _own(self, factor: Array, path: Sequence[int]) -> str | None:
        nodes, known = self.model.nodes, self.model.initializers
        names = {str(n) for i in self.muls for n in nodes[i].input if n in known}
        if len(names) != 1:
            return None
        name = names.pop()
        inside = self.muls - {path[-1]}
        reads = {i for k in inside for i, _ in self.model.consumers[nodes[k].output[0]]}
        rest = reads - set(path) - self.divides
        rest |= {i for i, _ in self.model.consumers[name]} - self.muls
        same = np.array_equal(self.model.array(name).reshape(-1), factor)
        return name if same and not rest and name not in self.model.output_names else None

    def _added(self, index: int) -> tuple[int, str, Array] | None:
        """An Add of a constant for each output that alone reads what a node gives: the Add, the
        initialiser that the constant is (or is reshaped from), and its value."""
        y = self.model.nodes[index].output[0]
        reader = self._reader(index)
        if reader is None or self.model.nodes[reader].op_type != "Add":
            return None
        name = next((n for n in self.model.nodes[reader].input if n != y), y)
        if name not in self.model.constant_names or not self.model.read_once(name):
            return None
        value = self.model.array(name)
        dims = tuple(self.outputs)
        if value.size != dims[0] or value.shape[-len(dims) :] != dims:
            return None
        if name not in self.model.initializers and len(dims) > 1:
            source = self.model.nodes[self.model.producer[name]]
            name = source.input[0] if source.op_type == "Reshape" else ""
        stored = name in self.model.initializers and self.model.read_once(name)
        return (reader, name, value) if stored else None
