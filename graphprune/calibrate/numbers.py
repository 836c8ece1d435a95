"""A user's numbers in the type of a graph input: finite, whole where it asks for that, in range."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from graphprune.errors import UsageError
from graphprune.model import Array


def rounded(array: Array, dtype: np.dtype[Any]) -> bool:
    """Whether whole numbers are asked for and the array stores floats."""
    return dtype.kind in "iu" and array.dtype.kind == "f"


def taken_whole(name: str, path: Path) -> str:
    """A note on such an array."""
    return f"array {name!r} of {path.name} stores floats: taken as the whole numbers that they are"


def as_numbers(array: Array, dtype: np.dtype[Any], where: str) -> Array:
    """The array in ``dtype``, in memory. Raises ``UsageError`` that names the array."""
    if array.dtype.kind not in "biuf":
        raise UsageError(
            f"not numbers but {array.dtype}",
            where,
            "Save it as an array of numbers: np.savez(path, name=array).",
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise UsageError("NaN or infinite values", where, "Leave such samples out.")
    if rounded(array, dtype) and not (array == np.rint(array)).all():
        raise UsageError(
            f"fractions, where the model asks for whole numbers ({dtype})",
            where,
            "Save token ids and the like as integers; pixels as the model takes them.",
        )
    if dtype.kind in "iu" and array.size:
        span, low, high = np.iinfo(dtype), array.min(), array.max()
        if low < span.min or high > span.max:
            raise UsageError(
                f"numbers from {low:g} to {high:g} do not fit the input's type, {dtype}",
                where,
                "Save them as the model takes them.",
            )
    with np.errstate(over="ignore"):
        values = np.array(array, dtype)
    if dtype.kind == "f" and not np.isfinite(values).all():
        raise UsageError(
            f"numbers too large for the input's type, {dtype}", where, "Leave such samples out."
        )
    return values
