"""Latency by type of operator, before and after, and what keeps it from falling as the MACs did."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from graphprune.operators import Operator
from graphprune.wording import counted, listed

if TYPE_CHECKING:
    from graphprune.result import Result

SHORT = 0.05  # latency this much above the MACs' share, both of the original's, is said
MOST, ENOUGH = 3, 0.7  # operators named: at most so many, until they are most of what is slow
ROWS = 12


def operators_table(operators: Sequence[Operator]) -> Table:
    """The types that take most time, the others in one row."""
    table = Table(title="time by operator", title_style="bold", header_style="bold")
    for name in ("operator", "original", "pruned", "remaining", "share of the original's time"):
        table.add_column(name, justify="left" if name == "operator" else "right")
    largest = sorted(operators, key=lambda o: -max(o.before_ms, o.after_ms))
    shown, rest = largest[:ROWS], largest[ROWS:]
    if rest:
        sums = [
            sum(values)
            for values in zip(*((o.before_ms, o.after_ms, o.share) for o in rest), strict=True)
        ]
        shown = [*shown, Operator(counted(len(rest), "other"), *sums)]
    for operator in shown:
        left = f"{operator.after_ms / operator.before_ms:.2f}" if operator.before_ms else "new"
        table.add_row(
            operator.name,
            f"{operator.before_ms:.3f} ms",
            f"{operator.after_ms:.3f} ms",
            left,
            f"{operator.share:.1%}",
        )
    return table


def held_back_of(result: Result) -> str | None:
    """What ``held_back`` says of a result."""
    verdict = result.verdict
    latency = None if verdict.latency_ratio is None else verdict.latency_ratio[0]
    return held_back(result.after.macs / max(result.before.macs, 1), latency, verdict.operators)


def held_back(macs: float, latency: float | None, operators: Sequence[Operator]) -> str | None:
    """One sentence where latency fell less than the MACs (both as shares of the original's): the
    operators that took longer than their share of the MACs' fall would have it, the worst first."""
    if latency is None or latency <= macs + SHORT:
        return None
    excess = {o: o.after_ms - macs * o.before_ms for o in operators}
    gap = sum(excess.values())
    above = sorted((o for o in operators if excess[o] > 0), key=lambda o: -excess[o])
    if gap <= 0 or not above:
        return None
    whole = sum(excess[o] for o in above)
    named: list[Operator] = []
    for operator in above[:MOST]:
        if sum(excess[o] for o in named) >= ENOUGH * whole:
            break
        named.append(operator)
    parts = [round(100 * excess[o] / whole) for o in named]
    words = [_words(operator, part) for operator, part in zip(named, parts, strict=True)]
    others = [f"all others {100 - sum(parts)} %"] if sum(parts) < 100 else []
    return (
        f"latency is {latency:.2f} of the original's, MACs are {macs:.2f} of theirs; what takes "
        f"longer than its share of the MACs, by type of operator: {listed([*words, *others])}"
    )


def _words(operator: Operator, part: int) -> str:
    before = f"{operator.before_ms:.3f} -> " if operator.before_ms else "new, "
    return f"{operator.name} {part} % ({before}{operator.after_ms:.3f} ms)"
