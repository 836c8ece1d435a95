"""Operators on quantised tensors: the float operator's rule, on a view without scales.

An integer tensor stands for (q - zero point) * scale, so a quantised operator relates its tensors
as the float one does. What is new: scales and zero points along an axis leave with it, and what is
as good as absence is the zero point.
"""

from __future__ import annotations

from dataclasses import replace

from graphprune.quantisation import Quantised
from graphprune.readings import MICROSOFT, READINGS, Q, channels_last, reading_of
from graphprune.relations import Role
from graphprune.rules import (
    attention,
    contrib,
    elementwise,
    linear,
    movement,
    normalisation,
    pooling,
    recurrent,
)
from graphprune.rules.op import Op, RefusedError, Table
from graphprune.slots import SlotTensor

table = Table()
FLOAT = elementwise.table | linear.table | movement.table | normalisation.table | pooling.table
FLOAT |= contrib.table
# What the units of a recurrent operator are computed with: weights, bias, first states, peepholes.
COMPUTED_WITH = {1: Role.PRODUCER, 2: Role.PRODUCER, 3: Role.VECTOR, 5: Role.VECTOR}
COMPUTED_WITH |= {6: Role.VECTOR, recurrent.PEEPHOLES: Role.VECTOR}
ONE_AXIS = 13  # the opset from which Softmax is over one axis


def as_float(op: Op) -> Op:
    """The node as the float operator sees it that it stands for."""
    reading = reading_of(op.node)
    if reading is None:
        raise RefusedError("not known as a float operator")
    shown = reading.shown(op.node)
    for index in reading.result:
        if op.has(index) and any(len(axis) > 1 for axis in op.input(index)):
            raise RefusedError("the output's scale is a vector")
        if op.has(index):
            op.free(*op.input(index))
    return replace(
        op,
        x=tuple(op.x[q.data] if op.has(q.data) else None for q in shown),
        values=tuple(op.value(q.data) for q in shown),
        constant=tuple(op.has(q.data) and op.constant[q.data] for q in shown),
        places=tuple(q.data for q in shown),
        integers=tuple(_integers(op, q) for q in shown),
    )


def _integers(op: Op, q: Q) -> Quantised | None:
    """Tie the input's scale and zero point to it, and say how it reads; None if it is a float."""
    if q.zero is None or not op.has(q.data):
        return None
    data = op.input(q.data)
    axis = q.axis % max(1, data.rank)
    for index in (q.scale, q.zero):
        if index is not None and op.has(index):
            along(op, op.input(index), data, axis)
    how = Quantised(axis, _name(op, q.scale), _name(op, q.zero))
    op.quantised(q.data, how)
    return how


def along(op: Op, parameter: SlotTensor, data: SlotTensor, axis: int) -> None:
    """A scale or zero point: one number, a vector along ``axis``, or broadcast."""
    if all(len(a) == 1 for a in parameter):
        op.free(*parameter)
    elif parameter.rank == 1:
        op.tie(parameter[0], data[axis])
    elif parameter.rank == data.rank:
        op.broadcast(parameter, data)
    elif parameter.rank == data.rank - 1:  # for each matrix and column
        op.same_axes(parameter.axes, [*data.axes[:-2], data[-1]])
    else:
        raise RefusedError(f"a scale of shape {list(parameter.shape)}")


def _name(op: Op, index: int | None) -> str | None:
    return op.input(index).name if index is not None and op.has(index) else None


def quantised(op: Op) -> None:
    """The float operator's rule; a bias that it has no input for is added at the end."""
    reading = READINGS[op.node.domain, op.type]
    FLOAT[reading.domain, reading.operator](as_float(op))
    if reading.added is not None and op.has(reading.added):
        op.broadcast(op.input(reading.added), op.output())


SPECIAL = {"DynamicQuantizeMatMul", "QLinearSoftmax", "QLinearAveragePool"}
SPECIAL |= {"QLinearGlobalAveragePool", "DynamicQuantizeLSTM", "QAttention"}
for (domain, name), _ in READINGS.items():
    if name not in SPECIAL:
        table.rule(name, domain=domain)(quantised)


