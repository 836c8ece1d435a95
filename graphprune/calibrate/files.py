"""Calibration inputs from files: arrays of an .npz file, pictures of a folder."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from PIL import Image

from graphprune.calibrate.numbers import as_numbers, rounded, taken_whole
from graphprune.calibrate.preprocess import Preprocess, completed, picture_input
from graphprune.calibrate.samples import Samples, batched_inputs
from graphprune.errors import UsageError
from graphprune.model import Array, Model
from graphprune.runtime import input_dtype
from graphprune.shapes import Shapes
from graphprune.sizes import check_samples, declared
from graphprune.wording import lengths_text, shape_text

ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm"}
UNREADABLE = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    NotImplementedError,  # a compression that zipfile lacks
    OSError,
    RuntimeError,  # an encrypted member
    SyntaxError,  # a damaged header of an array or of a picture
    ValueError,
)
PIECE = 2**20  # bytes read at a time
ROWS = 64  # looked at together
READERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
Header = tuple[tuple[int, ...], bool, np.dtype[Any]]  # shape, whether in Fortran's order, type


def from_npz(path: str | Path, model: Model, count: int | None = None) -> Samples:
    """``count`` rows of an .npz file with one array for each graph input, evenly over the file and
    shuffled: files are sorted by class, and some rows are held out from what others are fitted to.

    Further arrays (``labels``) are ignored. Each array is copied to an unnamed file and mapped, so
    that memory holds only what is read. Raises ``UsageError`` for what does not fit the model.
    """
    path = Path(path)
    arrays = _map_members(path, [value.name for value in model.inputs])
    for value in model.inputs:
        check_samples(arrays[value.name].shape, value, _named(value.name, path))
    batched = _batched(model, arrays, path)
    lengths = {name: len(arrays[name]) for name in arrays if name in batched}
    if len(set(lengths.values())) > 1:
        raise UsageError(
            f"arrays of different lengths: {lengths_text(lengths)}",
            str(path),
            "Give one row for each sample in all.",
        )
    available = next(iter(lengths.values()), 1)
    if not available:
        raise UsageError("the arrays are empty", str(path), "Give a row for each sample.")
    total = available if count is None else min(count, available)
    dtypes = {value.name: input_dtype(value) for value in model.inputs}
    taken = np.random.default_rng(0).permutation(total) * available // max(total, 1)

    def read(start: int, stop: int) -> dict[str, Array]:
        rows = taken[start:stop]
        return {
            name: as_numbers(
                array[rows] if name in batched else array, dtypes[name], _named(name, path)
            )
            for name, array in arrays.items()
        }

    for start in range(0, max(total, 1), ROWS):  # what is wrong with any of them is said now
        read(start, min(start + ROWS, total))
    notes = tuple(
        taken_whole(name, path) for name, array in arrays.items() if rounded(array, dtypes[name])
    )

    digest = hashlib.sha256(f"npz {total}".encode())
    for name, array in arrays.items():
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        _digest_rows(digest, (array[i] for i in taken) if name in batched else array[None])
    return Samples(total, f"{total} rows of {path.name}", digest.hexdigest(), read, notes)


def from_folder(
    path: str | Path,
    model: Model,
    shapes: Shapes,
    preprocess: Preprocess,
    count: int | None = None,
    seed: int = 0,
) -> Samples:
    """Pictures of a folder and the folders in it, in order of their names, decoded when read.

    Where ``count`` is smaller, that many are drawn by ``seed``. Raises ``UsageError`` for an empty
    folder, a model that takes no pictures, and, naming the file, a picture that cannot be decoded.
    """
    path = Path(path)
    to = picture_input(model, shapes, preprocess)
    preprocess = completed(preprocess, to)
    chosen = pictures_of(path, count, seed)

    def read(start: int, stop: int) -> dict[str, Array]:
        pixels = [preprocess.decode(open_picture(file), to) for file in chosen[start:stop]]
        return {to.name: preprocess.encode(np.stack(pixels), to)}

    digest = hashlib.sha256(repr(("folder", to, preprocess.document())).encode())
    for file in chosen:
        digest.update(_file_digest(file))
    return Samples(
        len(chosen),
        f"{len(chosen)} pictures of {path.name}, as {preprocess}",
        digest.hexdigest(),
        read,
    )


def pictures_of(path: Path, count: int | None, seed: int) -> list[Path]:
    """The folder's pictures in order; where there are more than ``count``, a draw of them."""
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in ENDINGS)
    found = [file for file in found if file.is_file()]
    if not found:
        raise UsageError(
            "the folder holds no pictures", str(path), f"Known are {' '.join(sorted(ENDINGS))}."
        )
    if count is None or count >= len(found):
        return found
    order = np.random.default_rng(seed).permutation(len(found))[:count]
    return [found[i] for i in order]


