"""Recurrent operators: a hidden unit is one position of every gate, in both directions."""

from __future__ import annotations

import numpy as np

from graphprune.rules.op import Op, RefusedError, Table
from graphprune.slots import Axis

table = Table()

STATES = (5, 6)  # inputs that hold the first hidden and cell state
PEEPHOLES = 7


@table.rule("LSTM", "GRU", "RNN")
def recurrent(op: Op) -> None:
    """``x``: [seq, batch, in]; ``w`` and ``r``: [dirs, gates * hidden, in or hidden]; ``b``: [dirs,
    2 * gates * hidden]; peepholes: [dirs, 3 * hidden]; states and outputs end in [.., hidden].

    With ``layout`` 1 the batch comes first everywhere. Gates and activations work unit by unit, so
    a unit reaches others only through the columns of ``r`` and through what is done with ``y``.
    """
    layer(op)


def layer(op: Op, gates: int = 1, reads: int = 2) -> None:
    """As above; ``gates`` and ``reads`` are where ``w`` and ``r`` have their rows and columns."""
    x, w, r = op.input(0), op.input(1), op.input(2)
    op.macs(x[0], x[1], *w)
    op.macs(x[0], x[1], *r)
    hidden, batch = r[reads], x[0 if op.attr("layout", 0) else 1]
    op.contract(2, reads)
    op.consume(x[2], 1, reads)
    for weight in (w, r):
        op.produce(weight[gates], _repeated(hidden, weight[gates]))
    for index in (3, PEEPHOLES):
        if op.has(index):
            op.tie(_repeated(hidden, op.input(index)[1]), op.input(index)[1])
    if op.has(4):
        op.tie(batch, op.input(4)[0])
    states = [op.input(index) for index in STATES if op.has(index)]
    for tensor in [*states, *(y for y in op.y if y is not None)]:
        op.tie(hidden, tensor[tensor.rank - 1])
        op.tie(batch, tensor[0 if op.attr("layout", 0) else tensor.rank - 2])
    if op.attr("hidden_size") is not None:
        op.count_attr("hidden_size", hidden)


def _repeated(hidden: Axis, axis: Axis) -> np.ndarray:
    """The hidden units once for each gate that ``axis`` holds."""
    if len(axis) % max(len(hidden), 1):
        raise RefusedError(f"{len(axis)} rows are no multiple of {len(hidden)} hidden units")
    return np.tile(hidden.slots, len(axis) // max(len(hidden), 1))
