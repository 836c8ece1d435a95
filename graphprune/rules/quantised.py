"""Operators on quantised tensors: a float operator's rule, on a view without scales.

An integer tensor stands for (q - zero point) * scale, so a quantised operator relates its tensors
as the float one does. What is new: scales and zero points along an axis leave with it, and what is
as good as absence is the zero point.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from graphprune.quantisation import Quantised
from graphprune.rules import elementwise, linear, movement, normalisation, pooling
from graphprune.rules.op import Op, RefusedError, Table
from graphprune.slots import SlotTensor

table = Table()
MICROSOFT = "com.microsoft"
LATER = 13  # the opset from which Softmax is over one axis


@dataclass(frozen=True)
class Q:
    """Where a quantised input stands, with its scale and zero point; vectors run along ``axis``."""

    data: int
    scale: int | None = None
    zero: int | None = None
    axis: int = 0


def as_float(op: Op, *shown: Q, result: Sequence[int] = ()) -> Op:
    """The node as a float operator sees it: of its inputs only ``shown``, in that order.

    ``result`` are the places of the output's scale and zero point, one number each.
    """
    integers: list[Quantised | None] = []
    for q in shown:
        present = op.has(q.data) and q.zero is not None
        integers.append(_reading(op, q) if present else None)
    for index in result:
        _one_number(op, index)
    places = tuple(q.data for q in shown)
    return replace(
        op,
        x=tuple(op.x[i] if op.has(i) else None for i in places),
        values=tuple(op.value(i) for i in places),
        constant=tuple(op.has(i) and op.constant[i] for i in places),
        places=places,
        integers=tuple(integers),
    )


def _reading(op: Op, q: Q) -> Quantised:
    """Tie the input's scale and zero point to it, and say how it reads."""
    data = op.input(q.data)
    axis = q.axis % max(1, data.rank)
    for index in (q.scale, q.zero):
        if index is not None and op.has(index):
            along(op, op.input(index), data, axis)
    scale = _name(op, q.scale)
    how = Quantised(axis, scale, _name(op, q.zero))
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
    else:
        raise RefusedError(f"a scale of shape {list(parameter.shape)}")


def _name(op: Op, index: int | None) -> str | None:
    return op.input(index).name if index is not None and op.has(index) else None


def _one_number(op: Op, index: int) -> None:
    if not op.has(index):
        return
    if any(len(axis) > 1 for axis in op.input(index)):
        raise RefusedError("the output's scale is a vector")
    op.free(*op.input(index))


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
    how = Quantised(axis, _name(op, 1), _name(op, 2), block)
    if op.type == "DequantizeLinear":
        op.quantised(0, how)
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
    for index in (1, 2):
        if index < len(op.y) and op.y[index] is not None:
            op.free(*op.output(index))


@table.rule("QLinearConv")
def qlinear_conv(op: Op) -> None:
    linear.conv(as_float(op, Q(0, 1, 2, 1), Q(3, 4, 5, 0), Q(8), result=(6, 7)))


@table.rule("ConvInteger")
def conv_integer(op: Op) -> None:
    linear.conv(as_float(op, Q(0, None, 2, 1), Q(1, None, 3, 0)))


@table.rule("QLinearMatMul")
def qlinear_matmul(op: Op) -> None:
    """Scales of ``a`` may be one for each row, those of ``b`` one for each column."""
    linear.matmul(as_float(op, Q(0, 1, 2, -2), Q(3, 4, 5, -1), result=(6, 7)))


@table.rule("MatMulInteger")
def matmul_integer(op: Op) -> None:
    linear.matmul(as_float(op, Q(0, None, 2, -2), Q(1, None, 3, -1)))


@table.rule("MatMulIntegerToFloat", domain=MICROSOFT)
def matmul_integer_to_float(op: Op) -> None:
    linear.matmul(as_float(op, Q(0, 2, 4, -2), Q(1, 3, 5, -1)))
    _bias(op, 6)


@table.rule("DynamicQuantizeMatMul", domain=MICROSOFT)
def dynamic_quantise_matmul(op: Op) -> None:
    """As DynamicQuantizeLinear, then a product: no slot of ``a`` may leave but as zeros do."""
    view = as_float(op, Q(0), Q(1, 2, 3, -1))
    linear.matmul(view)
    _bias(op, 4)
    for axis in range(op.input(0).rank):
        op.contract(0, axis)


def _bias(op: Op, index: int) -> None:
    if op.has(index):
        op.broadcast(op.input(index), op.output())


@table.rule("QGemm", domain=MICROSOFT)
def qgemm(op: Op) -> None:
    column = 0 if op.attr("transB", 0) else 1
    linear.gemm(as_float(op, Q(0, 1, 2), Q(3, 4, 5, column), Q(6), result=(7, 8)))


@table.rule("QLinearAdd", "QLinearMul", domain=MICROSOFT)
def qlinear_broadcast(op: Op) -> None:
    elementwise.broadcast(as_float(op, Q(0, 1, 2), Q(3, 4, 5), result=(6, 7)))


@table.rule("QLinearWhere", domain=MICROSOFT)
def qlinear_where(op: Op) -> None:
    elementwise.broadcast(as_float(op, Q(0), Q(1, 2, 3), Q(4, 5, 6), result=(7, 8)))


@table.rule("QLinearSigmoid", "QLinearLeakyRelu", domain=MICROSOFT)
def qlinear_unary(op: Op) -> None:
    elementwise.unary(as_float(op, Q(0, 1, 2), result=(3, 4)))


@table.rule("QLinearSoftmax", domain=MICROSOFT)
def qlinear_softmax(op: Op) -> None:
    """The attribute ``opset`` says which of Softmax's two meanings it has."""
    view = as_float(op, Q(0, 1, 2), result=(3, 4))
    normalisation.softmax(replace(view, version=int(op.attr("opset", LATER))))


@table.rule("QLinearAveragePool", "QLinearGlobalAveragePool", domain=MICROSOFT)
def qlinear_pool(op: Op) -> None:
    """Channels second or, with ``channels_last``, last."""
    view = as_float(op, Q(0, 1, 2), result=(3, 4))
    if not op.attr("channels_last", 0):
        return pooling.pool(view)
    x, y = op.input(0), op.output()
    op.tie(x[0], y[0])
    op.tie(x[x.rank - 1], y[y.rank - 1])


@table.rule("QLinearConcat", domain=MICROSOFT)
def qlinear_concat(op: Op) -> None:
    """Scale and zero point of the output first, then (tensor, scale, zero point) for each piece."""
    pieces = [Q(i, i + 1, i + 2) for i in range(2, len(op.x), 3)]
    movement.concat(as_float(op, *pieces, result=(0, 1)))
