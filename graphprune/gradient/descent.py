"""Descent along gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

FIRST_MOMENT, SECOND_MOMENT, TINY = 0.9, 0.999, 1e-8


class Adam:
    """Adam (Kingma and Ba, arXiv 1412.6980, algorithm 1): gradients in, steps of about one out."""

    def __init__(self) -> None:
        self.steps = 0
        self.first: NDArray[Any] | float = 0.0
        self.second: NDArray[Any] | float = 0.0

    def __call__(self, slope: NDArray[Any]) -> NDArray[Any]:
        """What to subtract, in units of the rate; of the slope's shape and element type."""
        self.steps += 1
        self.first = self.first + (1 - FIRST_MOMENT) * (slope - self.first)
        self.second = self.second + (1 - SECOND_MOMENT) * (slope * slope - self.second)
        mean = self.first / (1 - FIRST_MOMENT**self.steps)
        square = self.second / (1 - SECOND_MOMENT**self.steps)
        return np.asarray(mean / (np.sqrt(square) + TINY), slope.dtype)
