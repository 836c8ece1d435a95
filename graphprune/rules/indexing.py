"""Operators that read or write elements by position: those stay, the other axes go through."""

from __future__ import annotations

import numpy as np

from graphprune.rules.op import Op, RefusedError, Table

table = Table()


@table.rule("GatherND")
def gather_nd(op: Op) -> None:
    """``data``: [batch.., looked up.., rest..]; ``indices``: [batch.., i.., looked up axes]."""
    x, indices, y = op.input(0), op.input(1), op.output()
    batch = int(op.attr("batch_dims", 0))
    looked_up = len(indices[indices.rank - 1])
    for a, b in zip(indices.axes[:-1], y.axes, strict=False):
        op.tie(a, b)
    op.same_axes(x.axes[:batch], y.axes[:batch])
    op.same_axes(x.axes[batch + looked_up :], y.axes[indices.rank - 1 :])
    first = x[batch] if batch < x.rank else None
    if looked_up == 1 and first is not None and op.look_up(1, first):
        if op.constant[0]:
            op.experts(first)
        return
    for axis in x.axes[batch : batch + looked_up]:
        op.pin(axis, "indices along the axis")


@table.rule("ScatterND")
def scatter_nd(op: Op) -> None:
    """``updates``: [i.., rest..] overwrite the places of ``data`` [looked up.., rest..]."""
    x, indices, updates, y = op.input(0), op.input(1), op.input(2), op.output()
    looked_up = len(indices[indices.rank - 1])
    if looked_up == 1 and indices.rank == 2 and op.constant[1] and _overwritten(op):
        return
    op.same_axes(x.axes[looked_up:], y.axes[looked_up:])
    op.same_axes(updates.axes[indices.rank - 1 :], y.axes[looked_up:])
    for axis in x.axes[:looked_up]:
        op.pin(axis, "indices along the axis")


def _overwritten(op: Op) -> bool:
    """Known slots of the first axis get other values (``x[:, :8] = v``): they stay what they were,
    and each leaves with its row of the updates. Whether that is what happens."""
    x, indices, updates, y = op.input(0), op.input(1), op.input(2), op.output()
    value = op.value(1)
    if value is None or not value.size or str(op.attr("reduction", "none")) != "none":
        return False
    rows = value.reshape(-1).astype(np.int64)
    if rows.min() < 0 or rows.max() >= len(x[0]) or len(np.unique(rows)) < len(rows):
        return False
    op.same(x, y)
    op.tie(updates[0], y[0].slots[rows])
    op.tie(indices[0], updates[0])
    op.free(indices[1])
    op.same_axes(updates.axes[1:], y.axes[1:])
    op.renumber(1, x[0])
    return True


@table.rule("GatherElements")
def gather_elements(op: Op) -> None:
    """``y[i, j] = x[indices[i, j], j]``: axes but the one looked up along correspond."""
    x, indices, y = op.input(0), op.input(1), op.output()
    axis = op.axis(default=0)
    op.same(indices, y)
    known = op.look_up(1, x[axis])
    for a, b in zip(x, y, strict=True):
        if known and a.index == axis:
            continue
        if a.index == axis or len(a) != len(b):
            op.pin(a, "indices along the axis")
        else:
            op.tie(a, b)


@table.rule("ScatterElements", "Scatter")
def scatter_elements(op: Op) -> None:
    """``y[indices[i, j], j] = updates[i, j]``, everything else as in ``x``."""
    x, indices, updates, y = op.input(0), op.input(1), op.input(2), op.output()
    axis = op.axis(default=0)
    known = op.look_up(1, x[axis])
    for i, (a, b) in enumerate(zip(x, y, strict=True)):
        if known and i == axis:
            op.tie(a, b)
            op.tie(indices[i], updates[i])
            continue
        if i == axis or len(a) != len(updates[i]):
            op.pin(a, "indices along the axis")
            op.tie(a, b)
            continue
        op.tie(a, b)
        op.tie(updates[i], b)
        op.tie(indices[i], b)


@table.rule("OneHot")
def one_hot(op: Op) -> None:
    """A new axis of positions; the others are the indices'."""
    indices, y = op.input(0), op.output()
    axis = int(op.attr("axis", -1)) % y.rank
    op.same_axes(indices.axes, [a for a in y if a.index != axis])
    depth = op.value(1)
    if depth is not None and depth.size == 1 and op.look_up(0, y[axis]):
        return op.count_input(1, 0, y[axis])
    op.pin(y[axis], "positions along the axis")


@table.rule("CenterCropPad")
def center_crop_pad(op: Op) -> None:
    """Named axes are cut or padded about their middle."""
    x, y = op.input(0), op.output()
    axes = op.attr("axes")
    op.same(x, y, but=range(x.rank) if axes is None else [axis % x.rank for axis in axes])


@table.rule("DFT")
def fourier(op: Op) -> None:
    """A transform along one axis of [.., real and imaginary]."""
    x, y = op.input(0), op.output()
    axis = op.attr("axis", 1)
    if op.version >= 20:
        value = op.value(2)
        if op.has(2) and value is None:
            raise RefusedError("the axis is not known before run time")
        axis = -2 if value is None else int(value.reshape(-1)[0])
    op.same(x, y, but=[axis % x.rank, x.rank - 1])
