"""Sizes for open axes that a graph only accepts if they agree with numbers inside it.

Exported at one length, a graph may hold tables, masks and matrices of that length beside axes that
it declares open. Where an operator's inputs do not fit together, the lengths at two tries say how
a length moves with the size, and so at which size it is the number that it ought to be.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import onnx

from graphprune.model import Array

LARGEST = 4096
FEW = 8  # elements of a value that may be a shape
MOST_NODES = 4  # that are looked at
MOST_SIZES = 6  # that are proposed

Lengths = Mapping[str, tuple[int, ...] | None]


@dataclass(frozen=True)
class Try:
    """What every open axis was given, and the shapes and small values that came of it."""

    size: int
    shape: Lengths
    value: Mapping[str, Array]


def fitting(nodes: Sequence[onnx.NodeProto], tries: Sequence[Try]) -> list[int]:
    """Sizes at which inputs may fit together that did not at these, the likeliest first."""
    found: Counter[int] = Counter()
    for first, second in ((tries[0], tries[1]), (tries[-2], tries[-1])):
        stuck = (node for node in nodes if _is_stuck(node, first) and _is_stuck(node, second))
        for node, _ in zip(stuck, range(MOST_NODES), strict=False):
            found.update(set(_sizes(node, first, second)))
    tried = {attempt.size for attempt in tries}
    return [size for size, _ in found.most_common() if size not in tried][:MOST_SIZES]


def _is_stuck(node: onnx.NodeProto, attempt: Try) -> bool:
    """Whether all inputs are known and some output is not."""
    inputs = (_known(attempt.shape.get(name)) for name in node.input if name)
    outputs = (_known(attempt.shape.get(name)) for name in node.output if name)
    return all(inputs) and not all(outputs)


def _known(shape: tuple[int, ...] | None) -> bool:
    return shape is not None and min(shape, default=1) > 0


def _sizes(node: onnx.NodeProto, first: Try, second: Try) -> Iterator[int]:
    """Where a moving length, affine in the size or in its square, is a fixed number."""
    pairs = set(zip(_numbers(node, first), _numbers(node, second), strict=False))
    fixed = {a for a, b in pairs if a == b and a > 1}
    moving = [(a, b) for a, b in pairs if a != b]
    s, t = first.size, second.size
    for (a, b), wanted in product(moving, fixed):
        for power in (1, 2):
            slope = (b - a) / (t**power - s**power)
            size = s**power + (wanted - a) / slope
            if 1 <= size <= LARGEST**power:
                yield round(size ** (1 / power))


def _numbers(node: onnx.NodeProto, attempt: Try) -> list[int]:
    """Lengths of the inputs, and what those say that may be shapes; in order."""
    found: list[int] = []
    for name in filter(None, node.input):
        found += attempt.shape[name] or ()
        value = attempt.value.get(name)
        if value is not None and value.dtype.kind in "iu" and value.size <= FEW:
            found += [int(number) for number in value.reshape(-1)]
    return found
