"""What activations look like, from weights alone: random rows of channel values that walk the graph.

A tensor is stood for by rows, each the channel values at one position of one imagined sample; axes
along which positions are alike have length 1. Linear operators multiply rows, what moves data moves
their columns, everything else runs on them as it is; BatchNormalization sets each channel to the
mean and variance that it stored. Means and covariances of any tensor can then be read off the rows.

Assumptions, where weights say nothing: floating inputs are standard normal, the channels of a
picture alike (``PICTURE``); values of a channel ``d`` positions apart correlate as ``NEAR ** d``;
positions beyond a border look like others; all tokens of a sequence are alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from graphprune.coupling import Coupling
from graphprune.errors import ModelError
from graphprune.linear import CONVOLUTIONS, RECURRENT, Linear, Matrix, linears
from graphprune.model import Array, Model, label
from graphprune.rules.elementwise import BROADCAST, UNARY
from graphprune.runtime import index_bounds, input_dtype, run_session, session
from graphprune.shapes import Shape, Shapes

Index = NDArray[np.int64]
Known = Mapping[str, "Rows | str"]

NEAR = 0.9  # correlation of a channel's values at neighbouring positions
PICTURE = 0.9  # correlation of the channels of a graph input that has few of them
FEW = 4  # channels of a picture at most
LARGEST = 1 << 26  # elements of rows at a time: a wider tensor is unknown
TINY = 1e-12

ELEMENTWISE = {*UNARY, *BROADCAST, "Clip", "CastLike", "Dropout", "QuickGelu", "FastGelu"}
ALONG_LAST = {"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"} | {
    "LpNormalization"
}
MOVES = {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Split", "Gather"} | {
    "Expand",
    "Tile",
    "DepthToSpace",
    "SpaceToDepth",
}
PASSES = {"AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Resize", "Upsample"}
REDUCTIONS: dict[str, Callable[..., Matrix]] = {
    "ReduceMean": np.mean,
    "ReduceSum": np.sum,
    "ReduceMax": np.max,
    "ReduceMin": np.min,
}


@dataclass(frozen=True)
class Rows:
    """``values`` [rows, columns], and the column that each element of the tensor reads.

    ``index`` has the tensor's rank, length 1 along axes where all positions are alike; -1 is zero.
    """

    values: Matrix
    index: Index

    @staticmethod
    def of(array: Array) -> Rows:
        """From [rows, *axes of the tensor]."""
        columns = np.arange(prod(array.shape[1:]), dtype=np.int64)
        values = array.reshape(len(array), -1).astype(np.float64)
        return Rows(values, columns.reshape(array.shape[1:]))

    def full(self) -> Matrix:
        """[rows, *index.shape]."""
        if len(self.values) * self.index.size > LARGEST:
            raise StopError("too wide")
        if (self.index >= 0).all():
            return np.asarray(self.values[:, self.index])
        zero = np.zeros((len(self.values), 1))
        return np.asarray(np.concatenate([self.values, zero], axis=1)[:, self.index])

    def channels(self, axis: int) -> Index:
        """Column of each element along ``axis``, all other axes being alike."""
        if self.index.size != self.index.shape[axis]:
            raise StopError("positions differ")
        return self.index.reshape(-1)


class StopError(Exception):
    """Nothing is known of what this node computes."""


def propagate(
    model: Model, shapes: Shapes, coupling: Coupling, *, rows: int = 2048, seed: int = 0
) -> Iterator[tuple[str, Rows | str]]:
    """Every tensor that depends on the inputs, in node order, with its rows, or with the reason
    why nothing is known of it. One walk; rows that no later node reads are let go."""
    walk = _Walk(model, shapes, rows, np.random.default_rng(seed))
    known: dict[str, Rows | str] = {}
    for value in model.inputs:
        known[value.name] = walk.start(value, _channel_axis(model, coupling, value.name))
        yield value.name, known[value.name]
    last = {name: max(i for i, _ in reads) for name, reads in model.consumers.items()}
    for i, node in enumerate(model.nodes):
        if all(walk.constant(name) for name in node.output if name):
            continue
        found = walk.step(i, node, known)
        known |= found
        yield from found.items()
        for name in {*node.input, *node.output}:
            if last.get(name, i) <= i:
                known.pop(name, None)


def _channel_axis(model: Model, coupling: Coupling, name: str) -> int | None:
    """The axis of a graph input that a weight's contracted axis is tied to."""
    slots = coupling.relations.slots.tensors
    contracted = [
        slots[linear.weight][linear.contracted_axis].slots
        for linear in linears(model)
        if linear.weight in slots
    ]
    read = np.unique(coupling.labels[np.concatenate([*contracted, np.empty(0, np.int64)])])
    for axis in slots[name] if name in slots else ():
        if len(axis) > 1 and np.isin(coupling.labels[axis.slots], read).all():
            return axis.index
    return None


