"""Operators that move data: each rule applies the operator to the slots themselves."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from graphprune.rules.op import Op, RefusedError, Table
from graphprune.selectors import is_selector, weighs_experts
from graphprune.slots import Axis, SlotTensor

table = Table()
BY_SIZES = "a range of the axis that the sizes of the inputs decide"


@table.rule("Reshape")
def reshape(op: Op) -> None:
    """Input and output are the same row-major sequence, cut differently."""
    x, y = op.input(0), op.output()
    regroup(op, x, y)
    op.view()
    target = op.list_of("shape", 1)
    if target is None:
        raise RefusedError("no target shape")
    for i, size in enumerate(target):
        if size > 0 and op.attr("shape") is None:
            op.count_input(1, i, y[i])
        elif size > 0:
            op.count_attr("shape", y[i], element=i)
        elif size == 0 and len(y[i]) > 1 and not _aligned(x, y, i):
            op.pin(y[i], "a copied dimension (0) that is not the same axis")


def _aligned(x: SlotTensor, y: SlotTensor, i: int) -> bool:
    return np.prod(x.shape[:i]) == np.prod(y.shape[:i]) and len(x[i]) == len(y[i])


@table.rule("Flatten", "Squeeze", "Unsqueeze")
def rank_change(op: Op) -> None:
    """As Reshape, without a literal to keep up to date."""
    regroup(op, op.input(0), op.output())
    op.view()


def regroup(op: Op, x: SlotTensor, y: SlotTensor) -> None:
    """Relate two shapes of one row-major sequence through their common refinement.

    Cut points are the running products of the sizes from the right. An axis that has further cut
    points inside is a fold of the parts between them; a part that is an axis on both sides is tied.
    """
    if 0 in x.shape or np.prod(x.shape) != np.prod(y.shape):
        raise RefusedError("input and output sizes differ")
    cuts = sorted({*_cuts(x), *_cuts(y)})
    if any(b % a for a, b in pairwise(cuts)):
        return _regroup_blocks(op, x, y)
    owner = {(low, high): axis for axis, low, high in _spans(x)}
    for axis, low, high in _spans(y):
        if (low, high) in owner:
            op.tie(owner[low, high], axis)
        else:
            owner[low, high] = axis
    parts = {
        (low, high): owner[low, high].slots if (low, high) in owner else op.virtual(high // low)
        for low, high in pairwise(cuts)
    }
    for axis, low, high in [*_spans(x), *_spans(y)]:
        inside = [c for c in cuts if low <= c <= high]
        pairs = list(pairwise(inside))[::-1]
        if len(pairs) > 1:
            op.fold(axis, [parts[pair] for pair in pairs])
    op.free(*(axis for axis in (*x, *y) if len(axis) == 1))


def _regroup_blocks(op: Op, x: SlotTensor, y: SlotTensor) -> None:
    """No common refinement: tie the axes outside the tangled middle, leave the rest pinned."""
    ends = {low: (axis, high) for axis, low, high in _spans(x)}
    for axis, low, high in _spans(y):
        if low in ends and ends[low][1] == high:
            op.tie(ends[low][0], axis)


def _spans(tensor: SlotTensor) -> list[tuple[Axis, int, int]]:
    """Each axis longer than 1 with the running products (from the right) it lies between."""
    spans, low = [], 1
    for axis in tensor.axes[::-1]:
        if len(axis) > 1:
            spans.append((axis, low, low * len(axis)))
            low *= len(axis)
    return spans


def _cuts(tensor: SlotTensor) -> list[int]:
    return [1, *(high for _, _, high in _spans(tensor))]


@table.rule("Transpose")
def transpose(op: Op) -> None:
    """Axes in another order."""
    x, y = op.input(0), op.output()
    for target, source in enumerate(op.attr("perm") or range(x.rank)[::-1]):
        op.tie(x[source], y[target])


@table.rule("Concat")
def concat(op: Op) -> None:
    """The output along ``axis`` is the inputs' slots one after the other."""
    y = op.output()
    axis = op.axis(default=1, rank=y.rank)
    pieces = [x for x in op.x if x is not None]
    op.tie(np.concatenate([x[axis].slots for x in pieces]), y[axis])
    for x in pieces:
        op.same(x, y, but=[axis])


