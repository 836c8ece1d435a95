"""Graph inputs and outputs that lost slots: declared anew, and recorded in the model itself.

Whoever runs a pruned model on what was made for its original (measurements, repair, scores,
``compare``) reads from that record which slots of an array are still wanted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx

from graphprune.model import Array, Model

RECORD = "graphprune.interface"  # key of the model's metadata
Size = int | str | None  # of a declared axis: a number, a symbol, or open
Kept = Mapping[str, Mapping[int, Array]]  # input or output → axis → bool for every slot it had


@dataclass(frozen=True)
class Reshaped:
    """A graph input or output whose declared shape changed."""

    name: str
    side: str  # "input" or "output"
    before: tuple[Size, ...]
    after: tuple[Size, ...]

    def __str__(self) -> str:
        return f"{self.side} {self.name!r} {list(self.before)} -> {list(self.after)}"


def narrowed(model: Model, kept: Kept) -> Model:
    """The model with inputs and outputs declared at their new sizes; ``kept`` becomes its record.

    Axes that the model's own record names already are entered anew, relative to this model.
    """
    if not kept:
        return model
    skeleton = onnx.ModelProto()
    skeleton.CopyFrom(model.skeleton)
    record = _record(model)
    for value in (*skeleton.graph.input, *skeleton.graph.output):
        dims = value.type.tensor_type.shape.dim
        for axis, mask in kept.get(value.name, {}).items():
            entry = {"of": len(mask), "kept": np.flatnonzero(mask).tolist()}
            record.setdefault(value.name, {})[str(axis)] = entry
            if axis < len(dims) and dims[axis].HasField("dim_value"):
                dims[axis].dim_value = int(mask.sum())
    others = [entry for entry in skeleton.metadata_props if entry.key != RECORD]
    del skeleton.metadata_props[:]
    skeleton.metadata_props.extend(others)
    skeleton.metadata_props.add(key=RECORD, value=json.dumps(record))
    return replace(model, skeleton=skeleton)


def fitted(model: Model, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Arrays by the names of graph inputs or outputs, without the slots that ``model`` has lost.

    Only axes of the size that they had before are touched: what fits already stays as it is.
    """
    record = _record(model)
    result = dict(arrays)
    for name in record.keys() & arrays.keys():
        for axis, entry in record[name].items():
            array = result[name]
            if int(axis) < np.ndim(array) and array.shape[int(axis)] == entry["of"]:
                result[name] = np.take(array, entry["kept"], axis=int(axis))
    return result


def fitted_sizes(model: Model, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shapes by the names of graph inputs, as ``fitted`` would leave arrays of them."""
    record = _record(model)
    return {
        name: tuple(
            len(entry["kept"]) if entry is not None and entry["of"] == size else size
            for axis, size in enumerate(shape)
            for entry in [record.get(name, {}).get(str(axis))]
        )
        for name, shape in shapes.items()
    }


def reshaped(original: Model, result: Model) -> tuple[Reshaped, ...]:
    """The inputs and outputs that ``result`` declares otherwise than ``original``."""
    sides = (
        ("input", original.inputs, result.inputs),
        ("output", original.outputs, result.outputs),
    )
    found = []
    for side, before, after in sides:
        new = {value.name: _sizes(value) for value in after}
        for value in before:
            if new.get(value.name, _sizes(value)) != _sizes(value):
                found.append(Reshaped(value.name, side, _sizes(value), new[value.name]))
    return tuple(found)


def _sizes(value: onnx.ValueInfoProto) -> tuple[Size, ...]:
    return tuple(
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None
        for dim in value.type.tensor_type.shape.dim
    )


def _record(model: Model) -> dict[str, dict[str, dict[str, Any]]]:
    """Input or output → axis → how many slots it had (``of``), and which of them are ``kept``."""
    text = next((e.value for e in model.skeleton.metadata_props if e.key == RECORD), "{}")
    return dict(json.loads(text))
