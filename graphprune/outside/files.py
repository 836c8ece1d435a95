"""An .npz file of scores or masks: read, checked, and brought to the weights of the normal form."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from graphprune.calibrate.files import UNREADABLE
from graphprune.coupling import FLOAT_TYPES, Group
from graphprune.errors import UsageError
from graphprune.model import Array, Model
from graphprune.outside.beside import beside
from graphprune.prepared import Prepared

NEAR = 0.3  # how like a name must be to be suggested
OBJECTS = "allow_pickle"  # numpy's way to say that an array holds objects
WRITTEN = "It is written by numpy.savez: one array for each parameter, named as in the model."


@dataclass(frozen=True)
class Given:
    """Arrays by parameter of the normal form, in its order.

    ``elements``: of the parameter's shape; NaN where nothing was given. ``slots``: one number for
    each index of one axis. ``units``: one for each of a group's units, by the group's number.
    """

    elements: Mapping[str, Array]
    slots: Mapping[tuple[str, int], Array]
    units: Mapping[int, Array]


def read(path: Path, option: str) -> tuple[dict[str, Array], str]:
    """The arrays of a file by name, and its hash. Raises ``UsageError`` for what is no number."""
    arrays: dict[str, Array] = {}
    name = ""
    try:
        data = path.read_bytes()
        with np.load(path, allow_pickle=False) as archive:
            for name in archive.files:
                arrays[name] = archive[name]
    except (*UNREADABLE, zipfile.LargeZipFile, TypeError, AttributeError) as error:
        if name and OBJECTS in str(error):
            raise _not_numbers(name, path, "Python objects") from error
        cause = (
            error.strerror if isinstance(error, OSError) and error.strerror else "not an .npz file"
        )
        raise UsageError(
            f"cannot read arrays from the file: {cause}", f"{option} {path}", WRITTEN
        ) from error
    if not arrays:
        raise UsageError("the file holds no arrays", f"{option} {path}", WRITTEN)
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):  # of another kind of archive, such as PyTorch's
            raise UsageError("the file holds no arrays", f"{option} {path}", WRITTEN)
        if array.dtype.kind not in "biuf":
            raise _not_numbers(name, path, str(array.dtype))
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise UsageError(
                "NaN or infinite values", f"array {name!r} of {path}", "Give finite numbers."
            )
    return arrays, hashlib.sha256(data).hexdigest()


def _not_numbers(name: str, path: Path, kind: str) -> UsageError:
    return UsageError(
        f"not numbers but {kind}",
        f"array {name!r} of {path}",
        "Save real numbers: numpy.savez(path, **{name: numpy.asarray(array, numpy.float32)}).",
    )


def given(prepared: Prepared, arrays: Mapping[str, Array], path: Path) -> Given:
    """Each array put to what it is named by: a group as `inspect` names it, or a parameter as the
    model does, which it fits whole, transposed (matrices that are not square), or along the one
    axis of its length."""
    known = _parameters(prepared.original.opened)
    groups = {group.name: group for group in prepared.analysis.coupling.groups}
    elements: dict[str, Array] = {}
    slots: dict[tuple[str, int], Array] = {}
    units: dict[int, Array] = {}
    for name, array in arrays.items():
        where = f"array {name!r} of {path}"
        if name in groups and name not in known:
            units[groups[name].index] = _of_units(groups[name], array, where)
            continue
        if name not in known:
            raise UsageError(
                "the model has no parameter and no group of this name",
                where,
                _near(name, [*known, *groups]),
            )
        fitting = _fitted(array, known[name], where)
        if isinstance(fitting, int):
            slots[name, fitting] = array.astype(np.float64)
        else:
            elements[name] = fitting.astype(np.float64)
    return Given(
        _carried(prepared, elements),
        _carried_slots(prepared, slots),
        _carried_units(prepared, units),
    )


def _parameters(model: Model) -> dict[str, tuple[int, ...]]:
    """Shapes of the constants that an array may be named by."""
    shapes = {name: tuple(tensor.dims) for name, tensor in model.initializers.items()}
    for node in model.nodes:
        if node.op_type == "Constant" and not node.domain:
            tensor = next((a.t for a in node.attribute if a.name == "value"), None)
            if tensor is not None and tensor.data_type in FLOAT_TYPES:
                shapes[node.output[0]] = tuple(tensor.dims)
    return shapes


def _near(name: str, known: list[str]) -> str:
    found = get_close_matches(name, known, 1, NEAR)
    nearest = f"The nearest is {found[0]!r}. " if found else ""
    return f"{nearest}`graphprune inspect MODEL` names the groups."


def _of_units(group: Group, array: Array, where: str) -> Array:
    if array.shape != (len(group),):
        raise UsageError(
            f"shape {list(array.shape)} does not fit the group's {len(group)} units",
            where,
            f"Give one number for each unit: shape [{len(group)}].",
        )
    return array.astype(np.float64)


def _fitted(array: Array, shape: tuple[int, ...], where: str) -> Array | int:
    """The array in the parameter's shape, or the axis it belongs to."""
    if array.shape == shape:
        return array
    if array.ndim == len(shape) == 2 and array.shape == shape[::-1]:
        return array.T
    axes = [axis for axis, size in enumerate(shape) if array.shape == (size,)]
    if len(axes) == 1:
        return axes[0]
    many = f": axes {' and '.join(map(str, axes))} are of that length" if axes else ""
    raise UsageError(
        f"shape {list(array.shape)} does not fit the parameter's {list(shape)}{many}",
        where,
        "Give it in the parameter's shape, or one number for each index of one axis.",
    )


