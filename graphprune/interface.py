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

from graphprune.errors import ModelError
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
    """The inputs and outputs that lost slots between the two, as declared before and after; where a
    size is symbolic, what it was and is."""
    before, after = _record(original), _record(result)
    found = []
    for side, values in (("input", original.inputs), ("output", original.outputs)):
        for value in values:
            known = before.get(value.name, {})
            new = {a: e for a, e in after.get(value.name, {}).items() if e != known.get(a)}
            if not new:
                continue
            sizes = [list(_sizes(value)), list(_sizes(value))]
            for axis, entry in new.items():
                for declared, size in zip(sizes, (entry["of"], len(entry["kept"])), strict=True):
                    declared[int(axis) : int(axis) + 1] = [size]
            found.append(Reshaped(value.name, side, tuple(sizes[0]), tuple(sizes[1])))
    return tuple(found)


def _sizes(value: onnx.ValueInfoProto) -> tuple[Size, ...]:
    return tuple(
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None
        for dim in value.type.tensor_type.shape.dim
    )


def _record(model: Model) -> dict[str, dict[str, dict[str, Any]]]:
    """Input or output → axis → how many slots it had (``of``), and which of them are ``kept``.

    Raises ``ModelError`` where the model's record is none.
    """
    text = next((e.value for e in model.skeleton.metadata_props if e.key == RECORD), "{}")
    try:
        return {
            name: {
                axis: {"of": int(entry["of"]), "kept": [int(i) for i in entry["kept"]]}
                for axis, entry in axes.items()
                if int(axis) >= 0 and 0 <= min(entry["kept"]) <= max(entry["kept"]) < entry["of"]
            }
            for name, axes in json.loads(text).items()
        }
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ModelError(
            "the model's record of slots that its interface lost is malformed",
            f"metadata {RECORD!r}",
            "Remove that entry, or prune the original again.",
        ) from error
