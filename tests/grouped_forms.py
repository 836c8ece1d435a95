"""Decomposed attention with fewer KV heads than query heads, one function for each form."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from attention_forms import HEADS, INNER, LENGTH, SIZE, WIDTH, Form, Net

KV = 2


def _grouped(b: Net, repeat: Callable[[str], str], kv: int = KV) -> str:
    """Query heads read the KV head of their group; ``repeat`` brings KV heads to all of them."""
    q = b.split_heads(b.linear("x", WIDTH, INNER))
    k, v = (b.split_heads(b.linear("x", WIDTH, kv * SIZE), kv) for _ in "kv")
    return b.attend(q, repeat(k), repeat(v))


def repeat_interleaved(b: Net) -> str:
    """Unsqueeze, Expand, Reshape: as LLaMA's repeat_kv."""

    def repeat(x: str) -> str:
        five = b.add("Unsqueeze", x, b.ints(2))
        five = b.add("Expand", five, b.ints(1, KV, HEADS // KV, LENGTH, SIZE))
        return b.add("Reshape", five, b.ints(0, HEADS, LENGTH, SIZE))

    return _grouped(b, repeat)


def repeat_expanded_by_shape(b: Net) -> str:
    """As above, where the sizes of Expand and Reshape are computed from the tensor's shape."""

    def repeat(x: str) -> str:
        shape = b.add("Shape", x)
        parts = [b.add("Gather", shape, b.ints(i), axis=0) for i in range(4)]
        target = b.add("Concat", *parts[:2], b.ints(HEADS // KV), *parts[2:], axis=0)
        five = b.add("Expand", b.add("Unsqueeze", x, b.ints(2)), target)
        heads = b.add("Mul", parts[1], b.ints(HEADS // KV))
        back = b.add("Concat", parts[0], heads, *parts[2:], axis=0)
        return b.add("Reshape", five, back)

    return _grouped(b, repeat)


def repeat_tiled(b: Net) -> str:
    """Tile along a new axis inside the heads."""

    def repeat(x: str) -> str:
        five = b.add("Tile", b.add("Unsqueeze", x, b.ints(2)), b.ints(1, 1, HEADS // KV, 1, 1))
        return b.add("Reshape", five, b.ints(0, HEADS, LENGTH, SIZE))

    return _grouped(b, repeat)


def repeat_concatenated(b: Net) -> str:
    """The KV heads several times after themselves: query head h reads KV head h mod KV."""
    return _grouped(b, lambda x: b.add("Concat", *[x] * (HEADS // KV), axis=1))


def repeat_tiled_outside(b: Net) -> str:
    """As above by Tile and Reshape: [batch, group, KV heads, length, size]."""

    def repeat(x: str) -> str:
        five = b.add("Tile", b.add("Unsqueeze", x, b.ints(1)), b.ints(1, HEADS // KV, 1, 1, 1))
        return b.add("Reshape", five, b.ints(0, HEADS, LENGTH, SIZE))

    return _grouped(b, repeat)


def repeat_by_gather(b: Net) -> str:
    """Each KV head picked for each of its query heads by constant indices."""
    picked = np.repeat(np.arange(KV), HEADS // KV)
    return _grouped(b, lambda x: b.add("Gather", x, b.constant(picked), axis=1))


def grouped_five_axes(b: Net) -> str:
    """Queries as [batch, KV heads, group, length, size] against keys with a group of 1."""
    q = b.add("Reshape", b.linear("x", WIDTH, INNER), b.ints(0, 0, KV, HEADS // KV, SIZE))
    q = b.add("Transpose", q, perm=[0, 2, 3, 1, 4])
    k, v = (b.split_heads(b.linear("x", WIDTH, KV * SIZE), KV) for _ in "kv")
    k, v = (b.add("Unsqueeze", t, b.ints(2)) for t in (k, v))
    mixed = b.mix(b.add("MatMul", q, b.add("Transpose", k, perm=[0, 1, 2, 4, 3])), v)
    joined = b.add("Transpose", mixed, perm=[0, 3, 1, 2, 4])
    return b.linear(b.add("Reshape", joined, b.ints(0, 0, INNER)), INNER, WIDTH)


def multi_query(b: Net) -> str:
    """One KV head that broadcasts to all query heads, which leave alone."""
    return _grouped(b, lambda x: x, kv=1)


def multi_query_expanded(b: Net) -> str:
    return _grouped(b, lambda x: b.add("Expand", x, b.ints(1, HEADS, LENGTH, SIZE)), kv=1)


def cached(b: Net) -> str:
    """Past keys and values of the interface before the new ones, which are repeated after."""
    q = b.split_heads(b.linear("x", WIDTH, INNER))
    k, v = (
        b.add("Concat", past, b.split_heads(b.linear("x", WIDTH, KV * SIZE), KV), axis=2)
        for past in ("past_k", "past_v")
    )
    for past, present in (("past_k", k), ("past_v", v)):
        b.more[0][past] = ["n", KV, LENGTH, SIZE]
        b.more[1][present] = ["n", KV, 2 * LENGTH, SIZE]

    def repeat(x: str) -> str:
        five = b.add("Unsqueeze", x, b.ints(2))
        five = b.add("Expand", five, b.ints(1, KV, HEADS // KV, 2 * LENGTH, SIZE))
        return b.add("Reshape", five, b.ints(0, HEADS, 2 * LENGTH, SIZE))

    return b.attend(q, repeat(k), repeat(v))


GROUPED: dict[str, Form] = {
    form.__name__: form
    for form in (
        repeat_interleaved, repeat_expanded_by_shape, repeat_tiled, repeat_tiled_outside,
        repeat_concatenated, repeat_by_gather, grouped_five_axes,
    )
}  # fmt: skip
ONE_KV_HEAD: dict[str, Form] = {form.__name__: form for form in (multi_query, multi_query_expanded)}
