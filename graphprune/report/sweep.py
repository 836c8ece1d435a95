"""A sweep as a table, as CSV, as a JSON document and as a plot."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from graphprune.version import __version__

if TYPE_CHECKING:
    from graphprune.result import Point, Sweep

COLUMNS = "target macs params bytes memory latency_ms latency_ratio error accuracy best".split()
WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 64, 620, 40, 344  # of the plotted area
INK, PALE, MARK = "#333", "#d0d0d0", "#1f5fa8"


def sweep_table(sweep: Sweep) -> RenderableType:
    """One row for each target, the shares of the original's costs that are left."""
    before = sweep.before
    scored = before.accuracy is not None
    table = Table(title=f"sweep by {sweep.by}", title_style="bold", header_style="bold")
    for name in ("", "target", "MACs", "params", "file", "activ.", "as fast", "error"):
        table.add_column(name, justify="right")
    if scored:
        table.add_column("top-1", justify="right")
    table.add_column("model", overflow="fold")
    for point in sweep.points:
        table.add_row(*_cells(sweep, point, scored))
    marked = [point for point in sweep.points if point.best]
    timed = any(point.latency_ratio is not None for point in sweep.points)
    nearer = "more accurate" if scored else "nearer to the original"
    lines: list[RenderableType] = [table]
    if marked:
        faster = "faster" if timed else "smaller"
        lines.append(Text(f"* no other plan here is {faster} and {nearer}"))
    if any(point.error is not None for point in sweep.points):
        lines.append(Text(f"error: of the outputs, relative, on {sweep.error_on}"))
    lines += [Text(line) for line in _notes(sweep)]
    shared = ", ".join(f"{name} {value:.2f}" for name, value in sweep.seconds.items())
    own = sum(sum(point.seconds.values()) for point in sweep.points)
    lines.append(Text(f"seconds: {shared}; all plans {own:.2f}", style="dim"))
    lines += [Text(f"written: {path}", style="bold") for path in sweep.written]
    return Group(*lines)


def _notes(sweep: Sweep) -> list[str]:
    """What is worth saying of all plans, once; then of one or the other."""
    made = [point for point in sweep.points if point.after is not None]
    common = [n for n in made[0].notes if all(n in point.notes for point in made)]
    own = [(p.target, note) for p in made for note in p.notes if note not in common]
    lines = [f"note: {note}" for note in common]
    lines += [f"note for {target:g}: {note}" for target, note in own]
    return lines + [
        f"held back at {p.target:g}: {p.held_back}" for p in made if p.held_back is not None
    ]


def _cells(sweep: Sweep, point: Point, scored: bool) -> list[str]:
    before, after = sweep.before, point.after
    head = ["*" if point.best else "", f"{point.target:g}"]
    if after is None:
        reason = "" if point.failure is None else point.failure.what
        return [*head, *["-"] * (6 + scored), reason]
    pairs = [(getattr(after, k), getattr(before, k)) for k in ("macs", "params", "bytes", "memory")]
    shares = [f"{a / b:.1%}" if b else "-" for a, b in pairs]
    fast = "-" if point.latency_ratio is None else f"{1 / point.latency_ratio:.2f}x"
    cells = [*head, *shares, fast, "-" if point.error is None else f"{point.error:.3g}"]
    if scored:
        cells.append("-" if after.accuracy is None else f"{after.accuracy:.2%}")
    written = "" if point.output is None else point.output.name
    return [*cells, f"{written} (replaced)" if point.replaced else written]


def sweep_document(sweep: Sweep, model: str | Path) -> dict[str, Any]:
    """What a program reads; absent values are null."""
    return {
        "schema": "graphprune.sweep/1",
        "graphprune": __version__,
        "model": str(model),
        "by": sweep.by,
        "before": asdict(sweep.before),
        "error_on": sweep.error_on,
        "points": [
            {
                "target": point.target,
                "output": None if point.output is None else str(point.output),
                "replaced": point.replaced,
                "after": None if point.after is None else asdict(point.after),
                "latency_ratio": point.latency_ratio,
                "error": point.error,
                "best": point.best,
                "held_back": point.held_back,
                "notes": list(point.notes),
                "seconds_by_stage": dict(point.seconds),
                "failure": None
                if point.failure is None
                else {"exit_code": point.failure.exit_code, "message": str(point.failure)},
            }
            for point in sweep.points
        ],
        "lossless": None if sweep.cleaned is None else sweep.cleaned.document(),
        "seconds_by_stage": dict(sweep.seconds),
        "written": [str(path) for path in sweep.written],
    }


