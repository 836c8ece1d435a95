"""Latency tables: microseconds of a form at given counts, kept as TOML."""

from __future__ import annotations

import itertools
import json
import os
import tomllib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graphprune.errors import UsageError

Counts = tuple[int, ...]
KEYS = {"form", "counts", "microseconds"}


@dataclass
class Table:
    """Microseconds by form and counts. Grows as pieces are timed."""

    entries: dict[str, dict[Counts, float]] = field(default_factory=dict)
    grown: bool = False

    def enter(self, form: str, counts: Counts, microseconds: float) -> None:
        self.entries.setdefault(form, {})[counts] = microseconds
        self.grown = True

    def at(self, form: str, counts: Counts) -> float | None:
        """The entry itself."""
        return self.entries.get(form, {}).get(counts)

    def between(self, form: str, counts: Counts) -> float | None:
        """Multilinear between the nearest entries around ``counts``, where all of them exist."""
        known = self.entries.get(form, {})
        if not known or len(next(iter(known))) != len(counts):
            return None
        around = []
        for knob, count in enumerate(counts):
            values = sorted({entry[knob] for entry in known})
            below = max((v for v in values if v <= count), default=None)
            above = min((v for v in values if v >= count), default=None)
            if below is None or above is None:
                return None
            around.append((below, above))
        return interpolated(counts, around, known.get)


def interpolated(counts: Counts, around: list[tuple[int, int]], value: Any) -> float | None:
    """The corners' values, weighed by nearness; ``None`` where a corner has none."""
    total = 0.0
    for corner in itertools.product(*(dict.fromkeys(pair) for pair in around)):
        weight = 1.0
        for count, at, (below, above) in zip(counts, corner, around, strict=True):
            share = 0.0 if above == below else (count - below) / (above - below)
            weight *= share if at == above and above != below else 1 - share
        if weight == 0:
            continue
        found = value(corner)
        if found is None:
            return None
        total += weight * found
    return total


def parse(rows: object, where: str) -> dict[str, dict[Counts, float]]:
    """The ``[[latency]]`` tables of a target file. Raises ``UsageError`` where one is malformed."""
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        hint = "Write [[latency]] above each; `graphprune targets measure` does."
        raise UsageError("`latency` must be a list of tables", where, hint)
    entries: dict[str, dict[Counts, float]] = {}
    for row in rows:
        counts, times = row.get("counts"), row.get("microseconds")
        sound = (
            set(row) == KEYS
            and isinstance(row["form"], str)
            and isinstance(counts, list)
            and isinstance(times, list)
            and len(counts) == len(times)
            and all(isinstance(c, list) and all(type(n) is int for n in c) for c in counts)
            and all(type(t) in (int, float) and t >= 0 for t in times)
            and len({len(c) for c in counts}) <= 1
        )
        if not sound:
            raise UsageError(
                "a latency table needs a form, counts (lists of whole numbers, equally long) and "
                "as many microseconds from 0 on",
                f"{where}: form {str(row.get('form'))[:80]!r}",
                "Write one with `graphprune targets measure -o FILE.toml`.",
            )
        entries[row["form"]] = {tuple(c): float(t) for c, t in zip(counts, times, strict=True)}
    return entries


def lines(entries: Mapping[str, Mapping[Counts, float]]) -> Iterable[str]:
    """The entries as TOML, in a fixed order."""
    for form in sorted(entries):
        rows = sorted(entries[form].items())
        yield "[[latency]]"
        yield f"form = {json.dumps(form)}"
        yield f"counts = {json.dumps([list(counts) for counts, _ in rows])}"
        yield f"microseconds = {json.dumps([round(time, 2) for _, time in rows])}"
        yield ""


def read(path: Path) -> Table:
    """A table kept before; an empty one where there is none, or only a damaged one."""
    try:
        data = tomllib.loads(path.read_text())
        return Table(parse(data.get("latency", []), str(path)))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, UsageError):
        return Table()  # what is kept is only a saving of time


def keep(table: Table, path: Path) -> None:
    """Write the table beside and rename. A folder that cannot be written to is done without."""
    part = path.with_name(f"{path.stem}.{os.getpid()}.part")
    try:
        path.parent.mkdir(exist_ok=True)
        part.write_text("\n".join(lines(table.entries)))
        part.replace(path)
    except OSError:
        with suppress(OSError):  # there may be no folder to remove it from
            part.unlink()
