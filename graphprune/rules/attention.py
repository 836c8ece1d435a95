"""Fused attention and rotary embeddings: heads are units; inner positions of every head another.

Widths are folded into (KV heads, query heads of each, head size): a KV head leaves with all its
query heads, and the only KV head of multi-query attention leaves its query heads free. Batch and
length are left unspoken, so they stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphprune.relations import Role
from graphprune.rules.op import Op, RefusedError, Slotted, Table
from graphprune.slots import SlotArray, SlotTensor

MICROSOFT = "com.microsoft"

table = Table()


@dataclass(frozen=True)
class Heads:
    """Axes inside the widths of an attention; query head h reads KV head h // len(group)."""

    op: Op
    every: SlotArray  # all query heads
    kv: SlotArray
    group: SlotArray  # the query heads of each KV head
    qk: SlotArray  # positions in a query or key of one head
    v: SlotArray  # positions in a value of one head

    def queries(self, axis: Slotted, *inner: SlotArray) -> None:
        """``axis`` is all query heads, each of them ``inner`` long."""
        self.op.fold(axis, [self.kv, self.group, *inner])

    def keys(self, axis: Slotted, *inner: SlotArray) -> None:
        """``axis`` is all KV heads, each of them ``inner`` long."""
        self.op.fold(axis, [self.kv, *inner])

    def bias(self, index: int) -> None:
        """Input ``index`` is added to the scores [batch, query heads, queries, keys]."""
        if self.op.has(index) and self.op.input(index).rank > 2:
            self._per_head(self.op.input(index))

    def scores(self, index: int) -> None:
        """Output ``index`` holds the scores."""
        if index < len(self.op.y) and self.op.y[index] is not None:
            self._per_head(self.op.output(index))

    def _per_head(self, tensor: SlotTensor) -> None:
        axis = tensor[tensor.rank - 3]
        if len(axis) == 1 < len(self.kv) * len(self.group):
            self.op.free(axis)
        else:
            self.queries(axis)

    def cache(self, key: SlotTensor | None, value: SlotTensor | None) -> None:
        """Past or present keys and values: [batch, KV heads, length, head size]."""
        for tensor, inner in ((key, self.qk), (value, self.v)):
            if tensor is not None:
                self.op.tie(tensor[1], self.kv)
                self.op.tie(tensor[3], inner)

    def count(self, queries: str, keys: str | None = None) -> None:
        """The attributes that hold the numbers of query heads and of KV heads."""
        self.op.count_attr(queries, self.every)
        if keys is not None:
            self.op.count_attr(keys, self.kv)

    def macs(self, *sizes: Slotted) -> None:
        """Scores and their weighted sum; ``sizes``: batch, queries, keys."""
        for inner in (self.qk, self.v):
            self.op.macs(*sizes, self.kv, self.group, inner)


