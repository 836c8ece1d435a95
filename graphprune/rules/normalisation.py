"""Normalisations, softmax and reductions: what takes statistics over which axis."""

from __future__ import annotations

import numpy as np

from graphprune.relations import Role
from graphprune.rules.op import Op, Table

table = Table()


@table.rule("BatchNormalization")
def batch_normalization(op: Op) -> None:
    """Per channel; scale, bias, mean and variance each hold one number per channel.

    In training mode statistics are the batch's, over all axes but the channels'.
    """
    x, y = op.input(0), op.output()
    channel = x[min(1, x.rank - 1)]
    op.same(x, y)
    op.scale(1, channel)
    for index in (2, 3):
        op.tie(op.input(index)[0], channel)
    if not op.attr("training_mode", 0):
        op.in_place(0)
        return op.scale(4, channel, Role.VARIANCE)
    op.tie(op.input(4)[0], channel)
    op.shift(*(axis for axis in x if axis.index != channel.index))
    for statistic in op.y[1:]:
        if statistic is not None:
            op.tie(statistic[0], channel)


@table.rule("InstanceNormalization")
def instance_normalization(op: Op) -> None:
    """Statistics over the spatial axes, per sample and channel."""
    x = op.input(0)
    op.same(x, op.output())
    op.scale(1, x[1])
    op.tie(op.input(2)[0], x[1])
    op.shift(*x.axes[2:])


@table.rule("GroupNormalization")
def group_normalization(op: Op) -> None:
    """Statistics over a group of channels: whole groups leave exactly, single channels do not.

    Scale and bias have ``num_groups`` elements up to opset 20 and C from opset 21.
    """
    x = op.input(0)
    groups = int(op.attr("num_groups"))
    group, inner = op.virtual(groups), op.virtual(len(x[1]) // groups)
    op.same(x, op.output())
    op.fold(x[1], [group, inner])
    op.shift(inner, *x.axes[2:])
    op.count_attr("num_groups", group)
    for parameter in op.x[1:]:
        if parameter is not None:
            op.tie(parameter[0], group if op.version < 21 else x[1])


@table.rule("LayerNormalization", "RMSNormalization")
def layer_normalization(op: Op) -> None:
    """Statistics over all axes from ``axis`` on."""
    x, y = op.input(0), op.output()
    axis = op.axis(default=-1)
    op.same(x, y)
    for parameter in op.x[1:]:
        if parameter is not None:
            op.broadcast(parameter, x)
    for statistic in op.y[1:]:
        if statistic is not None:
            op.same(x, statistic, but=range(axis, x.rank))
            op.free(*statistic.axes[axis:])
    op.shift(*x.axes[axis:])


@table.rule("MeanVarianceNormalization")
def mean_variance_normalization(op: Op) -> None:
    x = op.input(0)
    op.same(x, op.output())
    op.shift(*(x[axis % x.rank] for axis in op.attr("axes", [0, 2, 3])))


@table.rule("LpNormalization")
def lp_normalization(op: Op) -> None:
    """Zeros add nothing to a norm: removal is exact."""
    op.same(op.input(0), op.output())
    op.contract(0, op.axis(default=-1))


@table.rule("LRN")
def lrn(op: Op) -> None:
    """A window over neighbouring channels: closing a gap changes who is whose neighbour."""
    x = op.input(0)
    op.same(x, op.output())
    op.shift(x[1])


@table.rule("Softmax", "LogSoftmax", "Hardmax")
def softmax(op: Op) -> None:
    """Before opset 13 all axes from ``axis`` on are one distribution."""
    x = op.input(0)
    op.same(x, op.output())
    op.in_place(0)
    first = op.axis(default=1 if op.version < 13 else -1)
    axes = x.axes[first:] if op.version < 13 else (x[first],)
    op.shift(*axes)
    longer = [axis for axis in axes if len(axis) > 1]
    if len(longer) == 1:
        op.choose(0, longer[0].index)


@table.rule("CumSum", "CumProd")
def cumulative(op: Op) -> None:
    x = op.input(0)
    value = op.value(1)
    op.same(x, op.output())
    op.shift(*(x.axes if value is None else [x[int(value.reshape(-1)[0]) % x.rank]]))


@table.rule("TopK")
def top_k(op: Op) -> None:
    """Positions along ``axis`` are part of the answer; the other axes go through."""
    x, axis = op.input(0), op.axis(default=-1)
    given = op.attr("k") if op.version < 10 else op.value(1)
    for y in op.y:
        if y is not None:
            op.same(x, y, but=[axis])
            op.pin(y[axis], "as many as are taken")
    if given is None:
        return op.pin(x[axis], "how many are taken is not known before run time")
    taken = int(np.reshape(given, -1)[0])
    op.choose(0, axis, taken, smallest=not op.attr("largest", 1))
    op.numbers(1, x[axis])


REDUCE = """
ReduceMean ReduceSum ReduceMax ReduceMin ReduceProd ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp
ReduceSumSquare
""".split()
ZERO_IS_NEUTRAL = {"ReduceSum", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceSumSquare"}


@table.rule(*REDUCE)
def reduce(op: Op) -> None:
    """Kept axes go through; reduced ones may leave where a zero adds nothing."""
    x, y = op.input(0), op.output()
    axes = op.list_of("axes", 1)
    if not axes:
        axes = [] if op.attr("noop_with_empty_axes", 0) else list(range(x.rank))
    reduced = {axis % max(1, x.rank) for axis in axes}
    _reduce(op, reduced)
    for axis in sorted(reduced):
        if op.type in ZERO_IS_NEUTRAL:
            op.contract(0, axis)
        else:
            op.shift(x[axis])
        if op.type in ("ReduceMax", "ReduceMin"):
            op.choose(0, axis, smallest=op.type == "ReduceMin")
    op.free(*(axis for axis in y if len(axis) == 1))


@table.rule("ArgMax", "ArgMin")
def arg_reduce(op: Op) -> None:
    """The answer is a position along ``axis``."""
    axis = op.axis(default=0)
    _reduce(op, {axis})
    op.choose(0, axis, smallest=op.type == "ArgMin")
    op.numbers(0, op.input(0)[axis])


def _reduce(op: Op, reduced: set[int]) -> None:
    x, y = op.input(0), op.output()
    kept = [axis for axis in x if axis.index not in reduced]
    if op.attr("keepdims", 1):
        op.free(*(y[i] for i in reduced))
        targets = [axis for axis in y if axis.index not in reduced]
    else:
        targets = list(y)
    for a, b in zip(kept, targets, strict=True):
        op.tie(a, b)
