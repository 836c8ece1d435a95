"""The accuracy table as Markdown, and its plots."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from .cases import CASES, GOALS, METHODS, PEERS, TWINS, TWINS_AGREE, Case, Goal, Method
from .plots import Series, line_chart
from .results import Result

HEAD = (
    "model",
    "MACs asked",
    "method",
    "MACs kept",
    "top-1",
    "dense",
    "floor",
    "goal",
    "verdict",
    "seconds",
)
FAILED = "What failed, and what was done instead"
TOOLS = (*METHODS, *PEERS)


def write(path: Path, found: Sequence[Result], quick: bool) -> None:
    """The Markdown file at `path`, and one SVG per model in `plots` beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = path.parent / "plots"
    folder.mkdir(exist_ok=True)
    plots = []
    for case in CASES:
        series, dense = lines(case, found), top(lookup(found, case.name, "dense", 1.0))
        if dense is None or not series:
            continue
        target = folder / f"accuracy_{case.name}.svg"
        target.write_text(line_chart(case.title, series, dense))
        plots.append(f"![{case.title}](plots/{target.name})")
    path.write_text(markdown(found, plots, quick))


def markdown(found: Sequence[Result], plots: Sequence[str], quick: bool) -> str:
    sentence = (
        "Top-1 in percent, no fine-tuning anywhere. Every file, whoever made it, was run in plain "
        "ONNX Runtime; MACs are counted from the tensors of that run. Real data: 512 calibration "
        "pictures (200 for EfficientNet-Lite0, 200 sentences for MiniLM-L6), none of them among "
        "the test data. Floor and goal are those of the project's plan; a number "
        "below zero there is points from dense. Seconds: the whole command."
    )
    data = "**A quick look: at most 1,000 test pictures.**\n\n" if quick else ""
    rows = [row for case in CASES for row in case_rows(case, found)]
    right = "|---|---:|---|" + "---:|" * 5 + "---|---:|"
    table = [f"| {' | '.join(HEAD)} |", right, *(f"| {' | '.join(row)} |" for row in rows)]
    lines_ = ["# Accuracy without training", "", data + sentence, "", *table, ""]
    lines_ += [*twins(found), *section("Plots", plots), *section(FAILED, list(notes(found)))]
    versions = sorted({r.version for r in found if r.method in {m.name for m in METHODS}})
    measured = f"Measured with graphprune {', '.join(versions)}. " if versions else ""
    return "\n".join([*lines_, f"{measured}Made by `tools/benchmark_accuracy.py`.", ""])


def section(title: str, items: Sequence[str]) -> list[str]:
    return [f"## {title}", "", *items, ""] if items else []


def case_rows(case: Case, found: Sequence[Result]) -> Iterator[list[str]]:
    dense = top(lookup(found, case.name, "dense", 1.0))
    for ratio in case.ratios:
        for tool in TOOLS:
            result = lookup(found, case.name, tool.name, ratio)
            goal = goal_of(case, ratio, tool.name)
            if result is None and goal is None:
                continue  # not asked for in this run
            title = f"**{tool.title}**" if isinstance(tool, Method) else tool.title
            kept = result.kept if result else None
            seconds = result.seconds if result else None
            yield [
                case.title,
                f"{ratio:g}",
                title,
                "–" if kept is None else f"{kept:.3f}",
                number(top(result)),
                number(dense),
                "–" if goal is None else f"{goal.floor:g}",
                "–" if goal is None else f"{goal.goal:g}",
                verdict(goal, result, dense),
                "–" if seconds is None else f"{seconds:.0f}",
            ]


def verdict(goal: Goal | None, result: Result | None, dense: float | None) -> str:
    """Whether the figure reaches what was asked, within the MACs that were asked."""
    reached = top(result)
    if result is None:
        return "not measured"
    if reached is None or dense is None:
        return "failed"
    if goal is None:
        return ""
    if result.kept is None or result.kept > result.ratio + 5e-4:
        return "missed: too many MACs"
    floor, wanted = (v + dense if v < 0 else v for v in (goal.floor, goal.goal))
    shown = round(reached, 2)
    return "goal met" if shown >= wanted else "floor met" if shown >= floor else "missed"


def twins(found: Sequence[Result]) -> list[str]:
    """The difference that BatchNormalization kept or folded makes with real data."""
    rows = []
    for kept, folded in TWINS:
        case = next(c for c in CASES if c.name == kept)
        for ratio in case.ratios:
            pair = [top(lookup(found, name, "obspa-real", ratio)) for name in (kept, folded)]
            first, second = pair
            if first is None or second is None:
                continue
            apart = abs(first - second)
            says = "met" if apart <= TWINS_AGREE else "missed"
            name = case.title.removesuffix(", BN kept")
            rows.append(
                f"| {name} | {ratio:g} | {first:.2f} | {second:.2f} | {apart:.2f} | {says} |"
            )
    head = ["| model | MACs asked | BN kept | BN folded | points apart | at most 1 |"]
    return (
        section("The two exports, real data", [*head, "|---|---:|---:|---:|---:|---|", *rows])
        if rows
        else []
    )


def lines(case: Case, found: Sequence[Result]) -> list[Series]:
    series = []
    for tool in TOOLS:
        points = [
            (r.kept, 100 * r.accuracy)
            for r in found
            if r.case == case.name and r.method == tool.name
            if r.kept is not None and r.accuracy is not None
        ]
        if points:
            series.append(Series(tool.title, tuple(points)))
    return series


def notes(found: Sequence[Result]) -> Iterator[str]:
    for result in found:
        if result.error:
            yield f"- {result.case}, {result.ratio:g}, {result.method}: {result.error}"
        elif result.way:
            yield f"- {result.case}, {result.ratio:g}, {result.method}: worked {result.way}"


def lookup(found: Sequence[Result], case: str, method: str, ratio: float) -> Result | None:
    same = (r for r in found if (r.case, r.method, r.ratio) == (case, method, ratio))
    return next(same, None)


def goal_of(case: Case, ratio: float, method: str) -> Goal | None:
    fitting = (g for g in GOALS if case.name in g.cases and (g.ratio, g.method) == (ratio, method))
    return next(fitting, None)


def top(result: Result | None) -> float | None:
    """Top-1 in percent."""
    return None if result is None or result.accuracy is None else 100 * result.accuracy


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
