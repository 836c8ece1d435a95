"""Sizes that graph inputs declare, and those that are taken where they leave them open."""

from __future__ import annotations

from collections.abc import Mapping, Set
from math import prod

import onnx

from graphprune.errors import ModelError, UsageError
from graphprune.model import Model
from graphprune.wording import shape_text

Sizes = tuple[int, ...]
LARGEST_INPUT = 1 << 30  # elements
LARGER = 32  # a second size for symbolic axes, where the first was small


def declared(value: onnx.ValueInfoProto) -> list[int | None] | None:
    """Declared sizes of a graph input or output; ``None`` for symbolic ones or an unknown rank."""
    if not value.type.HasField("tensor_type") or not value.type.tensor_type.HasField("shape"):
        return None
    return [
        d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else None
        for d in value.type.tensor_type.shape.dim
    ]


def check_given(model: Model, given: Mapping[str, Sizes]) -> None:
    known = {value.name: declared(value) for value in model.inputs}
    for name, shape in given.items():
        if name not in known:
            raise UsageError(
                f"--input-shape names no graph input: {name!r}",
                hint=f"The inputs are: {', '.join(known)}.",
            )
        dims = known[name]
        fits = dims is None or (
            len(dims) == len(shape)
            and all(d is None or d == s for d, s in zip(dims, shape, strict=True))
        )
        if not fits or min(shape, default=0) < 0:
            sizes = ",".join("N" if d is None else str(d) for d in dims or ())
            each = " with a number for each N" if "N" in sizes else ""
            raise UsageError(
                f"--input-shape {list(shape)} does not fit the declared {shape_text(dims)}",
                name,
                f"Give --input-shape {name}:{sizes}{each}." if sizes else "",
            )


def check_samples(shape: Sizes, value: onnx.ValueInfoProto, where: str) -> None:
    """Raise ``UsageError`` where samples (rows along the first axis) do not fit an input."""
    dims = declared(value)
    fits = dims is None or (
        len(shape) == len(dims)
        and all(d is None or d == s for d, s in zip(dims[1:], shape[1:], strict=True))
    )
    if not fits:
        raise UsageError(
            f"shape {list(shape)} does not fit the declared {shape_text(dims)}",
            where,
            "The first size is the number of samples, the others are the input's.",
        )


def batch_names(model: Model) -> set[str]:
    """Names of symbolic first axes: wherever they stand, a recurrent state say, they are 1."""
    firsts = [axis_names(value)[:1] for value in model.inputs if len(axis_names(value)) > 1]
    return {name for first in firsts for name in first} - {""}


def nameless_batches(model: Model) -> set[str]:
    """Inputs whose only symbolic axis has no name and is not their first, beside others that start
    with such an axis: a recurrent state, and its axis is the batch."""
    sizes = {v.name: declared(v) or [] for v in model.inputs if not any(axis_names(v))}
    if not any(dims[0] is None for dims in sizes.values() if len(dims) > 1):
        return set()
    return {n for n, dims in sizes.items() if len(dims) > 2 and dims.count(None) == 1 and dims[0]}


def axis_names(value: onnx.ValueInfoProto) -> list[str]:
    """The names of an input's symbolic sizes, empty for the others."""
    return [dim.dim_param for dim in value.type.tensor_type.shape.dim]


def symbols(model: Model, given: Mapping[str, Sizes]) -> dict[str, int]:
    """Sizes of the symbols that inputs of given shapes declare."""
    return {
        name: size
        for value in model.inputs
        for name, size in zip(axis_names(value), given.get(value.name, ()), strict=False)
        if name
    }


def concrete(
    value: onnx.ValueInfoProto,
    given: Mapping[str, Sizes],
    known: Mapping[str, int],
    size: int,
    batch: Set[str],
) -> Sizes:
    """The first symbolic axis is the batch (1), as are those of its name; others get ``size``."""
    if value.name in given:
        return given[value.name]
    dims = declared(value)
    if dims is None:
        raise ModelError(
            "an input declares no shape",
            f"input {value.name!r}",
            f"Give it with --input-shape {value.name}:1,3,224,224.",
        )
    names = axis_names(value)
    single = batch - {name for name in names[:1] if name in names[1:]}  # one for all says nothing

    def sized(axis: int, name: str) -> int:
        if name in known:
            return known[name]
        if "+" in name:  # such as the past and what is new
            terms = [term.strip() for term in name.split("+")]
            return sum(int(term) if term.isdigit() else sized(-1, term) for term in terms)
        return 1 if axis == 0 or name in single else size

    shape = tuple(
        sized(axis, name) if d is None else d
        for axis, (d, name) in enumerate(zip(dims, names, strict=True))
    )
    if prod(shape) > LARGEST_INPUT:
        raise ModelError(
            f"an input of {prod(shape)} elements is larger than memory",
            f"input {value.name!r} of shape {list(shape)}"[:300],
            "Export the model for a smaller input.",
        )
    return shape


def larger(
    inputs: Mapping[str, Sizes], symbolic: Mapping[str, tuple[int, ...]]
) -> dict[str, Sizes]:
    """The same inputs with other values for their symbolic axes: batch 2, and larger ones."""

    def resized(shape: Sizes, axes: tuple[int, ...]) -> Sizes:
        return tuple(
            size if axis not in axes else 2 if axis == 0 else max(2 * size, LARGER)
            for axis, size in enumerate(shape)
        )

    return {name: resized(shape, symbolic.get(name, ())) for name, shape in inputs.items()}
