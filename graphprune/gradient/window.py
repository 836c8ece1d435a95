"""The geometry of sliding windows: kernel, strides, dilations, and pads as they come out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphprune.gradient.rules import Step
from graphprune.model import Array


@dataclass(frozen=True)
class Window:
    """One number per spatial axis in each field; ``auto_pad`` is resolved."""

    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    before: list[int]
    after: list[int]

    @classmethod
    def of(
        cls,
        node: Step,
        kernel: Sequence[int],
        size: Sequence[int],
        places: Sequence[int],
        extra: Sequence[int] | None = None,
    ) -> Window:
        """Windows over axes of length ``size`` at ``places`` positions each.

        ``extra`` (output_padding of a transposed convolution) lengthens the axes at their end.
        """
        rank = len(kernel)
        strides = list(node.attribute("strides") or [1] * rank)
        dilations = list(node.attribute("dilations") or [1] * rank)
        automatic = node.attribute("auto_pad", "NOTSET")
        pads = list(node.attribute("pads") or [0] * 2 * rank)
        before, after = pads[:rank], pads[rank:]
        if automatic.startswith("SAME") or node.attribute("output_shape"):
            total = [
                max((n - 1) * s + d * (k - 1) + 1 + e - length, 0)
                for n, s, d, k, e, length in zip(
                    places, strides, dilations, kernel, extra or [0] * rank, size, strict=True
                )
            ]
            small, large = [t // 2 for t in total], [t - t // 2 for t in total]
            upper = automatic == "SAME_UPPER" or (automatic != "SAME_LOWER" and extra is None)
            before, after = (small, large) if upper else (large, small)
        elif automatic == "VALID":
            before, after = [0] * rank, [0] * rank
        return cls(list(kernel), strides, dilations, before, after)

    def taps(self, axis: int, size: int, places: int) -> Array:
        """[places, kernel]: the index that each tap reads; −1 and below, or ``size`` and above, in
        the padding."""
        starts = np.arange(places) * self.strides[axis] - self.before[axis]
        return starts[:, None] + np.arange(self.kernel[axis])[None, :] * self.dilations[axis]
