"""Bounds through operators with a contraction: what weights and their inputs' bounds allow.

Weights are read once or twice and in their own type; where nothing bounds an operator's input only
the signs of its rows matter, which is the usual case.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from graphprune.facts.fact import (
    Fact,
    Floats,
    Kinds,
    Line,
    along,
    bits,
    collapsed,
    exactly,
    mixed,
    ranked,
    unknown,
)
from graphprune.facts.seen import Seen, Table
from graphprune.model import Array

table = Table()
SEVERAL = 2
GLANCE = 32  # columns that tell the signs of most rows


def rows_of(weight: Array, low: Floats, high: Floats) -> tuple[Floats, Floats]:
    """Bounds of ``weight`` [groups, rows, columns, taps] times inputs [groups, columns], summed
    over columns and taps: [groups, rows]. Zero times anything is zero."""
    shape = weight.shape[:2]
    if weight.shape[2] == 1:  # depthwise: as many groups as channels, so all at once
        return _column(weight[:, :, 0], low, high)
    bottom, top = np.zeros(shape), np.zeros(shape)
    for g in range(shape[0]):
        nothing = (low[g] == 0) & (high[g] == 0)
        positive = (low[g] == 0) & (high[g] == np.inf) & ~nothing
        finite = np.isfinite(low[g]) & np.isfinite(high[g]) & ~nothing
        above = np.isfinite(low[g]) & (high[g] == np.inf) & ~positive
        rest = ~(nothing | positive | finite | above)
        found = (("+", positive), (">", above), ("~", finite), ("?", rest))
        for kind, columns in found:
            if columns.any():
                part = weight[g] if columns.all() else weight[g][:, columns]
                down, up = _part(part, kind, low[g][columns], high[g][columns])
                bottom[g] += down
                top[g] += up
    return bottom, top


def _column(weight: Array, low: Floats, high: Floats) -> tuple[Floats, Floats]:
    """``weight`` [groups, rows, taps] of one column each; inputs [groups, 1]."""
    up, down = _up_down(weight)
    return _times(up, low) + _times(down, high), _times(up, high) + _times(down, low)


def _times(weight: Floats, bound: Floats) -> Floats:
    """The product, in which zero times anything is zero."""
    nothing = (weight == 0) | (bound == 0)
    return np.where(nothing, 0.0, np.where(nothing, 0.0, weight) * np.where(nothing, 0.0, bound))


def _part(weight: Array, kind: str, low: Floats, high: Floats) -> tuple[Floats, Floats]:
    """``weight`` [rows, columns, taps]; inputs from zero up (``+``), from some number
    up (``>``), bounded (``~``), or not."""
    if kind == "~":
        up, down = _up_down(weight)
        return up @ low + down @ high, up @ high + down @ low
    if kind == "+":
        over, under = _signs(weight)
        return np.where(under, -np.inf, 0.0), np.where(over, np.inf, 0.0)
    if kind == ">":  # rows of one sign alone have a bound
        over, under = _signs(weight)
        at_low = np.zeros(len(weight))
        one = np.flatnonzero(~(over & under))
        at_low[one] = weight[one].sum(axis=2, dtype=np.float64) @ low
        return np.where(under, -np.inf, at_low), np.where(over, np.inf, at_low)
    if not (np.isfinite(low).any() or np.isfinite(high).any()):
        over, under = _signs(weight)
        some = over | under
        return np.where(some, -np.inf, 0.0), np.where(some, np.inf, 0.0)
    over, under = np.asarray((weight > 0).any(axis=2)), np.asarray((weight < 0).any(axis=2))
    free_up, free_down = np.isinf(high), np.isinf(low)
    up, down = _up_down(weight)
    ends = np.where(free_down, 0.0, low), np.where(free_up, 0.0, high)
    no_low = (over[:, free_down]).any(axis=1) | (under[:, free_up]).any(axis=1)
    no_high = (over[:, free_up]).any(axis=1) | (under[:, free_down]).any(axis=1)
    bottom, top = up @ ends[0] + down @ ends[1], up @ ends[1] + down @ ends[0]
    return np.where(no_low, -np.inf, bottom), np.where(no_high, np.inf, top)


def _up_down(weight: Array) -> tuple[Floats, Floats]:
    """Of [rows, columns, taps], what is above zero and what is below, summed over the taps."""
    over, under = np.maximum(weight, 0), np.minimum(weight, 0)
    if weight.shape[2] == 1:
        return over[:, :, 0].astype(np.float64), under[:, :, 0].astype(np.float64)
    return over.sum(axis=2, dtype=np.float64), under.sum(axis=2, dtype=np.float64)


def _signs(weight: Array) -> tuple[Array, Array]:
    """Which rows of [rows, columns, taps] have a number above zero, and which one below; the first
    few columns tell that of most."""
    head = weight[:, :GLANCE]
    over = np.asarray((head > 0).any(axis=(1, 2)))
    under = np.asarray((head < 0).any(axis=(1, 2)))
    if weight.shape[1] > GLANCE:
        rest = np.flatnonzero(~(over & under))
        over[rest] |= (weight[rest] > 0).any(axis=(1, 2))
        under[rest] |= (weight[rest] < 0).any(axis=(1, 2))
    return over, under


def row_kinds(weight: Array, name: Kinds) -> Kinds:
    """A kind for every row [rows]: equal ones for equal rows, found by their first few numbers."""
    rows = len(weight)
    kinds = mixed(name, np.arange(rows, dtype=np.uint64))
    if rows < SEVERAL or not weight[0].size:
        return kinds
    first = _head(weight).astype(np.float64)
    glance = mixed(*bits(np.ascontiguousarray(first.reshape(rows, -1).T)))
    _, group, count = np.unique(glance, return_inverse=True, return_counts=True)
    for row in np.flatnonzero(count[group] > 1).tolist():
        content = np.ascontiguousarray(weight[row] + 0).tobytes()
        digest = hashlib.blake2b(content, digest_size=8).digest()
        kinds[row] = mixed(name, np.frombuffer(digest, np.uint64)[0])
    return kinds


def _head(weight: Array) -> Array:
    """A few numbers of every row."""
    index: tuple[Any, ...] = (slice(None), *([0] * (weight.ndim - 2)), slice(0, 4))
    return np.asarray(weight[index]).reshape(len(weight), -1)


@table.rule("Conv", "ConvTranspose")
def convolution(seen: Seen) -> list[Fact | None]:
    """``w``: [C_out, C_in / group, *kernel]; transposed [C_in, C_out / group, *kernel]."""
    if not seen.fixed(1) or (seen.has(2) and not seen.fixed(2)):
        return [None]
    w, groups = seen.weight(1), int(seen.attr("group", 1))
    if seen.node.op_type == "ConvTranspose":
        parts = w.reshape(groups, w.shape[0] // groups, w.shape[1], -1).swapaxes(1, 2)
    else:
        parts = w.reshape(groups, w.shape[0] // groups, w.shape[1], -1)
    channels = parts.shape[0] * parts.shape[2]
    x = along(seen.fact(0), 1, channels)
    low, high = x.low.reshape(groups, -1), x.high.reshape(groups, -1)
    # Beyond an edge there are zeros, and a transposed one may leave taps out.
    if seen.node.op_type == "ConvTranspose" or _pads(seen):
        low, high = np.minimum(low, 0), np.maximum(high, 0)
    bottom, top = rows_of(parts, low, high)
    bias = seen.weight(2).astype(np.float64) if seen.has(2) else np.zeros(bottom.size)
    reads = np.arange(groups, dtype=np.uint64)
    if x.kind is not None:
        own = x.kind.reshape(groups, -1)
        numbers = np.arange(own.shape[1], dtype=np.uint64)
        reads = mixed(own, numbers).sum(axis=1, dtype=np.uint64)
    rows = parts.reshape(bottom.size, -1)
    # Equal rows of different groups are equal where what they read is.
    kind = mixed(row_kinds(rows, seen.name), np.repeat(reads, parts.shape[1]), bits(bias))
    return [_per_channel(bottom.reshape(-1) + bias, top.reshape(-1) + bias, kind, 1, seen)]


def _pads(seen: Seen) -> bool:
    if seen.attr("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return any(size > 1 for size in seen.weight(1).shape[2:])
    return any(seen.attr("pads", []) or [])


def _per_channel(low: Floats, high: Floats, kind: Kinds, axis: int, seen: Seen) -> Fact:
    to = [1] * len(seen.result())
    to[axis] = -1
    return Fact(low.reshape(to), high.reshape(to), kind.reshape(to))


@table.rule("Gemm")
def gemm(seen: Seen) -> list[Fact | None]:
    if not seen.fixed(1) or seen.attr("transA", 0) or (seen.has(2) and not seen.fixed(2)):
        return [None]
    w = seen.weight(1) if seen.attr("transB", 0) else seen.weight(1).T
    bias = np.zeros(len(w))
    if seen.has(2):
        c = seen.weight(2)
        if c.ndim > 1 and c.shape[0] > 1:
            return [None]
        bias = np.broadcast_to(seen.attr("beta", 1.0) * c.astype(np.float64).reshape(-1), len(w))
    return [_plain(seen, w, seen.attr("alpha", 1.0), bias)]


@table.rule("MatMul")
def matmul(seen: Seen) -> list[Fact | None]:
    if seen.fixed(1) and len(seen.shape(1)) == SEVERAL:
        w = seen.weight(1).T
        return [_plain(seen, w, 1.0, np.zeros(len(w)))]
    return [product(seen, seen.fact(0), seen.fact(1))]


def _plain(seen: Seen, w: Array, alpha: float, bias: Floats) -> Fact:
    """``w``: [out, in]."""
    x = along(seen.fact(0), len(seen.shape(0)) - 1, w.shape[1])
    parts = w[None, :, :, None]
    low, high = (a.reshape(-1) * alpha for a in rows_of(parts, x.low[None], x.high[None]))
    kind = mixed(row_kinds(w, seen.name), bits(bias))
    ends = np.minimum(low, high) + bias, np.maximum(low, high) + bias
    return _per_channel(*ends, kind, len(seen.result()) - 1, seen)


def product(seen: Seen, a: Fact, b: Fact) -> Fact | None:
    """Two activations: zeros on either side make zeros, and means stay between what they mean."""
    if a.low.ndim < SEVERAL or b.low.ndim < SEVERAL:
        return None
    rank = len(seen.result())
    rows, columns = collapsed(a, [a.low.ndim - 1]), collapsed(b, [b.low.ndim - 2])
    columns = ranked(columns, rank)
    if a.mean:
        return Fact(columns.low, columns.high)
    zero_rows, zero_columns = ((f.low == 0) & (f.high == 0) for f in (rows, columns))
    zero = zero_rows | zero_columns
    return Fact(np.where(zero, 0.0, -np.inf), np.where(zero, 0.0, np.inf))


GATES = {"LSTM": (4, 3), "GRU": (3, 2), "RNN": (1, 0)}  # gates; the one that a state is made of
DEFAULTS = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}


@table.rule(*GATES)
def recurrent(seen: Seen) -> list[Fact | None] | None:
    """A hidden unit stays zero that starts at zero and whose candidate reads nothing but zeros:
    other gates only scale it. Each direction has units of its own."""
    name = seen.node.op_type
    names = [a.decode() for a in seen.attr("activations", []) or []]
    usual = names in ([], DEFAULTS[name], DEFAULTS[name] * 2)
    if not usual or any(seen.has(i) and not seen.fixed(i) for i in (1, 2, 3)) or not seen.has(2):
        return None
    gates, at = GATES[name]
    w, r = seen.weight(1), seen.weight(2)
    directions, hidden = len(w), r.shape[2]
    mine = slice(at * hidden, (at + 1) * hidden)
    x = along(seen.fact(0), len(seen.shape(0)) - 1, w.shape[2])
    bias = np.zeros((directions, 2, gates * hidden))
    if seen.has(3):
        bias = seen.weight(3).astype(np.float64).reshape(bias.shape)
    starts = np.ones((directions, hidden), bool)
    for i in (5, 6):
        if seen.has(i):
            first = _start(seen, i, hidden)
            starts &= (first.low == 0) & (first.high == 0)
    inputs = (np.broadcast_to(v, (directions, len(v))) for v in (x.low, x.high))
    low, high = rows_of(w[:, mine, :, None], *inputs)
    own, states = bias[:, 0, mine], bias[:, 1, mine]
    reads_nothing = (low == high) & (low + own + states == 0)
    if name == "GRU" and seen.attr("linear_before_reset", 0):
        reads_nothing &= states == 0  # these are scaled by the reset gate alone
    zero = starts & reads_nothing
    for d in range(directions):
        while zero[d].any():
            bad = zero[d] & (r[d, mine][:, ~zero[d]] != 0).any(axis=1)
            if not bad.any():
                break
            zero[d] &= ~bad
    kind = _unit_kinds(seen, w, r, bias)
    batch_first = bool(seen.attr("layout", 0))
    found: list[Fact | None] = []
    for i in range(len(seen.node.output)):
        place = (2 if batch_first else 1) if i == 0 else (1 if batch_first else 0)
        to = [1] * (4 if i == 0 else 3)
        to[place], to[-1] = directions, hidden
        ends = np.where(zero, 0.0, np.inf).reshape(to)
        found.append(Fact(-ends + 0.0, ends, None if kind is None else kind.reshape(to)))
    return found


def _start(seen: Seen, index: int, hidden: int) -> Line:
    """A first state, by hidden unit."""
    fact = exactly(seen.weight(index)) if seen.fixed(index) else seen.fact(index)
    return along(fact, len(seen.shape(index)) - 1, hidden)


def _unit_kinds(seen: Seen, w: Array, r: Array, bias: Floats) -> Kinds | None:
    """A kind for every unit of every direction [directions, hidden]: equal ones for units whose
    gates all read and start alike. So what reads one of them may read the other, they too."""
    directions, hidden = len(w), r.shape[2]
    peepholes = seen.weight(7).astype(np.float64) if seen.fixed(7) else np.zeros((directions, 0))
    if seen.has(7) and not seen.fixed(7):
        return None
    starts = [_start(seen, i, hidden) for i in (5, 6) if seen.has(i)]
    if any(start.kind is None for start in starts):
        return None
    found = []
    for d in range(directions):
        vectors = (*bias[d].reshape(-1, hidden), *peepholes[d].reshape(-1, hidden))
        parts = [bits(np.ascontiguousarray(vector)) for vector in vectors]
        parts += [start.kind for start in starts if start.kind is not None]
        for number, weight in enumerate((w[d], r[d])):
            rows = weight.reshape(-1, hidden, weight.shape[1])
            parts += [
                row_kinds(gate, mixed(seen.name, d, number, place))
                for place, gate in enumerate(rows)
            ]
        found.append(mixed(*parts))
    return np.stack(found)


@table.rule("Attention")
def attention(seen: Seen) -> list[Fact | None] | None:
    """Of ONNX itself, heads in an axis of their own: each result is a mean of values."""
    if seen.node.domain or len(seen.shape(2)) != 4 or seen.has(5):
        return None
    v = collapsed(seen.fact(2), [2])
    if v.low.shape[1] > 1 and seen.shape(0)[1] != seen.shape(2)[1]:
        v = collapsed(v, [1])
    return [Fact(v.low, v.high), *[unknown(4)] * (len(seen.node.output) - 1)]
