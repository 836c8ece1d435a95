"""Fused attention: so far only what it costs, so its heads stay pinned."""

from __future__ import annotations

from graphprune.rules.op import Op, RefusedError, Table

table = Table()


@table.rule("Attention")
def attention(op: Op) -> None:
    """Scaled dot products: scores and their weighted sum, each q x k x width per batch element.

    Inputs are [batch, heads, length, head size] or [batch, length, width].
    """
    q, k, v = op.input(0), op.input(1), op.input(2)
    length = -2
    op.macs(*q, k.axes[length])
    op.macs(*q.axes[:-1], v.axes[length], v.axes[-1])
    raise RefusedError("heads of the fused operator are not removed yet")


@table.rule("MultiHeadAttention", "GroupQueryAttention", domain="com.microsoft")
def projected_attention(op: Op) -> None:
    """As above, on projected [batch, length, width] inputs."""
    q, k, v = op.input(0), op.input(1), op.input(2)
    op.macs(*q, k[1])
    op.macs(*q.axes[:-1], v[1], v.axes[-1])
    raise RefusedError("heads of the fused operator are not removed yet")


@table.rule("Attention", domain="com.microsoft")
def packed_attention(op: Op) -> None:
    """Projection ``w``: [in, q + k + v widths] inside, then the scaled dot products."""
    x, w = op.input(0), op.input(1)
    op.macs(x[0], x[1], *w)
    third = w[1].slots[: len(w[1]) // 3]
    op.macs(x[0], x[1], x[1], third)
    op.macs(x[0], x[1], x[1], third)
    raise RefusedError("heads of the fused operator are not removed yet")
