"""What a person reads: the result's table, an inspection, a benchmark."""

from __future__ import annotations

import io
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from graphprune.analysis import PinnedReason, inexact, pinned_reasons
from graphprune.report.operators import held_back_of, operators_table
from graphprune.runtime import Timing
from graphprune.validate import Verdict
from graphprune.wording import counted

if TYPE_CHECKING:
    from graphprune.prepared import Prepared
    from graphprune.result import Result

LARGEST_PINS = 10
LARGEST_GROUPS = 40
LARGEST_INTERFACE = 4
VISIBLE = 0.02  # of a ratio: less is not worth a footnote
TOUCHED = "MACs touched: of the operators whose rows or columns stay, half for each"


def as_text(result: Result, width: int = 100) -> str:
    """The result's table as plain text."""
    return to_text(result_table(result), width)


def to_text(content: RenderableType, width: int = 100) -> str:
    buffer = io.StringIO()
    Console(file=buffer, width=width, color_system=None).print(content)
    return buffer.getvalue().rstrip("\n")


def result_table(result: Result, per_operator: bool = False) -> RenderableType:
    before, after, verdict = result.before, result.after, result.verdict
    table = Table(title="graphprune", title_style="bold", header_style="bold")
    for name in ("", "original", "pruned", "remaining"):
        table.add_column(name, justify="left" if not name else "right")
    table.add_row("MACs", _si(before.macs), _si(after.macs), _share(after.macs, before.macs))
    table.add_row(
        "parameters", _si(before.params), _si(after.params), _share(after.params, before.params)
    )
    table.add_row(
        "file", _bytes(before.bytes), _bytes(after.bytes), _share(after.bytes, before.bytes)
    )
    table.add_row(
        "activations at once",
        _bytes(before.memory),
        _bytes(after.memory),
        _share(after.memory, before.memory),
    )
    if verdict.latency is not None and verdict.latency_ratio is not None:
        speed = f"{1 / verdict.latency_ratio[0]:.2f}x as fast"
        table.add_row("latency (median)", *(f"{ms:.2f} ms" for ms in verdict.latency), speed)
    if verdict.accuracy is not None:
        drop = (verdict.accuracy[1] - verdict.accuracy[0]) * 100
        table.add_row(
            "top-1", *(f"{a * 100:.2f} %" for a in verdict.accuracy), f"{drop:+.2f} points"
        )
    if verdict.output_difference is not None:
        table.add_row("largest output difference", "", "", f"{verdict.output_difference:.3g}")
    if verdict.relative_error is not None:
        table.add_row(
            "cut verified in ONNX Runtime",
            "",
            "yes",
            f"error {verdict.relative_error:.1e}{verdict.remark}",
        )
    seconds = ", ".join(f"{name} {value:.2f}" for name, value in result.seconds.items())
    lines: list[RenderableType] = [table, *_footnotes(verdict)]
    if per_operator and verdict.operators:
        lines.append(operators_table(verdict.operators))
    held = held_back_of(result)
    if held is not None:
        lines.append(Text(held))
    if result.pinned:
        lines.append(pins_table(result.pinned))
    lines += [Text(line) for line in (*_repair_lines(result), *_beyond_zeroing(result))]
    lines += [Text(f"note: {note}") for note in result.notes]
    lines.append(Text(f"seconds: {seconds}", style="dim"))
    return Group(*lines)


def _footnotes(verdict: Verdict) -> list[RenderableType]:
    """What numbers of the table mean that do not follow from those beside them."""
    texts = []
    if verdict.compared_on is not None:
        texts.append(f"output difference: over the largest output, on {verdict.compared_on}")
    if verdict.latency is not None and verdict.latency_ratio is not None:
        quotient, shown = verdict.latency[0] / verdict.latency[1], 1 / verdict.latency_ratio[0]
        if abs(quotient / shown - 1) >= VISIBLE:
            texts.append(
                f"latency: {shown:.2f}x is the median of ratios, run by run; the ratio of the "
                f"medians is {quotient:.2f}x"
            )
    return [Text(text, style="dim") for text in texts]


def _repair_lines(result: Result) -> list[str]:
    """What decided and what was repaired, in a line each."""
    lines = []
    if "outside" in result.plan.options:
        lines.append(f"decided by: {result.plan.options['criterion']}")
    if result.calibration is not None:
        lines.append(f"calibrated on: {result.calibration}")
    if result.repairs:
        pairs = [(r.before, r.after) for r in result.repairs if r.before is not None]
        errors = ""
        if pairs:
            before, after = (statistics.median(side) for side in zip(*pairs, strict=True))
            errors = f"; median error of an operator's output {before:.2g} -> {after:.2g}"
        how = result.plan.options["repair"]
        lines.append(f"repaired ({how}): {counted(len(result.repairs), 'operator')}{errors}")
    if result.refined is not None:
        lines.append(str(result.refined))
    return lines


