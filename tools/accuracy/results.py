"""Measured results as JSON lines: looked up before anything is run again."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Result:
    """One model file, measured. accuracy, kept: in [0, 1], `None` where `error` says why.

    request: hash of the command, the model and the data; sources: hash of the tool's own files.
    kept: MACs over those of the dense model. seconds: of the whole command; stages: as told by it.
    """

    case: str
    method: str
    ratio: float
    request: str
    sources: str
    version: str
    accuracy: float | None = None
    macs: int | None = None
    kept: float | None = None
    seconds: float | None = None
    stages: dict[str, float] = field(default_factory=dict)
    way: str = ""
    error: str = ""


def read(path: Path) -> list[Result]:
    """All results of the file, oldest first; none where there is no file."""
    if not path.exists():
        return []
    return [Result(**json.loads(line)) for line in path.read_text().splitlines()]


def append(path: Path, result: Result) -> None:
    with path.open("a") as file:
        file.write(json.dumps(asdict(result)) + "\n")


def find(results: Iterable[Result], request: str, sources: str | None) -> Result | None:
    """The newest answer to a request; of any version of the tool where `sources` is None.

    A failure counts for its own version only.
    """
    same = [r for r in results if r.request == request]
    exact = [r for r in same if r.sources == sources]
    usable = [r for r in same if not r.error] if sources is None else exact
    return usable[-1] if usable else None


def request_hash(parts: Iterable[Any], files: Iterable[Path]) -> str:
    """Hash of what is asked: words, and the contents of files."""
    words = json.dumps([str(part) for part in parts])
    return _digest([words, *(file_hash(path, path.stat().st_mtime_ns) for path in files)])


@cache
def file_hash(path: Path, modified: int) -> str:
    """Hash of a file's contents; `modified`, its time, keeps the cache honest."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sources_hash(places: Iterable[Path]) -> str:
    """Hash of program files, and of those in folders."""
    files = [f for place in places for f in ([place] if place.is_file() else place.rglob("*"))]
    programs = sorted(f for f in files if f.suffix in (".py", ".toml"))
    return _digest([f.name + hashlib.sha256(f.read_bytes()).hexdigest() for f in programs])


def _digest(texts: list[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
