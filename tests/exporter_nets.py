"""What exporters' forms are built with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from graphs import Builder
from onnx import TensorProto

Form = Callable[[], onnx.ModelProto]
FORMS: dict[str, Form] = {}


def form(make: Form) -> Form:
    FORMS[make.__name__] = make
    return make


class Net(Builder):
    """A builder with what several exporters have in common."""

    def floats(self, *shape: int) -> np.ndarray:
        scale = 1 / np.sqrt(max(1, np.prod(shape[1:])))
        return (self.rng.standard_normal(shape) * scale).astype(np.float32)

    def shape_of(self, x: str, *axes: int) -> list[str]:
        """One-element lists of 32-bit integers, cut from the shape as TensorFlow does."""
        shape = self.add("Cast", self.add("Shape", x), to=TensorProto.INT32)
        return [
            self.add("Slice", shape, self.ints(a), self.ints(a + 1), self.ints(0)) for a in axes
        ]

    def reshape_to(self, x: str, *sizes: str | int) -> str:
        """Sizes computed in 32 bits, as TensorFlow's are."""
        parts = [s if isinstance(s, str) else self.constant(np.int32([s])) for s in sizes]
        joined = self.add("Concat", *parts, axis=0)
        return str(self.add("Reshape", x, self.add("Cast", joined, to=TensorProto.INT64)))

    def same(self, x: str, c_in: int, c_out: int, kernel: int = 3, **more: Any) -> str:
        weight = self.weight(c_out, c_in // more.get("group", 1), kernel, kernel)
        return str(self.add("Conv", x, weight, self.weight(c_out), auto_pad="SAME_UPPER", **more))