def _beyond_zeroing(result: Result) -> list[str]:
    """What was allowed and has happened: a line each."""
    lines = []
    if result.interface:
        shown = [str(ends) for ends in result.interface[:LARGEST_INTERFACE]]
        more = len(result.interface) - len(shown)
        shown += [f"and {more} more (all with --json)"] if more > 0 else []
        lines.append(f"interface changed: {'; '.join(shown)}")
    if result.inexact:
        units = sum(entry.units for entry in result.inexact)
        kinds = dict.fromkeys(f"{entry.reason} ({entry.where})" for entry in result.inexact)
        some = [
            *list(kinds)[:LARGEST_INTERFACE],
            *(["…"] if len(kinds) > LARGEST_INTERFACE else []),
        ]
        found = f"{counted(units, 'unit')} of {counted(len(result.inexact), 'group')}"
        lines.append(f"inexact: {found}: {'; '.join(some)}")
    return lines


def pins_table(pins: Sequence[PinnedReason]) -> Table:
    title = "what stays, and why"
    if len(pins) > LARGEST_PINS:
        title += f" (the {LARGEST_PINS} largest of {len(pins)})"
    table = Table(title=title, title_style="bold", header_style="bold", caption=TOUCHED)
    for name in ("reason", "where", "MACs touched"):
        right = name == "MACs touched"
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for pin in pins[:LARGEST_PINS]:
        table.add_row(pin.reason, pin.where, f"{pin.macs * 100:.1f} %")
    return table


def inspection(prepared: Prepared) -> RenderableType:
    """Costs, groups and pins of a model, and what more there is to say of it."""
    analysis, costs, notes = prepared.analysis, prepared.left, prepared.cleaned.notes
    coupling = analysis.coupling
    head = Text(
        f"{counted(len(analysis.model.nodes), 'node')}, {_si(costs.macs)} MACs, "
        f"{_si(costs.params)} parameters, {_bytes(costs.memory)} of activations at once; "
        f"{counted(coupling.n_units, 'unit')} in {counted(len(coupling.groups), 'group')} touch "
        f"{analysis.cost.in_reach('macs') * 100:.1f} % of the MACs"
    )
    table = Table(title="groups", title_style="bold", header_style="bold")
    for name in ("#", "first axis", "units", "weights", "MACs touched"):
        table.add_column(name, justify="left" if name == "first axis" else "right", overflow="fold")
    shifting = {group.index for group in inexact(analysis, ~analysis.nothing_removed)}
    for group in coupling.groups[:LARGEST_GROUPS]:
        touched = analysis.cost.macs_touched(group.units) / max(costs.macs, 1)
        name = f"{group.name} (inexact)" if group.index in shifting else group.name
        cells = (str(group.index), name, str(len(group)), str(len(group.signature)))
        table.add_row(*cells, f"{touched:.1%}")
    lines: list[RenderableType] = [head, table]
    if len(coupling.groups) > LARGEST_GROUPS:
        lines.append(Text(f"… and {len(coupling.groups) - LARGEST_GROUPS} more (all with --json)"))
    pins = pinned_reasons(analysis)
    if pins:
        lines.append(pins_table(pins))
    lines += [Text(f"note: {note}") for note in (*analysis.shapes.notes, *notes)]
    return Group(*lines)


def timing_table(names: Sequence[str], timing: Timing) -> Table:
    """Interleaved medians, and each model's latency over the first one's."""
    table = Table(
        title=f"latency, {counted(len(timing.rounds), 'interleaved round')}", header_style="bold"
    )
    for name in ("model", "median", "ratio to the first", "quartiles"):
        table.add_column(name, justify="left" if name == "model" else "right", overflow="fold")
    for i, name in enumerate(names):
        middle, low, high = timing.ratio(i)
        table.add_row(
            name, f"{timing.median[i]:.3f} ms", f"{middle:.3f}", f"{low:.3f} to {high:.3f}"
        )
    return table


def comparison_table(rows: Sequence[tuple[str, Any, Any]]) -> Table:
    table = Table(header_style="bold")
    for name in ("", "A", "B"):
        table.add_column(name, justify="left" if not name else "right", overflow="fold")
    for name, a, b in rows:
        table.add_row(name, str(a), str(b))
    return table


def _si(value: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:.0f}"


def _bytes(value: float) -> str:
    return f"{_si(value)}B" if value >= 1e3 else f"{value:.0f} B"


def _share(after: float, before: float) -> str:
    return f"{after / before * 100:.1f} %" if before else "-"
