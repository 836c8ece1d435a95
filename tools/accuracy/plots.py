"""Line charts as small SVGs: accuracy against MACs kept, one line per method; and on log axes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 52, 190, 34, 44
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito
GREY, LINE = "#767676", "#d0d0d0"
STEPS = (1.0, 2.0, 5.0, 10.0, 20.0)
LABEL_DISTANCE = 15  # pixels between the names at the ends of the lines

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line: points (for accuracy: MACs kept in [0, 1], top-1 in percent)."""

    name: str
    points: tuple[Point, ...]


def line_chart(title: str, series: Sequence[Series], dense: float) -> str:
    """The SVG. `dense` is the original's top-1, drawn as a dashed line and as each line's end."""
    lines = [(s.name, sorted({*s.points, (1.0, dense)})) for s in series]
    values = [dense, *(y for _, points in lines for _, y in points)]
    lowest, step = _floor(values)
    left = min((x for _, points in lines for x, _ in points), default=0.3)

    def x_of(kept: float) -> float:
        return LEFT + (kept - left) / max(1 - left, 1e-9) * (WIDTH - LEFT - RIGHT)

    def y_of(top: float) -> float:
        return TOP + (100 - top) / (100 - lowest) * (HEIGHT - TOP - BOTTOM)

    drawn = [_text(WIDTH / 2 - RIGHT / 2 + LEFT / 2, 20, title, "middle", "#333", 14)]
    for i in range(round((100 - lowest) / step) + 1):
        level = lowest + i * step
        drawn += [_rule(LEFT, y_of(level), WIDTH - RIGHT, y_of(level), LINE)]
        drawn += [_text(LEFT - 6, y_of(level) + 4, f"{level:g}", "end", GREY)]
    for tenth in range(1, 11):
        if tenth / 10 >= left - 1e-9:
            drawn.append(_text(x_of(tenth / 10), HEIGHT - BOTTOM + 18, f"{tenth / 10:g}", "middle"))
    drawn.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, "MACs kept", "middle"))
    drawn.append(_text(14, TOP - 8, "top-1, %", "start"))
    drawn.append(_rule(LEFT, y_of(dense), WIDTH - RIGHT, y_of(dense), GREY, "5 4"))
    drawn.append(_text(WIDTH - RIGHT + 8, y_of(dense) + 4, f"dense {dense:.1f}", "start", GREY))
    for i, (name, points) in enumerate(lines):
        colour = COLOURS[i % len(COLOURS)]
        path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in points)
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        drawn += [
            f'<circle cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="3" fill="{colour}"/>'
            for x, y in points[:-1]
        ]
        drawn += _named(name, y_of(dense) + 12 + LABEL_DISTANCE * (i + 1), colour)
    return _framed(title, drawn)


def log_chart(title: str, x_name: str, y_name: str, series: Sequence[Series]) -> str:
    """The SVG of positive numbers on log axes, and a dotted line that grows as fast as x does."""
    points = [point for line in series for point in line.points]
    low_x, high_x = (f(math.log10(x) for x, _ in points) for f in (min, max))
    low_y = math.floor(min(math.log10(y) for _, y in points))
    high_y = math.ceil(max(math.log10(y) for _, y in points))

    def x_of(value: float) -> float:
        share = (math.log10(value) - low_x) / max(high_x - low_x, 1e-9)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y_of(value: float) -> float:
        share = (math.log10(value) - low_y) / max(high_y - low_y, 1)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    drawn = [_text(WIDTH / 2 - RIGHT / 2 + LEFT / 2, 20, title, "middle", "#333", 14)]
    for power in range(low_y, high_y + 1):
        drawn += [_rule(LEFT, y_of(10.0**power), WIDTH - RIGHT, y_of(10.0**power), LINE)]
        drawn += [_text(LEFT - 6, y_of(10.0**power) + 4, f"{10.0**power:g}", "end", GREY)]
    for power in range(math.ceil(low_x), math.floor(high_x) + 1):
        drawn.append(_text(x_of(10.0**power), HEIGHT - BOTTOM + 18, f"{10.0**power:g}", "middle"))
    drawn.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x_name, "middle"))
    drawn.append(_text(14, TOP - 8, y_name, "start"))
    last = max(series[0].points)
    fall = min(last[1] / 10.0**low_y, 10 ** (high_x - low_x))
    start, end = (last[0] / fall, last[1] / fall), last
    drawn.append(_rule(x_of(start[0]), y_of(start[1]), x_of(end[0]), y_of(end[1]), GREY, "2 4"))
    for i, line in enumerate(series):
        colour = COLOURS[i % len(COLOURS)]
        path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in sorted(line.points))
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        drawn += [
            f'<circle cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="3" fill="{colour}"/>'
            for x, y in line.points
        ]
        drawn += _named(line.name, TOP + 12 + LABEL_DISTANCE * i, colour)
    drawn += _named("linear", TOP + 12 + LABEL_DISTANCE * len(series), GREY)
    return _framed(title, drawn)


def _named(name: str, height: float, colour: str) -> list[str]:
    rule = _rule(WIDTH - RIGHT + 8, height - 4, WIDTH - RIGHT + 24, height - 4, colour)
    return [rule, _text(WIDTH - RIGHT + 30, height, name, "start", "#333")]


def _framed(title: str, drawn: Sequence[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="sans-serif" font-size="12"><title>{escape(title)}</title>'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>'
    )
    return "\n".join([head, *drawn, "</svg>", ""])


def _floor(values: Sequence[float]) -> tuple[float, float]:
    """Where the axis begins, and the distance of its lines: at most eleven of them below 100."""
    spread = 100 - min(values)
    step = next((s for s in STEPS if spread / s <= 10), STEPS[-1])
    return max(0.0, 100 - step * -(-spread // step)), step


def _text(
    x: float, y: float, text: str, anchor: str, colour: str = GREY, size: int | None = None
) -> str:
    larger = "" if size is None else f' font-size="{size}"'
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}"'
    return f"<text {place}{larger}>{escape(text)}</text>"


def _rule(x1: float, y1: float, x2: float, y2: float, colour: str, dashes: str = "") -> str:
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{colour}"{dashed}/>'
