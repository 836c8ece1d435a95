"""What a program reads: JSON documents with stable keys; absent values are null."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphprune.analysis import Analysis, inexact, pinned_reasons
from graphprune.cleaned import Cleaned
from graphprune.cost import whole
from graphprune.coupling import Group
from graphprune.report.operators import held_back_of
from graphprune.runtime import Timing
from graphprune.version import __version__

if TYPE_CHECKING:
    from graphprune.prepared import Prepared
    from graphprune.result import Result

CHECKS = ("verify", "measure")  # stages that make no result, but check it


def result_document(result: Result, model: str | Path, output: str | Path | None) -> dict[str, Any]:
    before, after, verdict = result.before, result.after, result.verdict
    latency = None if verdict.latency_ratio is None else verdict.latency_ratio[0]
    return {
        "schema": "graphprune.result/1",
        "graphprune": __version__,
        "model": str(model),
        "output": None if output is None else str(output),
        "replaced": result.replaced,
        "before": asdict(before),
        "after": asdict(after),
        "ratio": {
            "macs": _ratio(after.macs, before.macs),
            "params": _ratio(after.params, before.params),
            "bytes": _ratio(after.bytes, before.bytes),
            "memory": _ratio(after.memory, before.memory),
            "latency": latency,
        },
        "verified": {
            "passed": verdict.passed,
            "relative_error": verdict.relative_error,
            "relative_error_with_rounding": verdict.rounding,
            "relative_error_with_all_statistics": verdict.shift,
        },
        "output_difference": verdict.output_difference,
        "compared_on": verdict.compared_on,
        "latency_quartiles": verdict.latency_ratio and list(verdict.latency_ratio[1:]),
        "operators": [asdict(operator) for operator in verdict.operators],
        "held_back": held_back_of(result),
        "pinned": [asdict(pin) for pin in result.pinned],
        "prunable": result.prunable,
        "interface": [asdict(ends) for ends in result.interface],
        "inexact": [asdict(group) for group in result.inexact],
        "lossless": None if result.cleaned is None else result.cleaned.document(),
        "calibration": result.plan.options.get("calibration"),
        "repairs": [asdict(repaired) for repaired in result.repairs],
        "refined": None if result.refined is None else asdict(result.refined),
        "notes": list(result.notes),
        "options": dict(result.plan.options),
        "seconds": sum(s for stage, s in result.seconds.items() if stage not in CHECKS),
        "seconds_by_stage": dict(result.seconds),
    }


def inspection_document(
    prepared: Prepared, model: str | Path, cleaned: Cleaned | None = None
) -> dict[str, Any]:
    """Of what stays where something was ``cleaned`` without loss."""
    analysis, costs = prepared.analysis, prepared.left
    shifting = {group.index for group in inexact(analysis, ~analysis.nothing_removed)}
    return {
        "schema": "graphprune.inspect/1",
        "graphprune": __version__,
        "model": str(model),
        "nodes": len(analysis.model.nodes),
        "macs": whole(costs.macs),
        "params": whole(costs.params),
        "bytes": prepared.original_bytes,
        "memory": whole(costs.memory),
        "prunable_macs_share": analysis.cost.in_reach("macs"),
        "units": analysis.coupling.n_units,
        "groups": [_group(group, analysis, shifting) for group in analysis.coupling.groups],
        "pinned": [asdict(pin) for pin in pinned_reasons(analysis)],
        "unknown_operators": analysis.relations.unknown,
        "lossless": None if cleaned is None else cleaned.document(),
        "notes": [*analysis.shapes.notes, *(cleaned.notes if cleaned else ())],
    }


def timing_document(names: list[str], timing: Timing) -> dict[str, Any]:
    rows = []
    for i, name in enumerate(names):
        middle, low, high = timing.ratio(i)
        rows.append(
            {
                "model": name,
                "latency_ms": float(timing.median[i]),
                "ratio": middle,
                "ratio_quartiles": [low, high],
            }
        )
    return {
        "schema": "graphprune.bench/1",
        "graphprune": __version__,
        "rounds": len(timing.rounds),
        "models": rows,
    }


def _group(group: Group, analysis: Analysis, shifting: set[int]) -> dict[str, Any]:
    return {
        "index": group.index,
        "name": group.name,
        "units": len(group),
        "inexact": group.index in shifting,
        "macs": whole(analysis.cost.macs_touched(group.units)),
        "axes": [{"tensor": tensor, "axis": axis} for tensor, axis in group.signature],
    }


def to_json(document: dict[str, Any]) -> str:
    """Strict JSON: numbers that are not finite become null."""
    return json.dumps(_finite(document), indent=1, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _ratio(after: float, before: float) -> float | None:
    return after / before if before else None