@table.rule("DynamicQuantizeMatMul", domain=MICROSOFT)
def dynamic_quantise_matmul(op: Op) -> None:
    """A DynamicQuantizeLinear, then a product."""
    quantised(op)
    for axis in range(op.input(0).rank):
        op.contract(0, axis)


@table.rule("DynamicQuantizeLSTM", domain=MICROSOFT)
def dynamic_quantise_lstm(op: Op) -> None:
    """A LSTM that rounds its input and its states, each with a scale from its extremes, and zero.

    So a unit's states must vanish before they are rounded, as they do where no gate reads anything:
    all that the unit computes with is zeroed, not just what reads it.
    """
    view = as_float(op)
    recurrent.layer(view, gates=2, reads=1)
    view.contract(0, 2)
    op.pin(op.input(0)[1], "a batch is rounded as a whole")
    for index in (1, 2):
        op.pin(op.input(index)[0], "directions")
    for index, role in COMPUTED_WITH.items():
        if op.has(index):
            last = op.input(index).rank - 1
            view.contract(index, last)
            op.plays(op.input(index)[last], role)


@table.rule("QAttention", domain=MICROSOFT)
def quantised_attention(op: Op) -> None:
    """``w``: [in, 3 * width] holds queries, keys and values of one width."""
    view = as_float(op)
    h = attention.projected(view, [len(op.input(1)[1]) // 3] * 3)
    op.tie(h.qk, h.v)


@table.rule("QLinearSoftmax", domain=MICROSOFT)
def qlinear_softmax(op: Op) -> None:
    """The attribute ``opset`` says which of Softmax's two meanings it has."""
    quantised(replace(op, version=int(op.attr("opset", ONE_AXIS))))


@table.rule("QLinearAveragePool", "QLinearGlobalAveragePool", domain=MICROSOFT)
def qlinear_pool(op: Op) -> None:
    """Channels second or, with ``channels_last``, last."""
    if not channels_last(op.node):
        return quantised(op)
    x, y = op.input(0), op.output()
    as_float(op)
    op.tie(x[0], y[0])
    op.tie(x[x.rank - 1], y[y.rank - 1])


@table.rule("QuantizeLinear", "DequantizeLinear")
@table.rule("QuantizeLinear", "DequantizeLinear", domain=MICROSOFT)
def quantise(op: Op) -> None:
    """Element by element; scales per tensor, along ``axis``, or for every block along it."""
    x, y = op.input(0), op.output()
    axis = op.axis(default=1) if x.rank else 0
    block = int(op.attr("block_size", 0))
    op.same(x, y)
    for parameter in op.x[1:]:
        if parameter is not None and block:
            _blocks(op, parameter, x, axis, block)
        elif parameter is not None:
            along(op, parameter, x, axis)
    if op.type == "DequantizeLinear":
        op.quantised(0, Quantised(axis, _name(op, 1), _name(op, 2), block))
        op.relations.dequantised[y.name] = op.index


def _blocks(op: Op, parameter: SlotTensor, x: SlotTensor, axis: int, block: int) -> None:
    """One number for each block of ``axis``: whole blocks leave."""
    if parameter.rank != x.rank or len(parameter[axis]) * block != len(x[axis]):
        raise RefusedError(f"an axis of {len(x[axis])} is no multiple of blocks of {block}")
    inside = op.virtual(block)
    op.pin(inside, "a block has one scale")
    op.same(parameter, x, but=[axis])
    op.fold(x[axis], [parameter[axis], inside])


@table.rule("DynamicQuantizeLinear")
def dynamic_quantise(op: Op) -> None:
    """The scale comes from the extremes over the whole tensor, and zero: zeros change neither."""
    x = op.input(0)
    op.same(x, op.output())
    for axis in range(x.rank):
        op.contract(0, axis)
    for y in op.y[1:]:
        if y is not None:
            op.free(*y)