@dataclass(frozen=True)
class _Walk:
    """One walk over a model's nodes; ``step`` gives a node's outputs."""

    model: Model
    shapes: Shapes
    rows: int
    rng: np.random.Generator
    linear: dict[int, Linear] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "linear", {found.node: found for found in linears(self.model)})

    def constant(self, name: str) -> bool:
        return name in self.shapes.value or name in self.model.constant_names

    def value(self, name: str) -> Array:
        found = self.shapes.value.get(name)
        return self.model.array(name) if found is None else found

    def shape(self, name: str) -> Shape:
        found = self.shapes.shape.get(name)
        if found is None:
            raise StopError("unknown shape")
        return found

    def start(self, value: onnx.ValueInfoProto, axis: int | None) -> Rows:
        """Standard normal channels; ids below the size of their table; ones for masks."""
        dtype, rank = input_dtype(value), len(self.shapes.inputs[value.name])
        if dtype.kind in "iu":
            bound = max(2, min(index_bounds(self.model, self.shapes, value.name), default=2))
            ids = np.ones(self.rows) if bound == 2 else self.rng.integers(0, bound, self.rows)
            return Rows.of(ids.reshape(self.rows, *(1,) * rank))
        if dtype.kind != "f":
            return Rows.of(np.ones((self.rows, *(1,) * rank)))
        axis = (1 if rank > 2 else rank - 1) if axis is None else axis
        lengths = [1] * rank
        if rank:
            lengths[axis] = self.shapes.inputs[value.name][axis]
        normal = self.rng.standard_normal((self.rows, *lengths))
        if rank > 2 and lengths[axis] <= FEW:
            shared = self.rng.standard_normal((self.rows, *(1,) * rank))
            normal = PICTURE**0.5 * shared + (1 - PICTURE) ** 0.5 * normal
        return Rows.of(normal)

    def step(self, place: int, node: onnx.NodeProto, known: Known) -> dict[str, Rows | str]:
        outputs = [name for name in node.output if name]
        data = [known.get(name, "captured") for name in node.input if name and not self.constant(name)]
        unknown = next((found for found in data if isinstance(found, str)), None)
        given = {name: found for name, found in known.items() if isinstance(found, Rows)}
        try:
            if unknown is not None and node.op_type != "BatchNormalization":
                return dict.fromkeys(outputs, unknown)
            done = self._results(place, node, given)
        except (StopError, ModelError) as error:
            return dict.fromkeys(outputs, f"{node.op_type} {label(node)!r}: {error}")
        return {name: found for name, found in zip(node.output, done, strict=False) if name}

    def _results(
        self, place: int, node: onnx.NodeProto, given: Mapping[str, Rows]
    ) -> Sequence[Rows]:
        kind = node.op_type
        first = given.get(node.input[0]) if node.input else None
        if kind == "BatchNormalization":
            return [self._batch_norm(node, first)]
        if place in self.linear and kind not in RECURRENT and first is not None:
            return [self._linear(self.linear[place], first)]
        if kind == "MatMul":
            return [self._product(node, given)]
        if kind in ELEMENTWISE or (kind == "Gather" and first is None):
            return self._elementwise(node, given)
        if kind in ("Softmax", "LogSoftmax", *ALONG_LAST) and first is not None:
            return [self._along(node, first)]
        if kind in ("InstanceNormalization", "GroupNormalization") and first is not None:
            return [self._group_norm(node, first)]
        if kind in REDUCTIONS and first is not None:
            return [self._reduced(node, first)]
        if kind in MOVES and first is not None:
            return self._moved(node, first)
        if kind == "Concat":
            return [self._concat(node, given)]
        if kind == "Pad" and first is not None:
            return [self._padded(node, first)]
        if kind == "MaxPool" and first is not None:
            return [self._max_pool(node, first)]
        if kind in PASSES and first is not None:
            first.channels(1)
            return [first]
        raise StopError("nothing is known of what it computes")

    # --- linear operators ---

    def _linear(self, linear: Linear, x: Rows) -> Rows:
        matrix = linear.matrix(self.model)  # [groups, out, in]
        outputs = matrix.shape[0] * matrix.shape[1]
        bias = 0.0
        if linear.bias_node is None:
            bias = linear.offset(self.model, outputs).reshape(-1)
        if linear.kind not in CONVOLUTIONS:
            return Rows.of(x.full() @ matrix[0].T + bias)
        values = x.full()[:, x.index * 0 + np.arange(1)] if False else x.full()
        x.channels(1)
        y = self._convolved(values.reshape(self.rows, -1), linear, matrix) + bias
        return Rows.of(y.reshape(self.rows, 1, outputs, *(1,) * len(linear.kernel)))

    def _convolved(self, x: Matrix, linear: Linear, matrix: Matrix) -> Matrix:
        """Sums over channels and taps; every tap sees another position."""
        groups, outputs, _ = matrix.shape
        taps = matrix.reshape(groups, outputs, -1, linear.taps)
        if linear.kind == "ConvTranspose":  # a position is reached by these many taps only
            taps = taps / prod(linear.strides)
        mean = x.mean(0)
        near = _nearness(linear.kernel)
        own = (x - mean).reshape(self.rows, groups, -1).transpose(1, 0, 2)
        y = own @ (taps @ near).transpose(0, 2, 1)
        for t in np.flatnonzero(near < 1):
            other = own[:, self.rng.permutation(self.rows)]
            y += (1 - near[t] ** 2) ** 0.5 * (other @ taps[..., t].transpose(0, 2, 1))
        y += mean.reshape(groups, 1, -1) @ taps.sum(-1).transpose(0, 2, 1)
        return np.asarray(y.transpose(1, 0, 2).reshape(self.rows, -1))

    def _product(self, node: onnx.NodeProto, given: Mapping[str, Rows]) -> Rows:
        """A sum over an axis of equal positions is one of them times its length."""
        a, b = (self._operand(name, given) for name in node.input)
        rank = max(a.ndim, b.ndim)
        if min(a.ndim, b.ndim) < 3:
            raise StopError("a product of vectors")
        a, b = (x.reshape(len(x), *(1,) * (rank - x.ndim), *x.shape[1:]) for x in (a, b))
        length = self.shape(node.input[0])[-1]
        if a.shape[-1] == b.shape[-2] == 1:
            return Rows.of(length * (a @ b))
        a = np.broadcast_to(a, (*a.shape[:-1], length))
        b = np.broadcast_to(b, (*b.shape[:-2], length, b.shape[-1]))
        return Rows.of(a @ b)

    def _operand(self, name: str, given: Mapping[str, Rows]) -> Matrix:
        if name in given:
            return given[name].full()
        return np.asarray(self.value(name).astype(np.float64)[None])

    # --- normalisations ---

    def _batch_norm(self, node: onnx.NodeProto, x: Rows | None) -> Rows:
        """Rows with the stored moments, scaled and shifted; independent ones where x is unknown."""
        if _attribute(node, "training_mode", 0) or not all(map(self.constant, node.input[1:5])):
            raise StopError("its statistics are not stored")
        scale, shift, mean, variance = (
            self.value(name).astype(np.float64) for name in node.input[1:5]
        )
        factor = scale * np.sqrt(variance / (variance + _attribute(node, "epsilon", 1e-5)))
        if x is None:
            lengths = [1, len(mean), *(1,) * (len(self.shape(node.output[0])) - 2)]
            unit = self.rng.standard_normal((self.rows, *lengths))
        else:
            unit = self._standardised(x.full(), len(mean))
        return Rows.of(_by_channel(unit, factor, shift))

    def _standardised(self, x: Matrix, groups: int) -> Matrix:
        """Zero mean and unit variance over rows for each of the groups of channels (axis 2)."""
        parts = x.reshape(len(x), x.shape[1], groups, -1)
        axes = (0, 1, 3)
        parts = parts - parts.mean(axes, keepdims=True)
        variance = np.square(parts).mean(axes, keepdims=True)
        flat = variance <= TINY * max(float(variance.max()), TINY)
        noise = self.rng.standard_normal(parts.shape) if flat.any() else 0.0
        unit = np.where(flat, noise, parts / np.sqrt(np.where(flat, 1.0, variance)))
        return np.asarray(unit.reshape(x.shape))

    def _group_norm(self, node: onnx.NodeProto, x: Rows) -> Rows:
        """Statistics over a sample's positions are taken for those over rows."""
        full = x.full()
        channels = full.shape[2]
        groups = _attribute(node, "num_groups", channels)
        scale, shift = (self.value(name).astype(np.float64) for name in node.input[1:3])
        scale, shift = (np.repeat(v, channels // v.size) for v in (scale, shift))
        return Rows.of(_by_channel(self._standardised(full, groups), scale, shift))

    def _along(self, node: onnx.NodeProto, x: Rows) -> Rows:
        """Operators along one axis or the last ones. Softmax over equal positions is their share."""
        shape = self.shape(node.input[0])
        axis = _attribute(node, "axis", -1) % len(shape)
        softmax = node.op_type in ("Softmax", "LogSoftmax")
        if softmax and self.model.opsets.get("", 0) < 13 and axis != len(shape) - 1:
            raise StopError("a softmax over several axes")
        if softmax and x.index.shape[axis] == 1:
            share = 1 / shape[axis] if node.op_type == "Softmax" else -np.log(shape[axis])
            return Rows.of(np.full((self.rows, *x.index.shape), share))
        last = onnx.NodeProto()
        last.CopyFrom(node)
        for attribute in list(last.attribute):
            if attribute.name == "axis":
                last.attribute.remove(attribute)
        last.attribute.append(helper.make_attribute("axis", axis - len(shape)))
        arrays = {name: self.value(name) for name in node.input[1:] if name}
        return self._run(last, arrays | {node.input[0]: x.full()})[0]

    def _reduced(self, node: onnx.NodeProto, x: Rows) -> Rows:
        shape = self.shape(node.input[0])
        axes = _attribute(node, "axes", None)
        if axes is None and len(node.input) > 1 and node.input[1]:
            axes = self.value(node.input[1]).reshape(-1).tolist()
        if not axes and _attribute(node, "noop_with_empty_axes", 0):
            return x
        over = [axis % len(shape) for axis in axes or range(len(shape))]
        keep = bool(_attribute(node, "keepdims", 1))
        full = x.full()
        result = REDUCTIONS[node.op_type](full, axis=tuple(a + 1 for a in over), keepdims=keep)
        if node.op_type == "ReduceSum":
            result = result * prod(shape[a] for a in over if x.index.shape[a] == 1)
        return Rows.of(np.asarray(result))

    # --- element by element ---

    def _elementwise(self, node: onnx.NodeProto, given: Mapping[str, Rows]) -> list[Rows]:
        data = {name: given[name] for name in node.input if name in given}
        fixed = {name: self.value(name) for name in node.input if name and name not in data}
        gather = node.op_type == "Gather"
        if gather and (_attribute(node, "axis", 0) != 0 or len(data) != 1):
            raise StopError("a look-up along another axis")
        if len(data) == 1 and not gather and all(array.size == 1 for array in fixed.values()):
            (name, x), *_ = data.items()
            if (x.index >= 0).all():
                alone = self._run(node, {name: x.values} | {n: a.reshape(()) for n, a in fixed.items()} if node.op_type not in ("CastLike",) else {name: x.values} | fixed)
                return [Rows(y.values, x.index) for y in alone]
        rank = max([x.index.ndim for x in data.values()] + [a.ndim for a in fixed.values()])
        if gather:
            return self._run(node, fixed | {name: x.full() for name, x in data.items()})
        arrays = {}
        for name, x in data.items():
            full = x.full()
            lead = (1,) * (rank - x.index.ndim)
            arrays[name] = full.reshape(len(full), *lead, *full.shape[1:])
        lengths = self._alike(data, rank)
        for name, array in fixed.items():
            arrays[name] = self._drawn(array, lengths)
        return self._run(node, arrays)

    def _alike(self, data: Mapping[str, Rows], rank: int) -> list[bool]:
        """Axes, counted from the right in ``rank``, along which the data's positions are alike."""
        alike = [False] * rank
        for back in range(1, rank + 1):
            held = [x.index.shape[-back] for x in data.values() if x.index.ndim >= back]
            real = [self.shape(n)[-back] for n, x in data.items() if x.index.ndim >= back]
            alike[-back] = max(held, default=1) == 1 and max(real, default=1) > 1
        return alike

    def _drawn(self, array: Array, alike: Sequence[bool]) -> Array:
        """A constant that differs where positions are alike: each row draws one position."""
        for axis in range(array.ndim):
            back = axis - array.ndim
            if array.shape[axis] > 1 and alike[back]:
                break
        else:
            return array
        whole = array.reshape(*(1,) * (len(alike) - array.ndim), *array.shape)
        places: list[Any] = []
        for axis, length in enumerate(whole.shape):
            if length > 1 and alike[axis]:
                drawn = self.rng.integers(0, length, self.rows)
                places.append(drawn.reshape(-1, *(1,) * whole.ndim))
            else:
                form = [1] * (whole.ndim + 1)
                form[axis + 1] = length
                places.append(np.arange(length).reshape(form))
        return np.asarray(whole[tuple(places)])

    def _run(self, node: onnx.NodeProto, arrays: Mapping[str, Array]) -> list[Rows]:
        """The node itself, on rows in front of the tensor's axes."""
        names = list(dict.fromkeys(name for name in node.input if name))
        types = {name: self._type(name, arrays[name]) for name in names}
        feeds = {
            name: np.asarray(arrays[name]).astype(helper.tensor_dtype_to_np_dtype(types[name]))
            for name in names
        }
        first = node.output[0]
        outputs = {first: self.shapes.dtype.get(first, TensorProto.FLOAT)}
        return [Rows.of(y) for y in _alone(self.model, node, feeds, types, outputs)]

    def _type(self, name: str, array: Array) -> int:
        return self.shapes.dtype.get(name) or int(helper.np_dtype_to_tensor_dtype(array.dtype))

    # --- data movement ---

    def _moved(self, node: onnx.NodeProto, x: Rows) -> list[Rows]:
        """The node moves column numbers (from 1; 0 is a zero) at the tensor's real size."""
        columns = np.broadcast_to(x.index + 1, self.shape(node.input[0])).astype(np.float64)
        feeds = {node.input[0]: columns}
        types = {node.input[0]: int(TensorProto.DOUBLE)}
        for name in node.input[1:]:
            if name and not self.constant(name):
                raise StopError("where to is not fixed")
            if name:
                feeds[name] = self.value(name)
                types[name] = int(helper.np_dtype_to_tensor_dtype(feeds[name].dtype))
        outputs = {name: int(TensorProto.DOUBLE) for name in node.output if name}
        moved = _alone(self.model, node, feeds, types, outputs)
        return [Rows(x.values, _collapsed(y.astype(np.int64) - 1)) for y in moved]

    def _concat(self, node: onnx.NodeProto, given: Mapping[str, Rows]) -> Rows:
        pieces = [self._piece(name, given) for name in node.input]
        shapes = [self.shape(name) for name in node.input]
        axis = _attribute(node, "axis", 1) % len(shapes[0])
        pairs = list(zip(pieces, shapes, strict=True))
        if any(p.index.shape[axis] == 1 < s[axis] for p, s in pairs):
            return self._mixture(pieces, [s[axis] for s in shapes])
        lengths = np.max([p.index.shape for p in pieces], axis=0)
        indices, start = [], 0
        for piece in pieces:
            target = (*lengths[:axis], piece.index.shape[axis], *lengths[axis + 1 :])
            index = np.where(piece.index >= 0, piece.index + start, -1)
            indices.append(np.broadcast_to(index, target))
            start += piece.values.shape[1]
        values = np.concatenate([p.values for p in pieces], axis=1)
        return Rows(values, np.concatenate(indices, axis=axis))

    def _mixture(self, pieces: Sequence[Rows], lengths: Sequence[int]) -> Rows:
        """Positions of several kinds in a row: each row draws one of them."""
        drawn = self.rng.choice(len(pieces), self.rows, p=np.array(lengths) / sum(lengths))
        full = np.broadcast_arrays(*(piece.full() for piece in pieces))
        return Rows.of(np.stack(full)[drawn, np.arange(self.rows)])

    def _piece(self, name: str, given: Mapping[str, Rows]) -> Rows:
        if name in given:
            return given[name]
        array = self.value(name)
        values = np.broadcast_to(array.reshape(1, -1), (self.rows, array.size))
        index = _collapsed(np.arange(array.size).reshape(array.shape))
        return Rows(values.astype(np.float64), index)

    def _padded(self, node: onnx.NodeProto, x: Rows) -> Rows:
        """Zeros beside channels; those beside positions look like others."""
        pads = _attribute(node, "pads", None)
        if pads is None:
            pads = self.value(node.input[1]).reshape(-1).tolist()
        rank = x.index.ndim
        axes = range(rank)
        if len(node.input) > 3 and node.input[3]:
            axes = [int(a) % rank for a in self.value(node.input[3]).reshape(-1)]
        value = 0.0
        if len(node.input) > 2 and node.input[2]:
            value = float(self.value(node.input[2]).reshape(-1)[0])
        widths = [(0, 0)] * rank
        real = self.shape(node.input[0])
        for i, axis in enumerate(axes):
            if not x.index.shape[axis] == 1 < real[axis]:
                widths[axis] = (pads[i], pads[i + len(pads) // 2])
        if not np.any(widths):
            return x
        if value != 0 or _attribute(node, "mode", b"constant") != b"constant" or np.min(widths) < 0:
            raise StopError("channels padded with something else than zeros")
        return Rows(x.values, np.pad(x.index, widths, constant_values=-1))

    def _max_pool(self, node: onnx.NodeProto, x: Rows) -> Rows:
        """The largest of as many positions as the window has."""
        x.channels(1)
        mean = x.values.mean(0)
        own = x.values - mean
        best = np.full_like(own, -np.inf)
        for near in _nearness(_attribute(node, "kernel_shape", ())):
            other = own[self.rng.permutation(self.rows)]
            best = np.maximum(best, near * own + (1 - near**2) ** 0.5 * other)
        return Rows(mean + best, x.index)


def _nearness(kernel: Sequence[int]) -> Matrix:
    """Correlation of every tap's values with those at the window's middle."""
    if not kernel:
        return np.ones(1)
    steps = [np.abs(np.arange(size) - (size - 1) // 2) for size in kernel]
    distance = np.sum(np.meshgrid(*steps, indexing="ij"), axis=0).reshape(-1)
    return np.asarray(NEAR**distance)


def _by_channel(x: Matrix, factor: Matrix, shift: Matrix) -> Matrix:
    """Affine along axis 2: [rows, batch, channels, …]."""
    form = (-1, *(1,) * (x.ndim - 3))
    return x * factor.reshape(form) + shift.reshape(form)


def _collapsed(index: Index) -> Index:
    """Length 1 along every axis along which nothing changes."""
    for axis in range(index.ndim):
        first = np.take(index, [0], axis=axis) if index.shape[axis] else index
        if index.shape[axis] > 1 and (index == first).all():
            index = first
    return np.ascontiguousarray(index)


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    found = next((a for a in node.attribute if a.name == name), None)
    return default if found is None else helper.get_attribute_value(found)


def _alone(
    model: Model,
    node: onnx.NodeProto,
    feeds: Mapping[str, Array],
    types: Mapping[str, int],
    outputs: Mapping[str, int],
) -> list[Array]:
    """The node run as a model of its own; shapes are left open."""
    skeleton = onnx.ModelProto(ir_version=model.skeleton.ir_version)
    skeleton.opset_import.extend(model.skeleton.opset_import)
    skeleton.graph.name = "alone"
    skeleton.graph.node.append(node)
    for side, table in (
        (skeleton.graph.input, types),
        (skeleton.graph.output, outputs),
    ):
        for name, kind in table.items():
            side.append(helper.make_value_info(name, helper.make_tensor_type_proto(kind, None)))
    return run_session(session(Model(skeleton, {}), threads=1), feeds)
