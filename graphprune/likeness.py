"""How like the original's the outputs of a result are, on the inputs that it was calibrated on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from graphprune.interface import fitted
from graphprune.model import Array, Model
from graphprune.oracle import relative_error
from graphprune.runtime import Feeds, run_session

STILL = 1e-4  # share of the original's variance over rows below which an output is constant
NOISE = 1e-10  # of its mean square: less variance than that is rounding


@dataclass(frozen=True)
class Likeness:
    """``difference`` is the largest one of any output over the largest magnitude of the original's;
    ``unexplained`` the mean over the float outputs of the squared error over the variance that the
    original's have from input to input (a constant has 1 at best), ``None`` where nothing varies;
    ``constant`` the outputs that vary from input to input in the original, and not in the result.
    """

    difference: float
    unexplained: float | None = None
    constant: tuple[str, ...] = ()


@dataclass
class _Output:
    """Sums over the rows of one output, by position."""

    rows: int = 0
    error: float = 0.0
    sums: list[Any] = field(
        default_factory=lambda: [0.0] * 4
    )  # of a, of its square; of b, likewise

    def add(self, expected: Array, actual: Array) -> None:
        a, b = (side.astype(np.float64) for side in (expected, actual))
        self.rows += len(a)
        self.error += float(np.square(a - b).sum())
        for i, part in enumerate((a, np.square(a), b, np.square(b))):
            self.sums[i] = self.sums[i] + part.sum(axis=0)

    @property
    def size(self) -> float:
        """The original's sum of squares."""
        return float(np.sum(self.sums[1]))

    def spread(self, at: int) -> float:
        """Squared distances from the mean over the rows: of the original (0) or the result (2)."""
        rows = max(self.rows, 1)
        return float(np.sum(self.sums[at + 1] - np.square(self.sums[at]) / rows))


def likeness(
    original: Model, result: Model, runners: Sequence[Any], feeds: Sequence[Feeds]
) -> Likeness:
    """Of ``result`` on ``feeds``, which are the original's; ``runners`` are sessions of both."""
    names = [value.name for value in result.outputs]
    all_names = [value.name for value in original.outputs]
    found: dict[str, _Output] = {name: _Output() for name in names}
    difference = 0.0
    for feed in feeds:
        whole = dict(zip(all_names, run_session(runners[0], feed), strict=True))
        expected = fitted(result, whole)
        actual = run_session(runners[1], fitted(result, feed))
        difference = max(difference, relative_error([expected[n] for n in names], actual))
        for name, got in zip(names, actual, strict=True):
            _add(found, name, expected[name], got)
    varying = {n: o for n, o in found.items() if o.rows > 1 and o.spread(0) > NOISE * o.size}
    shares = [output.error / output.spread(0) for output in varying.values()]
    still = [n for n, output in varying.items() if output.spread(2) < STILL * output.spread(0)]
    return Likeness(difference, float(np.mean(shares)) if shares else None, tuple(still))


def _add(found: dict[str, _Output], name: str, expected: Array, actual: Array) -> None:
    """Only of floats whose rows have one shape, and are finite, can it be said how they vary."""
    output = found.get(name)
    if output is None:
        return
    sound = expected.dtype.kind == actual.dtype.kind == "f" and expected.shape == actual.shape
    sound = sound and expected.ndim > 0 and expected.size > 0
    sound = sound and not (output.rows and np.shape(output.sums[0]) != expected.shape[1:])
    sound = sound and bool(np.isfinite(expected).all() and np.isfinite(actual).all())
    if not sound:
        del found[name]
        return
    output.add(expected, actual)