def open_picture(path: Path) -> Image.Image:
    """A picture, decoded; raises ``UsageError`` that names the file."""
    try:
        with warnings.catch_warnings():  # about palettes, and sizes that only look like bombs
            warnings.simplefilter("ignore")
            with Image.open(path) as picture:
                picture.load()
                return picture.copy()
    except (*UNREADABLE, Image.DecompressionBombError) as error:
        raise UsageError(
            f"cannot decode the picture: {error}", str(path), "Take it out of the folder."
        ) from error


def check_npz(path: str | Path, model: Model) -> None:
    """As ``from_npz`` for names, types and shapes alone: heads are read, and no numbers."""
    path = Path(path)
    with _archive(path, [value.name for value in model.inputs]) as archive:
        shapes = {value.name: _head(archive, value.name, path) for value in model.inputs}
    for value in model.inputs:
        check_samples(shapes[value.name], value, _named(value.name, path))


def _named(name: str, path: Path) -> str:
    return f"array {name!r} of {path}"


def _map_members(path: Path, names: Sequence[str]) -> dict[str, Array]:
    """The arrays of an .npz file, each mapped from an unnamed copy on disk."""
    with _archive(path, names) as archive:
        return {name: _mapped(archive, name, path) for name in names}


@contextmanager
def _archive(path: Path, names: Sequence[str]) -> Iterator[zipfile.ZipFile]:
    """The .npz file, which holds arrays of these names; what cannot be read in it is its fault."""
    try:
        with zipfile.ZipFile(path) as archive:
            held = {name.removesuffix(".npy") for name in archive.namelist()}
            if not set(names) <= held:
                raise UsageError(
                    f"the file holds {', '.join(sorted(held)) or 'nothing'}",
                    str(path),
                    f"It needs one array for each of {', '.join(sorted(names))}.",
                )
            yield archive
    except UNREADABLE as error:
        cause = (
            error.strerror if isinstance(error, OSError) and error.strerror else "not an .npz file"
        )
        raise UsageError(
            f"cannot read arrays from the file: {cause}", f"--calib {path}", "Check the path."
        ) from error


def _mapped(archive: zipfile.ZipFile, name: str, path: Path) -> Array:
    """One member as a read-only map of an unnamed file, which goes with the array."""
    with archive.open(f"{name}.npy") as member, tempfile.TemporaryFile() as copy:
        shape, fortran, dtype = _header(member, name, path)
        shutil.copyfileobj(member, copy, PIECE)
        size = copy.tell()
        if size != dtype.itemsize * int(np.prod(shape, dtype=np.int64)):
            raise ValueError(f"{name} holds {size} bytes")
        if not size:
            return np.empty(shape, dtype)
        copy.flush()
        return np.memmap(copy, dtype, "r", shape=shape, order="F" if fortran else "C")


def _head(archive: zipfile.ZipFile, name: str, path: Path) -> tuple[int, ...]:
    """The shape of one member, which holds numbers."""
    with archive.open(f"{name}.npy") as member:
        return _header(member, name, path)[0]


def _header(member: IO[bytes], name: str, path: Path) -> Header:
    version = npy.read_magic(member)
    if version not in READERS:
        raise ValueError(f"version {version} of the array format")
    shape, fortran, dtype = READERS[version](member)
    as_numbers(np.empty(0, dtype), dtype, _named(name, path))
    return shape, fortran, dtype


def _batched(model: Model, arrays: dict[str, Array], path: Path) -> frozenset[str]:
    """The inputs whose rows are samples; the others must have the size that is declared."""
    batched = batched_inputs(model)
    for value in model.inputs:
        dims, shape = declared(value), arrays[value.name].shape
        if value.name not in batched and dims and dims[0] not in (None, shape[0]):
            raise UsageError(
                f"shape {list(shape)} does not fit the declared {shape_text(dims)}",
                _named(value.name, path),
                "Give samples as the model takes them, along the first axis.",
            )
    return frozenset(name for name in batched if arrays[name].ndim)


def _digest_rows(digest: Any, rows: Iterable[Array]) -> None:
    for row in rows:
        digest.update(np.ascontiguousarray(row))


def _file_digest(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").digest()
    except OSError as error:
        raise UsageError(
            f"cannot read the picture: {error.strerror}", str(path), "Check its permissions."
        ) from error