def sweep_csv(sweep: Sweep) -> str:
    """The original, then every plan; costs as they are, not as shares."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(COLUMNS)
    costs = ("macs", "params", "bytes", "memory", "latency_ms")
    rows.writerow(
        ["", *(getattr(sweep.before, k) for k in costs), 1.0, 0.0, sweep.before.accuracy, ""]
    )
    for point in sweep.points:
        after = point.after
        values = [None if after is None else getattr(after, k) for k in costs]
        accuracy = None if after is None else after.accuracy
        mark = "*" if point.best else ""
        rows.writerow([point.target, *values, point.latency_ratio, point.error, accuracy, mark])
    return text.getvalue()


def sweep_svg(sweep: Sweep, name: str) -> str:
    """Loss against time, less of both towards the lower left; the plans that none dominates are
    full and joined."""
    scored = sweep.before.accuracy is not None
    places = [(point, *_place(sweep, point)) for point in sweep.points if point.after is not None]
    known = [(point, x, y) for point, x, y in places if y is not None]
    timed = any(point.latency_ratio is not None for point, _, _ in known)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="sans-serif" font-size="12"><title>{escape(name)}</title>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text((LEFT + RIGHT) / 2, 22, f"{name}: sweep by {sweep.by}", size=14),
    ]
    xs = _ticks([0.0, 1.0, *(x for _, x, _ in known)])
    worst = "points of top-1 lost" if scored else f"relative error on {sweep.error_on}"
    ys = _ticks([0.0, *(y for _, _, y in known)])

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - xs[0]) / (xs[-1] - xs[0])
        up = (y - ys[0]) / (ys[-1] - ys[0])
        return LEFT + across * (RIGHT - LEFT), BOTTOM - up * (BOTTOM - TOP)

    for x in xs:
        parts.append(_text(at(x, ys[0])[0], BOTTOM + 18, f"{x:g}"))
    for y in ys:
        level = at(xs[0], y)[1]
        parts.append(
            f'<line x1="{LEFT}" y1="{level:.1f}" x2="{RIGHT}" y2="{level:.1f}" stroke="{PALE}"/>'
        )
        parts.append(_text(LEFT - 6, level + 4, f"{y:g}", anchor="end"))
    time = "latency" if timed else "MACs"
    parts.append(_text((LEFT + RIGHT) / 2, BOTTOM + 40, f"{time}, share of the original's"))
    parts.append(_text(LEFT, TOP - 8, worst, anchor="start"))
    front = sorted((x, y) for point, x, y in known if point.best)
    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in (at(x, y) for x, y in front))
    parts.append(f'<polyline points="{line}" fill="none" stroke="{MARK}"/>')
    for point, x, y in known:
        a, b = at(x, y)
        fill = MARK if point.best else "white"
        parts.append(
            f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="{fill}" stroke="{MARK}">'
            f"<title>{sweep.by} {point.target:g}</title></circle>"
        )
        parts.append(_text(a + 7, b - 6, f"{point.target:g}", anchor="start"))
    return "\n".join([*parts, "</svg>\n"])


def _place(sweep: Sweep, point: Point) -> tuple[float, float | None]:
    """Share of the time (of the MACs where nothing was timed), and what was lost."""
    before, after = sweep.before, point.after
    assert after is not None
    time = point.latency_ratio
    if time is None:
        time = after.macs / max(before.macs, 1)
    if before.accuracy is not None and after.accuracy is not None:
        return time, (before.accuracy - after.accuracy) * 100
    return time, point.error


def _ticks(values: Sequence[float]) -> list[float]:
    """Four to ten round numbers that hold all values between the first and the last."""
    low, high = min(values), max(values)
    span = max(high - low, 1e-6)
    step = 10 ** math.floor(math.log10(span))
    step = next(step * k for k in (0.1, 0.2, 0.25, 0.5, 1, 2) if span / (step * k) <= 8)
    first, last = math.floor(low / step), math.ceil(high / step - 1e-9)
    return [round(k * step, 12) for k in range(first, max(last, first + 1) + 1)]


def _text(x: float, y: float, text: str, anchor: str = "middle", size: int = 12) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{INK}" '
        f'font-size="{size}">{escape(text)}</text>'
    )
