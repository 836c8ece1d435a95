"""Residual blocks as a table and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from graphprune.version import __version__

LONGEST_NAME = 48


@dataclass(frozen=True)
class BlockRow:
    """One residual block. ``macs``, ``params`` and ``latency`` are shares of the model's that leave
    with it; ``alone`` is the distortion of the outputs when it is bypassed, ``turn`` 1 - cosine of
    the sum with it and without. It is the ``place``-th to leave; with all before it gone too, the
    distortion is ``together``."""

    name: str
    kind: str
    entry: str
    exit: str
    macs: float
    params: float
    latency: float | None
    alone: float
    turn: float
    place: int
    together: float


@dataclass(frozen=True)
class Depth:
    """A model's residual blocks in their order, and what they were measured on."""

    rows: tuple[BlockRow, ...]
    kept: tuple[str, ...]  # blocks that --protect or --only keep
    calibration: str
    notes: tuple[str, ...]
    seconds: dict[str, float]

    @property
    def greedy(self) -> list[str]:
        """Names in the order in which blocks leave."""
        return [row.name for row in sorted(self.rows, key=lambda row: row.place)]


def blocks_table(depth: Depth) -> Group:
    table = Table(title="residual blocks", title_style="bold")
    table.add_column("block", overflow="fold")
    table.add_column("kind")
    timed = any(row.latency is not None for row in depth.rows)
    shares = ["MACs", "params", *(["latency"] if timed else [])]
    for name in (*shares, "loss", "1-cosine", "leaves", "by then"):
        table.add_column(name, justify="right")
    for row in depth.rows:
        times = [] if row.latency is None else [f"{row.latency:.1%}"]
        measured = (f"{row.alone:.3g}", f"{row.turn:.3g}", f"{row.place}.", f"{row.together:.3g}")
        costs = (f"{row.macs:.1%}", f"{row.params:.1%}", *times)
        table.add_row(_short(row.name), row.kind, *costs, *measured)
    lines = [f"calibrated on: {depth.calibration}"]
    lines += [f"note: {note}" for note in depth.notes]
    if depth.kept:
        lines.append(f"must stay: {', '.join(depth.kept)}")
    if depth.rows:
        lines.append(
            "loss: squared error of the outputs over their variance without the block, nothing "
            "repaired; by then: with all that leave before it gone too. Next leaves what loses "
            "least for the MACs that it saves."
        )
    else:
        lines.append("no residual block may leave")
    return Group(*([table] if depth.rows else []), *map(Text, lines))


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"…{name[1 - LONGEST_NAME :]}"


def blocks_document(depth: Depth, model: str | Path) -> dict[str, Any]:
    """What a program reads; absent values are null."""
    return {
        "schema": "graphprune.blocks/1",
        "graphprune": __version__,
        "model": str(model),
        "blocks": [asdict(row) for row in depth.rows],
        "greedy": depth.greedy,
        "kept": list(depth.kept),
        "calibration": depth.calibration,
        "notes": list(depth.notes),
        "seconds_by_stage": dict(depth.seconds),
    }
