"""Results that cost minutes, kept in a folder beside the model by a hash of all they depend on."""

from __future__ import annotations

import hashlib
import os
import time
import zipfile
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from graphprune.model import Array

FOLDER = ".graphprune"
WORTH_KEEPING = 2.0  # seconds: what takes less is made anew
FORMAT = 5  # changes with what a cached result means
BROKEN = (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error)
Arrays = Mapping[str, Array]


@dataclass(frozen=True)
class Cache:
    """Named arrays by key. ``folder`` is ``None`` where nothing is to be kept."""

    folder: Path | None

    def __call__(self, parts: object, make: Callable[[], Arrays]) -> Arrays:
        """What ``make`` gives, from the cache where ``parts`` (printed) were seen before.

        A folder that cannot be written to is done without; a damaged entry is made anew.
        """
        if self.folder is None:
            return make()
        key = hashlib.sha256(repr((FORMAT, parts)).encode()).hexdigest()
        path = self.folder / f"{key[:32]}.npz"
        found = _read(path)
        if found is not None:
            return found
        start = time.perf_counter()
        made = make()
        if time.perf_counter() - start >= WORTH_KEEPING:
            _write(path, made)
        return made


def beside(model: object) -> Path | None:
    """The cache folder of a model file; ``None`` for a model in memory."""
    if not isinstance(model, str | Path):
        return None
    return Path(model).resolve().parent / FOLDER


def _read(path: Path) -> Arrays | None:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except BROKEN:  # absent, or cut short by a full disk: as good as absent
        return None


def _write(path: Path, arrays: Arrays) -> None:
    """Written beside and renamed. A read-only or full disk costs time next run, nothing else."""
    part = path.with_name(f"{path.stem}.{os.getpid()}.part")
    try:
        path.parent.mkdir(exist_ok=True)
        with part.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        part.replace(path)
    except OSError:
        with suppress(OSError):  # there may be no folder to remove it from
            part.unlink()