@table.rule("Split")
def split(op: Op) -> None:
    """Outputs are consecutive pieces of the input along ``axis``; what nobody reads is free."""
    x = op.input(0)
    axis = op.axis(default=0)
    if op.varies(1):
        for y in op.y:
            if y is not None:
                op.same(x, y, but=[axis])
        return op.pin(x[axis], BY_SIZES)
    size = -(-len(x[axis]) // len(op.y))  # of all but the last, where none are given
    sizes = op.list_of("split", 1) or [size] * len(op.y)
    ends = np.minimum(np.cumsum(sizes), len(x[axis]))
    pieces = np.split(x[axis].slots, ends[:-1])
    op.free(x[axis])
    for i, (y, piece) in enumerate(zip(op.y, pieces, strict=True)):
        if y is not None:
            op.tie(piece, y[axis])
            op.same(x, y, but=[axis])
        if op.version < 13:
            op.count_attr("split", piece, element=i)
        else:
            op.count_input(1, i, piece)


@table.rule("Slice")
def slice_(op: Op) -> None:
    """A range of slots along each named axis; outside it they are free to leave."""
    x, y = op.input(0), op.output()
    if any(op.has(i) and op.value(i) is None for i in (1, 2)):
        return _slice_at_run_time(op)
    starts, ends = op.list_of("starts", 1), op.list_of("ends", 2)
    if starts is None or ends is None:
        raise RefusedError("no starts or ends")
    axes = op.list_of("axes", 3) or list(range(len(starts)))
    steps = op.list_of("steps", 4) or [1] * len(starts)
    axes = [axis % x.rank for axis in axes]
    op.same(x, y, but=axes)
    for i, axis in enumerate(axes):
        taken = range(len(x[axis]))[slice(*_bounds(starts[i], ends[i], steps[i], len(x[axis])))]
        if len(taken) == len(x[axis]) and steps[i] == 1:
            op.tie(x[axis], y[axis])
            _count_bounds(op, i, x[axis], starts[i], ends[i])
            continue
        if op.varies(1) or op.varies(2):
            op.pin(x[axis], BY_SIZES)
            continue
        if steps[i] != 1:
            _strided(op, i, x[axis], y[axis], range(starts[i], ends[i], steps[i]))
            continue
        op.tie(x[axis].slots[taken.start : taken.stop], y[axis])
        op.free(x[axis])
        _count_bounds(op, i, x[axis], starts[i], ends[i])


def _slice_at_run_time(op: Op) -> None:
    """Of axes that are known, a range that is not; the other axes go through."""
    x, y = op.input(0), op.output()
    axes = op.list_of("axes", 3) or list(range(len(op.input(1)[0])))
    op.same(x, y, but=[axis % x.rank for axis in axes])
    for axis in axes:
        op.pin(x[axis % x.rank], "a range of the axis that is not known before run time")


def _strided(op: Op, i: int, x: Axis, y: Axis, taken: range) -> None:
    """Every n-th slot of the whole axis: its runs of n slots leave together, others not."""
    every = taken.step
    if not 0 <= taken.start < every or len(x) % every or taken.stop < len(x):
        return op.pin(x, "a stride along the axis")
    run = op.virtual(every)
    op.pin(run, "a stride takes one of each run of slots")
    op.fold(x, [y, run])
    _count_bounds(op, i, x, 0, taken.stop)


def _bounds(start: int, end: int, step: int, size: int) -> tuple[int, int | None, int]:
    """ONNX clamps; Python reads -1 as the last element, so a clamped end below zero is None."""
    if step > 0:
        return start, end, step
    low = end + size if end < 0 else end
    return start, (None if low < 0 else end), step


def _count_bounds(op: Op, i: int, axis: Axis, start: int, end: int) -> None:
    """A bound counts the survivors before it, a negative one those after; clamped ones stay."""
    for index, attr, bound in ((1, "starts", start), (2, "ends", end)):
        if bound == 0 or abs(bound) > len(axis):
            continue
        if bound < 0 and op.attr(attr) is None and not op.constant[index]:
            raise RefusedError("a bound counted from the end is computed at run time")
        slots = axis.slots[:bound] if bound > 0 else axis.slots[bound:]
        if op.attr(attr) is not None:
            op.count_attr(attr, slots, element=i, negative=bound < 0)
        else:
            op.count_input(index, i, slots, negative=bound < 0)


@table.rule("Gather")
def gather(op: Op) -> None:
    """``y[..., i..., ...] = x[..., indices[i...], ...]``; known indices are renumbered."""
    x, y, indices = op.input(0), op.output(), op.input(1)
    axis = op.axis(default=0)
    rest = [*y.axes[:axis], *y.axes[axis + indices.rank :]]
    for a, b in zip([a for a in x if a.index != axis], rest, strict=True):
        op.tie(a, b)
    for a, b in zip(indices, y.axes[axis : axis + indices.rank], strict=True):
        op.tie(a, b)
    value = op.value(1)
    if op.look_up(1, x[axis]):
        return op.experts(x[axis]) if op.constant[0] else None
    if value is None or indices.rank > 1 or not op.constant[1]:
        return op.pin(x[axis], "indices along the axis are not known before run time")
    if value.size and not -len(x[axis]) <= value.min() <= value.max() < len(x[axis]):
        raise RefusedError("indices beyond the axis")
    picked = x[axis].slots[value.astype(np.int64)]
    if indices.rank == 0:
        op.pin(picked, "one position is selected")
    elif is_selector(op.node):
        op.read(picked, y[axis])
        if weighs_experts(op.node):
            op.weigh(y[axis])
    else:
        op.tie(picked, y[axis])
    op.free(x[axis])
    op.renumber(1, x[axis])


@table.rule("Expand")
def expand(op: Op) -> None:
    """Broadcast to a shape given as a tensor."""
    x, y = op.input(0), op.output()
    op.broadcast(x, y)
    op.free(*y)
    target = op.list_of("shape", 1) or []
    for i, size in enumerate(target):
        axis = y[y.rank - len(target) + i]
        if size > 1:
            op.count_input(1, i, axis)


@table.rule("Tile")
def tile(op: Op) -> None:
    """The input repeated along each axis; what repeats a single slot are counts."""
    x, y = op.input(0), op.output()
    if op.version < 6 or op.value(1) is None:
        raise RefusedError("repeats that are not known as one list")
    for i, (a, b) in enumerate(zip(x, y, strict=True)):
        if len(a) == 1 < len(b):
            op.free(a, b)
            op.count_input(1, i, b)
        else:
            op.tie(np.tile(a.slots, len(b) // len(a)), b)


@table.rule("Pad")
def pad(op: Op) -> None:
    """New slots before and after; those that are padding may leave on their own."""
    x, y = op.input(0), op.output()
    pads = op.list_of("pads", 1)
    if pads is None:
        raise RefusedError("no pads")
    axes = [a % x.rank for a in op.list_of("axes", 3) or range(x.rank)]
    constant = op.attr("mode", "constant") == "constant"
    for i, axis in enumerate(axes):
        before, after = pads[i], pads[len(axes) + i]
        if before == after == 0:
            op.tie(x[axis], y[axis])
        elif before < 0 or after < 0 or not constant:
            op.pin(y[axis], "cropping or reflecting along the axis")
        else:
            op.tie(x[axis], y[axis].slots[before : before + len(x[axis])])
            op.free(y[axis])
            for element, slots in (
                (i, y[axis].slots[:before]),
                (len(axes) + i, y[axis].slots[before + len(x[axis]) :]),
            ):
                if op.attr("pads") is not None:
                    op.count_attr("pads", slots, element=element)
                else:
                    op.count_input(1, element, slots)
    op.same(x, y, but=axes)


@table.rule("DepthToSpace")
def depth_to_space(op: Op) -> None:
    """Channels (b, b, C) or, in CRD mode, (C, b, b) become b x b pixels of C channels."""
    x, y = op.input(0), op.output()
    block = int(op.attr("blocksize")) ** 2
    crd = op.attr("mode", "DCR") == "CRD"
    channels = x[1].slots.reshape(-1, block).T if crd else x[1].slots.reshape(block, -1)
    op.tie(x[0], y[0])
    op.tie(channels, np.broadcast_to(y[1].slots, channels.shape))


@table.rule("SpaceToDepth")
def space_to_depth(op: Op) -> None:
    """b x b pixels of C channels become (b, b, C) or, in CRD mode, (C, b, b) channels."""
    x, y = op.input(0), op.output()
    block = int(op.attr("blocksize")) ** 2
    crd = op.attr("mode", "DCR") == "CRD"
    channels = y[1].slots.reshape(-1, block).T if crd else y[1].slots.reshape(block, -1)
    op.tie(x[0], y[0])
    op.tie(np.broadcast_to(x[1].slots, channels.shape), channels)


@table.rule("Shape", "Size")
def shape(op: Op) -> None:
    """Sizes: shape arithmetic keeps the original's numbers, whatever leaves."""
    op.free(*op.input(0))
    op.reads_shape()


@table.rule("ConstantOfShape")
def constant_of_shape(op: Op) -> None:
    """A constant whose sizes are counts."""
    y = op.output()
    op.free(*y)
    for i, axis in enumerate(y):
        op.count_input(0, i, axis)


@table.rule("Compress")
def compress(op: Op) -> None:
    """Positions along ``axis`` are kept or not at run time; the other axes go through."""
    x, y = op.input(0), op.output()
    if op.attr("axis") is None:
        raise RefusedError("positions of the flat tensor are chosen")
    axis = op.axis()
    op.same(x, y, but=[axis])
    op.pin(x[axis], "which positions stay is not known before run time")


@table.rule("EyeLike", "NonMaxSuppression", "NonZero", "Range", "Unique")
def positions(op: Op) -> None:
    """The answer is made of positions or sizes."""
    raise RefusedError("positions are part of the answer")


@table.rule("Trilu")
def trilu(op: Op) -> None:
    """A triangle of the last two axes: their positions matter."""
    x, y = op.input(0), op.output()
    op.same(x, y, but=[x.rank - 2, x.rank - 1])


@table.rule("ReverseSequence")
def reverse_sequence(op: Op) -> None:
    """Reverses along the time axis, for each batch element."""
    op.same(op.input(0), op.output(), but=[op.axis("time_axis", 0), op.axis("batch_axis", 1)])
