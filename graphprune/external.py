"""Weights that stay on disk: a tensor that says in which file its bytes lie and what it keeps of
them. Nothing is read before it is needed, and a cut of such a weight costs nothing until written.

Such a tensor is a ``TensorProto`` with external data whose location is an absolute path; what a
cut keeps stands beside it, as one bit per slot.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

Array = NDArray[Any]
LAZY = 1 << 20  # bytes from which a weight stays in its file
CHUNK = 1 << 25  # bytes handled at a time
KEEP, WHOLE = "graphprune.keep", "graphprune.whole"


def on_disk(tensor: onnx.TensorProto) -> bool:
    """Whether the tensor's bytes lie in a file."""
    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL)


def dtype_of(tensor: onnx.TensorProto) -> np.dtype[Any]:
    return np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type))


def size_of(tensor: onnx.TensorProto) -> int:
    """Bytes of the values of a tensor of whole bytes."""
    return int(math.prod(tensor.dims)) * dtype_of(tensor).itemsize


def array(tensor: onnx.TensorProto) -> Array:
    """The values; of one on disk a read-only map, or the part of it that was kept."""
    if not on_disk(tensor):
        return numpy_helper.to_array(tensor)
    value, kept = _mapped(tensor)
    for axis, slots in kept.items():
        value = np.take(value, slots, axis=axis)
    return value


def chunks(tensor: onnx.TensorProto) -> Iterator[Array]:
    """The values in order, some rows of the first axis at a time."""
    if not on_disk(tensor):
        yield numpy_helper.to_array(tensor)
        return
    value, kept = _mapped(tensor)
    rows = kept.pop(0, np.arange(len(value)))
    step = max(1, CHUNK // max(1, value[:1].nbytes))
    for start in range(0, len(rows), step):
        picked = rows[start : start + step]
        whole = len(picked) == picked[-1] + 1 - picked[0]
        part = value[picked[0] : picked[-1] + 1] if whole else value[picked]
        for axis, slots in kept.items():
            part = np.take(part, slots, axis=axis)
        yield np.ascontiguousarray(part)


def raw_chunks(tensor: onnx.TensorProto) -> Iterator[bytes | memoryview]:
    """The bytes of a tensor with raw data, or of one on disk."""
    if not on_disk(tensor):
        yield tensor.raw_data
        return
    for part in chunks(tensor):
        yield part.reshape(-1).view(np.uint8).data


def sliced(tensor: onnx.TensorProto, kept: Mapping[int, Array]) -> onnx.TensorProto:
    """The tensor on disk, of which ``kept`` (bool per slot, by axis) remains; nothing is read."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    entries.setdefault(WHOLE, "x".join(map(str, tensor.dims)))
    whole = [int(size) for size in entries[WHOLE].split("x")]
    result = onnx.TensorProto()
    result.CopyFrom(tensor)
    for axis, mask in kept.items():
        key = f"{KEEP}{axis}"
        slots = _slots(entries[key], whole[axis]) if key in entries else np.arange(whole[axis])
        bits = np.zeros(whole[axis], bool)
        bits[slots[mask]] = True
        entries[key] = np.packbits(bits).tobytes().hex()
        result.dims[axis] = int(mask.sum())
    del result.external_data[:]
    for key, value in entries.items():
        result.external_data.add(key=key, value=value)
    return result


def in_memory(tensor: onnx.TensorProto) -> onnx.TensorProto:
    """The tensor with its values inside."""
    if not on_disk(tensor):
        return tensor
    result = numpy_helper.from_array(np.asarray(array(tensor), order="C"), tensor.name)
    result.data_type, result.doc_string = tensor.data_type, tensor.doc_string
    return result


def pointed(
    tensor: onnx.TensorProto, path: Path | str, offset: int, size: int | None = None
) -> onnx.TensorProto:
    """A tensor of the same name, type and shape whose bytes lie in ``path`` from ``offset`` on."""
    length = size_of(tensor) if size is None else size
    result = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    if tensor.doc_string:
        result.doc_string = tensor.doc_string
    result.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", path), ("offset", offset), ("length", length)):
        result.external_data.add(key=key, value=str(value))
    return result


def folder_of(tensors: Iterable[onnx.TensorProto]) -> Path | None:
    """The folder of all files that tensors lie in; ``None`` where there are several folders, or
    where only a part of a tensor is kept."""
    folders = set()
    for tensor in tensors:
        if on_disk(tensor):
            entries = {entry.key: entry.value for entry in tensor.external_data}
            folders.add(None if WHOLE in entries else Path(entries["location"]).parent)
    return folders.pop() if len(folders) == 1 else None


def named_in(tensor: onnx.TensorProto, folder: Path) -> onnx.TensorProto:
    """The tensor with its file named as ``folder`` sees it."""
    if not on_disk(tensor):
        return tensor
    entries = {entry.key: entry.value for entry in tensor.external_data}
    name = Path(entries["location"]).relative_to(folder)
    return pointed(tensor, name, int(entries["offset"]))


def _mapped(tensor: onnx.TensorProto) -> tuple[Array, dict[int, Array]]:
    """The whole array as a map of its file, and by axis the slots that are kept."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    whole = entries.get(WHOLE)
    shape = tuple(map(int, whole.split("x"))) if whole else tuple(tensor.dims)
    kept = {
        axis: _slots(entries[f"{KEEP}{axis}"], size)
        for axis, size in enumerate(shape)
        if f"{KEEP}{axis}" in entries
    }
    path, offset = entries["location"], int(entries.get("offset") or 0)
    value: Array = np.memmap(path, dtype_of(tensor), mode="r", offset=offset, shape=shape)
    return value.view(np.ndarray), kept


def _slots(bits: str, size: int) -> Array:
    return np.flatnonzero(np.unpackbits(np.frombuffer(bytes.fromhex(bits), np.uint8), count=size))
