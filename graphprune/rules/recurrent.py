"""Recurrent operators: so far only what they cost, so their hidden units stay pinned."""

from __future__ import annotations

from graphprune.rules.op import Op, RefusedError, Table

table = Table()


@table.rule("LSTM", "GRU", "RNN")
def recurrent(op: Op) -> None:
    """``x``: [seq, batch, in]; ``w`` and ``r``: [dirs, gates * hidden, in or hidden].

    With ``layout`` 1 the first two axes of ``x`` change places; their product is the same.
    """
    x, w, r = op.input(0), op.input(1), op.input(2)
    op.macs(x[0], x[1], *w)
    op.macs(x[0], x[1], *r)
    raise RefusedError("hidden units are not removed yet")
