"""What each operator does to rows: one rule per operator, in a flat table.

Three assumptions stand in for what weights do not say: values of a channel that lie ``d`` positions
apart correlate as ``NEAR ** d``, positions beyond a border look like others, and tokens of a
sequence are alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from graphprune.linear import CONVOLUTIONS, RECURRENT, Matrix
from graphprune.model import Array
from graphprune.repair.rows import Index, Rows, Step, StopError, alone
from graphprune.repair.softened import read_alike
from graphprune.rules.elementwise import BROADCAST, UNARY

Rule = Callable[[Step], list[Rows]]
RULES: dict[str, Rule] = {}

NEAR = 0.6  # measured on CIFAR ResNets: 0.4 to 0.7 repair alike, 0.2 and 0.9 less
TINY = 1e-12
REDUCTIONS: dict[str, Callable[..., Matrix]] = {
    "ReduceMean": np.mean,
    "ReduceSum": np.sum,
    "ReduceMax": np.max,
    "ReduceMin": np.min,
}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def enter(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return enter


# --- linear operators ---


@rule(*CONVOLUTIONS, "Gemm")
def linear(step: Step) -> list[Rows]:
    """Rows times the weights."""
    op = step.linear
    if op is None or op.kind in RECURRENT:
        raise StopError("its weights are shared or computed")
    matrix = op.matrix(step.model)  # [groups, out, in]
    outputs = matrix.shape[0] * matrix.shape[1]
    bias = np.zeros(outputs)
    if op.bias_node is None:  # else the Add comes as a node of its own
        bias = op.offset(step.model, outputs).reshape(-1)
    if op.kind not in CONVOLUTIONS:
        x = step.x.full()
        x = np.broadcast_to(x, (*x.shape[:-1], matrix.shape[2]))
        y = x.reshape(-1, x.shape[-1]) @ matrix[0].T  # one product, not one for every row
        return [Rows.of((y + bias).reshape(*x.shape[:-1], outputs))]
    channels = step.x.along(1, step.shape(op.x)[1])
    x = Rows(step.x.values, channels).full().reshape(step.rows, len(matrix), -1)
    taps = matrix.reshape(*matrix.shape[:2], x.shape[2], op.taps)
    if op.kind == "ConvTranspose":  # a position is reached by this share of the taps
        taps = taps / prod(op.strides)
    y = _convolved(x, taps, _nearness(op.kernel), step.rng) + bias
    return [Rows.of(y.reshape(step.rows, 1, outputs, *(1,) * len(op.kernel)))]


def _convolved(x: Matrix, taps: Matrix, near: Matrix, rng: np.random.Generator) -> Matrix:
    """Sums over channels and taps: [rows, outputs]. Another position's values are partly the
    row's own, partly those of another row. x: [rows, groups, in], taps: [groups, out, in, taps]."""
    mean = x.mean(0)
    own = np.ascontiguousarray((x - mean).transpose(1, 0, 2))  # [groups, rows, in]
    y = _times(own, taps @ near) + _times(mean[:, None], taps.sum(-1))
    for t in np.flatnonzero(near < 1):
        weights = (1 - near[t] ** 2) ** 0.5 * taps[..., t]
        shift = int(rng.integers(1, len(x)))
        y[:, shift:] += _times(own[:, :-shift], weights)
        y[:, :shift] += _times(own[:, -shift:], weights)
    return np.asarray(y.transpose(1, 0, 2).reshape(len(x), -1))


def _times(x: Matrix, weights: Matrix) -> Matrix:
    """[groups, rows, in] times [groups, out, in]: [groups, rows, out]."""
    matrix = weights.transpose(0, 2, 1)
    return np.asarray(x * matrix if x.shape[2] == 1 else x @ matrix)