def _carried(prepared: Prepared, elements: Mapping[str, Array]) -> dict[str, Array]:
    """By parameter of the normal form; a weight that the graph itself moves is one too."""
    if not elements:
        return {}
    model = prepared.analysis.model
    moved = prepared.carry(elements)
    found = {
        name: beside(model, name, moved)
        for name in dict.fromkeys(axis.tensor for axis in prepared.analysis.coupling.parameters)
    }
    return {name: array for name, array in found.items() if array is not None}


def _carried_slots(
    prepared: Prepared, slots: Mapping[tuple[str, int], Array]
) -> dict[tuple[str, int], Array]:
    """As the whole parameter would be, were it this along one axis."""
    shapes = _parameters(prepared.original.opened)
    own = {(axis.tensor, axis.index) for axis in prepared.analysis.coupling.parameters}
    found: dict[tuple[str, int], Array] = {}
    for (name, axis), array in slots.items():
        others = _but(axis, len(shapes[name]))
        wide = np.broadcast_to(np.expand_dims(array, others), shapes[name])
        moved = prepared.carry({name: wide})
        if not any(moved.keys() & {tensor} for tensor, _ in own):
            raise UsageError(
                "one number for each index of an axis cannot be followed: the graph moves this "
                "parameter, or reads no data with it",
                f"array {name!r}",
                "Give it in the parameter's own shape.",
            )
        for tensor, whole in moved.items():
            if (tensor, axis) in own and whole.shape == shapes[name]:
                found[tensor, axis] = whole.mean(axis=others)
    return found


def _carried_units(prepared: Prepared, units: Mapping[int, Array]) -> dict[int, Array]:
    """Units in the order of the group's first axis in the given model → in that of the group."""
    coupling = prepared.analysis.coupling
    found = {}
    for number, array in units.items():
        group = coupling.groups[number]
        name, axis = next(
            (a for a in group.signature if a[0] in prepared.analysis.model.initializers),
            group.signature[0],
        )
        named, index = group.signature[0]
        order = coupling.unit_of(coupling.relations.slots.tensors[named][index].slots)
        ordinal = {int(u): i for i, u in enumerate(_first_seen(order[np.isin(order, group.units)]))}
        tensor = coupling.relations.slots.tensors[name]
        unit_of = coupling.unit_of(tensor[axis].slots)
        values = np.array([array[ordinal[u]] if u in ordinal else 0.0 for u in unit_of.tolist()])
        wide = np.broadcast_to(np.expand_dims(values, _but(axis, tensor.rank)), tensor.shape)
        moved = prepared.carry({name: wide})[name].mean(axis=_but(axis, tensor.rank))
        found[number] = np.array([moved[unit_of == unit].mean() for unit in group.units.tolist()])
    return found


def _first_seen(values: Array) -> Array:
    """The distinct values in the order in which they appear."""
    distinct, first = np.unique(values, return_index=True)
    return distinct[np.argsort(first)]


def _but(axis: int, rank: int) -> tuple[int, ...]:
    return tuple(i for i in range(rank) if i != axis)
