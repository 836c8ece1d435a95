"""Operators with a contraction: convolutions, matrix products, Einsum."""

from __future__ import annotations

import re

from graphprune.rules.op import Op, RefusedError, Table
from graphprune.slots import Axis

table = Table()


@table.rule("Conv")
def conv(op: Op) -> None:
    """``w``: [C_out, C_in / group, *kernel]. Inside a group, everything reads everything.

    A grouped convolution loses whole groups, or the same positions of every group.
    """
    convolution(op, bias=2)


@table.rule("DeformConv")
def deformable_conv(op: Op) -> None:
    """Convolution at places that ``offset`` moves (and ``mask`` weighs), by group of channels."""
    x = op.input(0)
    convolution(op, bias=3)
    for i in (2, 4):
        if op.has(i):
            op.tie(op.input(i)[0], x[0])
    if int(op.attr("offset_group", 1)) > 1:
        op.pin(x[1], "channels share offsets in groups")


def convolution(op: Op, bias: int) -> None:
    x, w, y = op.input(0), op.input(1), op.output()
    groups = _groups(op, len(x[1]))
    op.tie(x[0], y[0])
    op.produce(w[0], y[1])
    if groups == 1:
        op.consume(x[1], 1, 1)
    else:
        group = op.virtual(groups)
        op.contract(1, 1)
        op.fold(x[1], [group, w[1]])
        inside = op.virtual(len(y[1]) // groups)
        op.fold(y[1], [group, inside])
        op.channels(inside)
        op.count_attr("group", group)
    if op.has(bias):
        op.tie(op.input(bias)[0], y[1])
    op.macs(*y, *w.axes[1:])


def _groups(op: Op, channels: int) -> int:
    groups = int(op.attr("group", 1))
    if groups < 1 or channels % groups:
        raise RefusedError(f"{channels} channels in {groups} groups")
    return groups


@table.rule("ConvTranspose")
def conv_transpose(op: Op) -> None:
    """``w``: [C_in, C_out / group, *kernel]."""
    x, w, y = op.input(0), op.input(1), op.output()
    groups = _groups(op, len(x[1]))
    op.tie(x[0], y[0])
    op.consume(x[1], 1, 0)
    if groups == 1:
        op.produce(w[1], y[1])
    else:
        group = op.virtual(groups)
        op.fold(x[1], [group, op.virtual(len(x[1]) // groups)])
        op.fold(y[1], [group, w[1]])
        op.count_attr("group", group)
    if op.has(2):
        op.tie(op.input(2)[0], y[1])
    op.macs(*x, *w.axes[1:])


@table.rule("Gemm")
def gemm(op: Op) -> None:
    """``y = alpha * a' @ b' + beta * c``."""
    a, b, y = op.input(0), op.input(1), op.output()
    inner_a, outer_a = (0, 1) if op.attr("transA", 0) else (1, 0)
    inner_b, outer_b = (1, 0) if op.attr("transB", 0) else (0, 1)
    op.produce(a[outer_a], y[0])
    op.produce(b[outer_b], y[1])
    op.consume(a[inner_a], 1, inner_b)
    if op.has(2):
        op.broadcast(op.input(2), y)
    op.macs(*y, b[inner_b])


@table.rule("MatMul")
def matmul(op: Op) -> None:
    """numpy's matmul: leading axes are a batch, vectors gain an axis that is dropped again."""
    product(op)


def product(op: Op, swap_a: bool = False, swap_b: bool = False) -> None:
    """A matrix product, the last two axes of ``a`` or ``b`` exchanged first where that is said."""
    a, b, y = op.input(0), op.input(1), op.output()
    batch = y.rank - (a.rank > 1) - (b.rank > 1)
    inner_a, outer_a = (a.rank - 2, a.rank - 1) if swap_a else (a.rank - 1, a.rank - 2)
    inner_b, outer_b = (b.rank - 1, b.rank - 2) if swap_b else (max(0, b.rank - 2), b.rank - 1)
    if a.rank > 1:
        op.produce(a[outer_a], y[batch])
    if b.rank > 1:
        op.produce(b[outer_b], y[y.rank - 1])
    op.consume(a[inner_a], 1, inner_b)
    for i, x in enumerate((a, b)):
        for axis, target in zip(x.axes[:-2][::-1], y.axes[:batch][::-1], strict=False):
            op.tie(axis, target) if len(axis) == len(target) else op.free(axis)
            if op.constant[i] and len(axis) > 1:
                op.experts(axis)
    if not any(op.constant[:2]):
        for axis in y.axes[min(1, batch - 1) : batch]:  # the first of several is the batch itself
            op.heads(axis)
    op.macs(*y, a[inner_a])


@table.rule("Einsum")
def einsum(op: Op) -> None:
    """Equal letters are tied; letters missing from the output are summed over."""
    equation = str(op.attr("equation")).replace(" ", "")
    sources, arrow, target = equation.partition("->")
    terms = sources.split(",")
    y = op.output()
    named = [_letters(op, term, op.input(i).rank) for i, term in enumerate(terms)]
    if arrow:
        result = _letters(op, target, y.rank)
    else:
        letters = [c for term in named for c in term]
        dots = sorted({c for c in letters if c.startswith(".")}, key=lambda c: -int(c[1:]))
        result = dots + sorted(c for c in set(letters) - set(dots) if letters.count(c) == 1)
    if any(len(set(term)) != len(term) for term in named):
        raise RefusedError("a diagonal (one letter twice in a term)")
    first: dict[str, Axis] = dict(zip(result, y.axes, strict=True))
    for i, term in enumerate(named):
        for j, letter in enumerate(term):
            axis = op.input(i)[j]
            if letter in first and len(first[letter]) == len(axis):
                op.tie(first[letter], axis)
            elif letter in first and len(axis) == 1:
                op.free(axis)
            first.setdefault(letter, axis)
    for letter, axis in first.items():
        places = [(i, t.index(letter)) for i, t in enumerate(named) if letter in t]
        if letter not in result:
            op.consume(axis, *places[-1])
        elif len(places) > 1 and not any(op.constant):
            op.heads(axis)
        elif len(places) == 1 and op.constant[places[0][0]]:
            op.produce(op.input(places[0][0])[places[0][1]], axis)
        elif constants := [place for place in places if op.constant[place[0]]]:
            op.experts(op.input(constants[0][0])[constants[0][1]])
    op.macs(*first.values())


def _letters(op: Op, term: str, rank: int) -> list[str]:
    """The axes of a term; those under an ellipsis are named by their distance from its end."""
    if "..." not in term:
        return list(term)
    before, after = (re.findall(r"[A-Za-z]", part) for part in term.split("..."))
    dots = rank - len(before) - len(after)
    return [*before, *(f".{i}" for i in range(dots)[::-1]), *after]