def heads(op: Op, queries: int, keys: int, width: int, v_width: int) -> Heads:
    """``width`` of all queries, ``v_width`` of all values, as (heads, head size)."""
    if queries < 1 or keys < 1 or queries % keys or width % queries or v_width % keys:
        raise RefusedError(f"{queries} query heads and {keys} KV heads do not divide the widths")
    qk, v = op.virtual(width // queries), op.virtual(v_width // keys)
    found = Heads(op, op.virtual(queries), op.virtual(keys), op.virtual(queries // keys), qk, v)
    found.queries(found.every)
    op.heads(found.every)
    if not op.attr("scale"):
        op.default("scale", len(qk) ** -0.5, qk)
    return found


def _lengths(past: SlotTensor | None, new: Slotted) -> SlotArray:
    """Keys of the past, and those that are new."""
    slots = new if isinstance(new, np.ndarray) else new.slots
    return slots if past is None else np.concatenate([past[past.rank - 2].slots, slots])


def _at(tensors: Sequence[SlotTensor | None], index: int) -> SlotTensor | None:
    return tensors[index] if index < len(tensors) else None


@table.rule("Attention")
def attention(op: Op) -> None:
    """Queries, keys and values: [batch, heads, length, size] or [batch, length, heads * size]."""
    q, k, v, y = op.input(0), op.input(1), op.input(2), op.output()
    past = _at(op.x, 4)
    if q.rank == 4:
        h = heads(op, len(q[1]), len(k[1]), len(q[1]) * len(q[3]), len(k[1]) * len(v[3]))
        for tensor, inner in ((q, h.qk), (y, h.v)):
            h.queries(tensor[1])
            op.tie(tensor[3], inner)
        h.cache(k, v)
        op.contract(0, 3)
    else:
        numbers = int(op.attr("q_num_heads", 0)), int(op.attr("kv_num_heads", 0))
        h = heads(op, *numbers, len(q[2]), len(v[2]))
        h.queries(q[2], h.qk)
        h.keys(k[2], h.qk)
        h.keys(v[2], h.v)
        h.queries(y[2], h.v)
        h.count("q_num_heads", "kv_num_heads")
        op.contract(0, 2)
    h.bias(3)
    h.cache(past, _at(op.x, 5))
    h.cache(_at(op.y, 1), _at(op.y, 2))
    h.scores(3)
    h.macs(q[0], q[q.rank - 2], _lengths(past, k[k.rank - 2]))


@table.rule("MultiHeadAttention", domain=MICROSOFT)
def multi_head_attention(op: Op) -> None:
    """Queries [batch, length, width]; keys and values likewise, or as a cache, or packed.

    Packed are all three in [batch, length, heads, 3, size], or keys and values with a 2 there.
    """
    q, y = op.input(0), op.output()
    k, v = _at(op.x, 1), _at(op.x, 2)
    number = int(op.attr("num_heads", 0))
    packed = q if k is None else k if v is None else None
    width = int(np.prod(q.shape[2:])) // (3 if k is None else 1)
    v_width = len(y[2])
    h = heads(op, number, number, width, v_width)
    if packed is not None:
        op.tie(packed[2], h.kv)
        op.tie(packed[4], h.qk)
    elif k is not None and v is not None and k.rank == 4:
        h.cache(k, v)
    elif k is not None and v is not None:
        h.keys(k[2], h.qk)
        h.keys(v[2], h.v)
    op.contract(0, q.rank - 1)
    if k is not None:
        h.queries(q[2], h.qk)
    h.queries(y[2], h.v)
    if op.has(3):
        _packed(h, op.input(3)[0].slots, width, width)
        op.contract(3, 0)
    h.bias(5)
    h.cache(_at(op.x, 6), _at(op.x, 7))
    h.cache(_at(op.y, 1), _at(op.y, 2))
    cached = any(tensor is not None for tensor in (_at(op.x, 6), _at(op.y, 1)))
    if cached or packed is not None or (k is not None and k.rank == 4):
        op.tie(h.qk, h.v)  # one head size for all
    h.scores(3)
    h.count("num_heads")
    length = (k or q)[2 if k is not None and k.rank == 4 else 1]
    h.macs(q[0], q[1], _lengths(_at(op.x, 6), length))


def _packed(h: Heads, slots: SlotArray, width: int, keys_width: int) -> None:
    """Queries, keys and values one after the other along one axis."""
    query, key, value = np.split(slots, [width, width + keys_width])
    h.queries(query, h.qk)
    h.keys(key, h.qk)
    h.keys(value, h.v)


@table.rule("GroupQueryAttention", domain=MICROSOFT)
def group_query_attention(op: Op) -> None:
    """As above, with fewer KV heads; packed are the widths of all three in one.

    Rotary tables turn the inside of a head, and the head size is one for all three: it stays.
    """
    q, k, v, y = op.input(0), _at(op.x, 1), _at(op.x, 2), op.output()
    queries, keys = int(op.attr("num_heads", 0)), int(op.attr("kv_num_heads", 0))
    if op.has(12) or op.has(13):
        raise RefusedError("a quantised cache")
    width = len(y[2])
    h = heads(op, queries, keys, width, width * keys // max(1, queries))
    op.pin(h.qk, "queries, keys and values share the head size")
    op.pin(h.v, "queries, keys and values share the head size")
    if k is None or v is None:
        _packed(h, q[2].slots, width, len(h.kv) * len(h.qk))
    else:
        h.queries(q[2], h.qk)
        h.keys(k[2], h.qk)
        h.keys(v[2], h.v)
    op.contract(0, 2)
    h.queries(y[2], h.v)
    h.cache(_at(op.x, 3), _at(op.x, 4))
    h.cache(_at(op.y, 1), _at(op.y, 2))
    h.bias(10)
    if op.has(11):
        h.queries(op.input(11)[0])
    h.scores(3)
    h.count("num_heads", "kv_num_heads")
    present = _at(op.y, 1)
    h.macs(q[0], q[1], present[2] if present is not None else _lengths(_at(op.x, 3), q[1]))


@table.rule("Attention", domain=MICROSOFT)
def packed_attention(op: Op) -> None:
    """Projection ``w``: [in, q + k + v widths] and its bias inside, then as above.

    Past and present keys and values are one tensor [2, batch, heads, length, head size].
    """
    w = op.input(1)
    sizes = [int(size) for size in op.attr("qkv_hidden_sizes") or [len(w[1]) // 3] * 3]
    projected(op, sizes)
    for element, part in enumerate(np.split(w[1].slots, np.cumsum(sizes)[:2])):
        op.count_attr("qkv_hidden_sizes", part, element=element)


def projected(op: Op, sizes: Sequence[int]) -> Heads:
    """An attention that projects its input itself, to queries, keys and values of these widths."""
    x, w, y = op.input(0), op.input(1), op.output()
    number = int(op.attr("num_heads", 0))
    if sizes[0] != sizes[1] or sum(sizes) != len(w[1]):
        raise RefusedError(f"hidden sizes {list(sizes)} of queries, keys and values")
    h = heads(op, number, number, sizes[0], sizes[2])
    op.consume(x[2], 1, 0)
    op.contract(1, 1)
    op.plays(w[1], Role.PRODUCER)
    _packed(h, w[1].slots, *sizes[:2])
    if op.has(2):
        _packed(h, op.input(2)[0].slots, *sizes[:2])
        op.contract(2, 0)
    h.queries(y[2], h.v)
    h.bias(5)
    past = _at(op.x, 4)
    for cache in (past, _at(op.y, 1)):
        if cache is not None:
            op.tie(cache[2], h.kv)
            op.tie(cache[4], h.qk)
    if past is not None or _at(op.y, 1) is not None:
        op.tie(h.qk, h.v)
    if op.attr("do_rotary", 0):
        op.pin(h.qk, "rotary embeddings turn the inside of a head")
    h.count("num_heads")
    op.macs(x[0], x[1], *w)
    h.macs(x[0], x[1], _lengths(past, x[1]))
    return h


@table.rule("RotaryEmbedding")
def rotary_embedding(op: Op) -> None:
    """Pairs of positions in a head are turned by an angle: they leave with it in the tables."""
    _turn(op, op.input(1), op.input(2))


@table.rule("RotaryEmbedding", domain=MICROSOFT)
def rotary_embedding_of_ids(op: Op) -> None:
    """As above; the positions come before the tables."""
    _turn(op, op.input(2), op.input(3))


def _turn(op: Op, cos: SlotTensor, sin: SlotTensor) -> None:
    """Tables: [..., pairs]. What a head holds beyond its pairs goes through."""
    x, y = op.input(0), op.output()
    last = x.rank - 1
    op.tie(x[last], y[last])
    pairs = len(cos[cos.rank - 1])
    turned = int(op.attr("rotary_embedding_dim", 0))
    number = int(op.attr("num_heads", 0))
    if x.rank == 4:
        op.tie(x[1], y[1])
        head, size = x[1].slots, x[3].slots
    else:
        number = number or len(x[last]) // (2 * pairs)
        if number < 1 or len(x[last]) % number:
            raise RefusedError(f"a width of {len(x[last])} in {number} heads")
        head, size = op.virtual(number), op.virtual(len(x[last]) // number)
        op.fold(x[last], [head, size])
        op.heads(head)
    if (turned or len(size)) != 2 * pairs:
        raise RefusedError(f"tables of {pairs} angles for {turned or len(size)} positions")
    if op.attr("num_heads", 0):
        op.count_attr("num_heads", head)
    inside = size[: 2 * pairs]
    interleaved = op.attr("interleaved", 0)
    first, second = (inside[::2], inside[1::2]) if interleaved else np.split(inside, 2)
    for other in (second, cos[cos.rank - 1], sin[sin.rank - 1]):
        op.tie(first, other)
    op.free(size)
    if turned:
        op.count_attr("rotary_embedding_dim", inside)
