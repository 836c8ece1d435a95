"""Residual blocks as ONNX Runtime fuses them: the sum is inside the normalisation after it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from block_forms import INNER, WIDTH, Form, attend, feed_forward, finished, linear, normed
from graphs import Builder

LAYER, SIMPLE = "SkipLayerNormalization", "SkipSimplifiedLayerNormalization"


def skipped(b: Builder, x: str, branch: str, bias: str = "", total: bool = True) -> list[str]:
    """x + branch + bias, normalised; and the sum itself."""
    scale = b.constant((b.rng.random(WIDTH) + 0.5).astype(np.float32))
    inputs = [branch, x, scale, b.weight(WIDTH), *[bias] * bool(bias)]
    made = b.add(LAYER, *inputs, outputs=4, domain="com.microsoft", epsilon=1e-5)
    return _outputs(b, made, total)


def simplified(b: Builder, x: str, branch: str, total: bool = True) -> list[str]:
    scale = b.constant((b.rng.random(WIDTH) + 0.5).astype(np.float32))
    made = b.add(SIMPLE, x, branch, scale, outputs=4, domain="com.microsoft", epsilon=1e-6)
    return _outputs(b, made, total)


def _outputs(b: Builder, made: list[str], total: bool) -> list[str]:
    """Those that ONNX Runtime's optimiser gives such a node."""
    b.nodes[-1].output[:] = [made[0], "", "", made[3]] if total else [made[0]]
    return [made[0], made[3]]


def product(b: Builder, x: str) -> str:
    """A layer whose bias went into the node after it."""
    hidden = b.add("Relu", linear(b, x, WIDTH, INNER))
    return str(b.add("MatMul", hidden, b.weight(INNER, WIDTH)))


def post_norm() -> Form:
    """BERT."""
    b = Builder(1)
    x = normed(b, "x")
    for _ in range(2):
        x = skipped(b, x, attend(b, x), total=False)[0]
        x = skipped(b, x, product(b, x), b.weight(WIDTH), total=False)[0]
    return finished(b, x), ["attention", "mlp"] * 2


def pre_norm() -> Form:
    """GPT-2: the sum goes on, what is normalised goes into the next block."""
    b = Builder(2)
    x = linear(b, "x", WIDTH, WIDTH)
    h = normed(b, x)
    for last in (False, False, True):
        h, x = skipped(b, x, attend(b, h))
        h, x = skipped(b, x, product(b, h), b.weight(WIDTH), total=not last)
    return finished(b, h), ["attention", "mlp"] * 3


def llama() -> Form:
    b = Builder(3)
    x = linear(b, "x", WIDTH, WIDTH)
    h = normed(b, x)
    for last in (False, True):
        h, x = simplified(b, x, attend(b, h))
        h, x = simplified(b, x, feed_forward(b, h), total=not last)
    return finished(b, h), ["attention", "mlp"] * 2


def bias_of_the_sum() -> Form:
    """Neither term is a linear operator's own: the bias stays when the block leaves."""
    b = Builder(4)
    x = linear(b, "x", WIDTH, WIDTH)
    h = normed(b, x)
    for last in (False, True):
        h, x = skipped(b, x, b.add("Tanh", product(b, h)), b.weight(WIDTH), total=not last)
    return finished(b, h), ["mlp"] * 2


def mixed() -> Form:
    """Beside a sum that was not fused, read by two normalisations."""
    b = Builder(5)
    x = linear(b, "x", WIDTH, WIDTH)
    x = b.add("Add", x, feed_forward(b, normed(b, x)))
    h, x = skipped(b, x, attend(b, normed(b, x)))
    x = b.add("Add", x, product(b, b.add("Add", h, normed(b, x))))
    return finished(b, normed(b, x)), ["mlp", "attention", "mlp"]


SKIPS: dict[str, Callable[[], Form]] = {
    "post-norm": post_norm,
    "pre-norm": pre_norm,
    "simplified": llama,
    "bias of the sum": bias_of_the_sum,
    "mixed": mixed,
}