def _nearness(kernel: Sequence[int]) -> Matrix:
    """Correlation of every tap's values with those in the middle of the window: [taps]."""
    if not kernel:
        return np.ones(1)
    steps = [np.abs(np.arange(size) - (size - 1) // 2) for size in kernel]
    distance = np.sum(np.meshgrid(*steps, indexing="ij"), axis=0).reshape(-1)
    return np.asarray(NEAR**distance)


@rule("MatMul")
def product(step: Step) -> list[Rows]:
    """A sum over an axis of equal positions is one of them times its length."""
    if step.linear is not None:
        return linear(step)
    first, second = step.node.input
    a, b = _operand(step, first), _operand(step, second)
    if min(a.ndim, b.ndim) < 3:
        raise StopError("a product of vectors")
    rank = max(a.ndim, b.ndim)
    a, b = (x.reshape(len(x), *(1,) * (rank - x.ndim), *x.shape[1:]) for x in (a, b))
    length = step.shape(first)[-1]
    if a.shape[-1] == b.shape[-2] == 1:
        return [Rows.of(length * (a @ b))]
    a = np.broadcast_to(a, (*a.shape[:-1], length))
    b = np.broadcast_to(b, (*b.shape[:-2], length, b.shape[-1]))
    return [Rows.of(a @ b)]


def _operand(step: Step, name: str) -> Matrix:
    """[rows, …], or [1, …] of a constant."""
    if name in step.given:
        return step.given[name].full()
    return np.asarray(step.value(name).astype(np.float64)[None])


# --- normalisations ---


@rule("BatchNormalization")
def batch_norm(step: Step) -> list[Rows]:
    """Rows with the stored moments, scaled and shifted; independent ones where x is unknown."""
    if step.attribute("training_mode", 0):
        raise StopError("its statistics are not stored")
    scale, shift, variance = (step.value(step.node.input[i]).astype(np.float64) for i in (1, 2, 4))
    factor = scale * np.sqrt(variance / (variance + step.attribute("epsilon", 1e-5)))
    if step.node.input[0] in step.given:
        unit = _standardised(step.x.full(), len(shift), step.rng)
    else:
        rank = len(step.shape(step.node.output[0]))
        unit = step.rng.standard_normal((step.rows, 1, len(shift), *(1,) * (rank - 2)))
    return [Rows.of(_by_channel(unit, factor, shift))]


@rule("InstanceNormalization", "GroupNormalization")
def group_norm(step: Step) -> list[Rows]:
    """Statistics over a sample's positions are taken for those over rows."""
    channels = step.shape(step.node.input[0])[1]
    index = step.x.index
    places = np.broadcast_to(index, (1, channels, *index.shape[2:])).reshape(channels, -1)
    owner = np.full(step.x.values.shape[1], -1)
    owner[places] = np.arange(channels)[:, None]
    if (index < 0).any() or (owner[places] != np.arange(channels)[:, None]).any():
        raise StopError("its channels are alike")
    groups = step.attribute("num_groups", channels)
    scale, shift = (step.value(name).astype(np.float64) for name in step.node.input[1:3])
    scale, shift = (np.repeat(v, channels // v.size)[owner] for v in (scale, shift))
    values = step.x.values.copy()
    for group in range(groups):
        mine = owner * groups // channels == group
        values[:, mine] = _standardised(values[:, None, mine], 1, step.rng)[:, 0]
    return [Rows(values * scale + shift, index)]


def _standardised(x: Matrix, groups: int, rng: np.random.Generator) -> Matrix:
    """Zero mean and unit variance over rows for each of the groups of channels (axis 2)."""
    if x.shape[2] % groups:
        raise StopError("its channels are alike")
    parts = x.reshape(len(x), x.shape[1], groups, -1)
    parts = parts - parts.mean((0, 1, 3), keepdims=True)
    variance = np.square(parts).mean((0, 1, 3), keepdims=True)
    flat = variance <= TINY * max(float(variance.max()), TINY)
    noise = rng.standard_normal(parts.shape) if flat.any() else 0.0
    unit = np.where(flat, noise, parts / np.sqrt(np.where(flat, 1.0, variance)))
    return np.asarray(unit.reshape(x.shape))


def _by_channel(x: Matrix, factor: Matrix, shift: Matrix) -> Matrix:
    """Affine along axis 2: [rows, batch, channels, …]."""
    form = (-1, *(1,) * (x.ndim - 3))
    return x * factor.reshape(form) + shift.reshape(form)


@rule("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "LpNormalization")
def along_axis(step: Step) -> list[Rows]:
    """The node itself, its axis counted from the end."""
    name = step.node.input[0]
    rank = len(step.shape(name))
    node = onnx.NodeProto()
    node.CopyFrom(step.node)
    kept = [a for a in step.node.attribute if a.name != "axis"]
    del node.attribute[:]
    node.attribute.extend(kept)
    axis = step.attribute("axis", -1) % rank - rank
    node.attribute.append(helper.make_attribute("axis", axis))
    arrays = {other: step.value(other) for other in step.names if other != name}
    return [step.run(arrays | {name: step.x.full()}, node)]


@rule("Softmax", "LogSoftmax")
def softmax(step: Step) -> list[Rows]:
    """Over equal positions each has its share."""
    shape = step.shape(step.node.input[0])
    late = step.model.opsets.get("", 0) >= 13
    axis = step.attribute("axis", -1 if late else 1) % len(shape)
    if not late and axis != len(shape) - 1:
        raise StopError("a softmax over several axes")
    if step.x.index.shape[axis] > 1 or shape[axis] == 1:
        return along_axis(step)
    share = 1 / shape[axis] if step.node.op_type == "Softmax" else -np.log(shape[axis])
    return [Rows.of(np.full((step.rows, *step.x.index.shape), share))]


@rule(*REDUCTIONS)
def reduction(step: Step) -> list[Rows]:
    """A sum over equal positions is one of them times their number."""
    shape = step.shape(step.node.input[0])
    axes = step.option("axes", 1)
    if (axes is None or not axes.size) and step.attribute("noop_with_empty_axes", 0):
        return [step.x]
    over = [int(axis) % len(shape) for axis in (range(len(shape)) if axes is None else axes)]
    kept = bool(step.attribute("keepdims", 1))
    reduce = REDUCTIONS[step.node.op_type]
    result = reduce(step.x.full(), axis=tuple(a + 1 for a in over), keepdims=kept)
    if step.node.op_type == "ReduceSum":
        result = result * prod(shape[a] for a in over if step.x.index.shape[a] == 1)
    return [Rows.of(np.asarray(result))]


# --- element by element, position by position ---


@rule(*UNARY, *BROADCAST, "Clip", "CastLike", "Dropout", "QuickGelu", "FastGelu")
def elementwise(step: Step) -> list[Rows]:
    """The node itself."""
    data = {name: step.given[name] for name in step.names if name in step.given}
    fixed = {name: step.value(name) for name in step.names if name not in data}
    if len(data) == 1 and all(array.ndim == 0 for array in fixed.values()):
        (name, x), *_ = data.items()
        if (x.index >= 0).all():  # column by column, wherever they go
            return [Rows(step.run(fixed | {name: x.values}).values, x.index)]
    rank = max(x.ndim for x in [*(x.index for x in data.values()), *fixed.values()])
    alike = _alike(step, data, rank)
    arrays = {name: _drawn(step, array, alike) for name, array in fixed.items()}
    for name, x in data.items():
        lead = (1,) * (rank - x.index.ndim)
        arrays[name] = x.full().reshape(step.rows, *lead, *x.index.shape)
    return [step.run(arrays)]


def _alike(step: Step, data: Mapping[str, Rows], rank: int) -> list[bool]:
    """Axes, of ``rank`` aligned from the right, along which the data's positions are alike."""
    alike = []
    for back in range(-rank, 0):
        reach = [name for name, x in data.items() if x.index.ndim >= -back]
        held = max((data[name].index.shape[back] for name in reach), default=1)
        alike.append(held == 1 < max((step.shape(name)[back] for name in reach), default=1))
    return alike


def _drawn(step: Step, array: Array, alike: Sequence[bool]) -> Array:
    """A constant that differs where positions are alike: each row draws one position."""
    whole = array.reshape(*(1,) * (len(alike) - array.ndim), *array.shape)
    axes = [a for a, length in enumerate(whole.shape) if length > 1 and alike[a]]
    if not axes:
        return array
    places: list[Any] = list(np.ix_(*map(np.arange, whole.shape)))
    for axis, length in enumerate(whole.shape):
        drawn = step.rng.integers(0, length, step.rows) if axis in axes else None
        along = places[axis][None] if drawn is None else drawn.reshape(-1, *(1,) * whole.ndim)
        places[axis] = along
    return np.asarray(whole[tuple(places)])


@rule("AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Resize", "Upsample")
def passed(step: Step) -> list[Rows]:
    """A position of the output looks like one of the input."""
    step.x.along(1, step.shape(step.node.input[0])[1])
    return [step.x]


@rule("MaxPool")
def max_pool(step: Step) -> list[Rows]:
    """The largest of as many positions as the window has."""
    step.x.along(1, step.shape(step.node.input[0])[1])
    mean = step.x.values.mean(0)
    own = step.x.values - mean
    best = np.full_like(own, -np.inf)
    for near in _nearness(step.attribute("kernel_shape")):
        other = own[step.rng.permutation(step.rows)]
        best = np.maximum(best, near * own + (1 - near**2) ** 0.5 * other)
    return [Rows(mean + best, step.x.index)]


@rule("QuantizeLinear")
def quantise(step: Step) -> list[Rows]:
    """What the integers cannot reach is clipped; what they round is left alone."""
    scale, zero = (step.option("", place) for place in (1, 2))
    if scale is None or zero is None or scale.size != 1:
        raise StopError("its scale is no constant, or one for each channel")
    if not read_alike(step.model, step.node):
        raise StopError("its integers are not only read back as the numbers they stand for")
    span = np.iinfo(zero.dtype)
    low, high = (scale.item() * (end - zero.item()) for end in (span.min, span.max))
    return [Rows(np.clip(step.x.values, low, high), step.x.index)]


@rule("DequantizeLinear")
def dequantise(step: Step) -> list[Rows]:
    """Rows of integers are the real numbers already."""
    if step.node.input[0] not in step.model.producer:
        raise StopError("integers that are a graph input")
    return [step.x]


# --- data movement ---


@rule("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Split")
@rule("Expand", "Tile", "DepthToSpace", "SpaceToDepth")
def moved(step: Step) -> list[Rows]:
    """The node moves column numbers (from 1; 0 is a zero) at the tensor's real size."""
    name = step.node.input[0]
    columns = np.broadcast_to(step.x.index + 1, step.shape(name))
    feeds = {name: columns.astype(np.float64)}
    feeds |= {other: step.value(other) for other in step.names if other != name}
    types = {n: int(helper.np_dtype_to_tensor_dtype(array.dtype)) for n, array in feeds.items()}
    outputs = {output: int(TensorProto.DOUBLE) for output in step.node.output if output}
    places = alone(step.model, step.node, feeds, types, outputs)
    return [Rows(step.x.values, _collapsed(place.astype(np.int64) - 1)) for place in places]


@rule("Gather")
def gather(step: Step) -> list[Rows]:
    """Fixed places move columns; a look-up in a table is the node itself."""
    if step.node.input[0] in step.given:
        return moved(step)
    if step.attribute("axis", 0) != 0:
        raise StopError("a look-up along another axis")
    table, places = step.node.input
    return [step.run({table: step.value(table), places: step.given[places].full()})]


@rule("Concat")
def concat(step: Step) -> list[Rows]:
    """Columns side by side. Positions of several kinds in a row: each row draws one of them."""
    pieces = [_piece(step, name) for name in step.node.input]
    shapes = [step.shape(name) for name in step.node.input]
    axis = step.attribute("axis") % len(shapes[0])
    lengths = np.array([shape[axis] for shape in shapes])
    pairs = zip(pieces, lengths, strict=True)
    if any(piece.index.shape[axis] == 1 < length for piece, length in pairs):
        drawn = step.rng.choice(len(pieces), step.rows, p=lengths / lengths.sum())
        full = np.broadcast_arrays(*(piece.full() for piece in pieces))
        return [Rows.of(np.stack(full)[drawn, np.arange(step.rows)])]
    sizes = np.max([piece.index.shape for piece in pieces], axis=0)
    indices, start = [], 0
    for piece in pieces:
        sizes[axis] = piece.index.shape[axis]
        index = np.where(piece.index >= 0, piece.index + start, -1)
        indices.append(np.broadcast_to(index, sizes))
        start += piece.values.shape[1]
    values = np.concatenate([piece.values for piece in pieces], axis=1)
    return [Rows(values, np.concatenate(indices, axis=axis))]


def _piece(step: Step, name: str) -> Rows:
    if name in step.given:
        return step.given[name]
    array = step.value(name)
    values = np.broadcast_to(array.reshape(1, -1), (step.rows, array.size))
    index = _collapsed(np.arange(array.size).reshape(array.shape))
    return Rows(values.astype(np.float64), index)


@rule("Pad")
def pad(step: Step) -> list[Rows]:
    """Zeros beside channels; those beside positions look like others."""
    name = step.node.input[0]
    pads, axes = step.option("pads", 1), step.option("axes", 3)
    rank = step.x.index.ndim
    if pads is None:
        raise StopError("no widths")
    widths = np.zeros((rank, 2), int)
    widths[range(rank) if axes is None else axes.astype(int)] = pads.reshape(2, -1).T
    real = step.shape(name)
    widths[[step.x.index.shape[a] == 1 < real[a] for a in range(rank)]] = 0
    if not widths.any():
        return [step.x]
    value = step.option("value", 2)
    filled = value is not None and value.any()
    if filled or step.attribute("mode", b"constant") != b"constant" or widths.min() < 0:
        raise StopError("channels padded with something else than zeros")
    return [Rows(step.x.values, np.pad(step.x.index, widths, constant_values=-1))]


def _collapsed(index: Index) -> Index:
    """Length 1 along every axis along which nothing changes."""
    for axis, length in enumerate(index.shape):
        first = index.take([0], axis=axis) if length else index
        if length > 1 and (index == first).all():
            index = first
    return np.ascontiguousarray(index)
