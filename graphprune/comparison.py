"""Two models side by side: structure, costs, outputs, latency."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from graphprune.analysis import Scope
from graphprune.api import analyse, registry
from graphprune.calibrate.files import from_npz
from graphprune.calibrate.samples import Chunked
from graphprune.calibrate.trial import tried
from graphprune.cost import KINDS, Costs, whole
from graphprune.errors import UsageError
from graphprune.interface import fitted_sizes
from graphprune.likeness import likeness
from graphprune.prepared import Prepared
from graphprune.runtime import Feeds, Timing, random_inputs, session, time_interleaved
from graphprune.scoring import read_inputs
from graphprune.shapes import Shape, infer
from graphprune.storage import load, source_bytes
from graphprune.version import __version__

ROWS = 64  # of given inputs, run together


def _clash(a: onnx.ValueInfoProto, b: onnx.ValueInfoProto) -> bool:
    """Whether two inputs of one name cannot get the same values, as far as they are declared."""
    first, second = a.type.tensor_type, b.type.tensor_type
    ranks = first.HasField("shape") and second.HasField("shape")
    return first.elem_type != second.elem_type or (
        ranks and len(first.shape.dim) != len(second.shape.dim)
    )


def compare(
    a: str | Path,
    b: str | Path,
    *,
    inputs: Path | None = None,
    input_shapes: Mapping[str, Shape] | None = None,
    seed: int = 0,
) -> tuple[list[tuple[str, Any, Any]], dict[str, Any]]:
    """Structure, costs and outputs of two models on the same inputs: rows and a document.

    Where ``b`` was cut from ``a`` with slots of the interface, it gets and gives what is left.
    """
    offered = registry()
    loaded = [(path, load(path)) for path in (a, b)]
    sizes = [input_shapes or {}, fitted_sizes(loaded[1][1], input_shapes or {})]
    scopes = [Scope(input_shapes=given, lossless=False) for given in sizes]
    sides = [
        analyse(model, source_bytes(path, model), scope, offered)
        for (path, model), scope in zip(loaded, scopes, strict=True)
    ]
    first, second = sides
    signatures = [
        [(v.name, v.type.SerializeToString()) for v in (*s.original.inputs, *s.original.outputs)]
        for s in sides
    ]
    inner, outer = first.original.inputs, second.original.inputs
    same_names = [name for name, _ in signatures[0]] == [name for name, _ in signatures[1]]
    if not same_names or any(map(_clash, inner, outer)):
        raise UsageError(
            "the models have other inputs or outputs, so outputs do not compare",
            hint="Names, types and ranks must be the same: give a model and one made from it.",
        )
    if inputs is None:
        feeds: Sequence[Feeds] = [random_inputs(first.analysis.model, first.analysis.shapes, seed)]
        compared_on = f"random inputs (--seed {seed})"
    else:
        read_inputs(inputs, first.original)  # says what is wrong with the file
        samples = from_npz(inputs, first.original)
        feeds = Chunked(samples, first.original, ROWS)
        compared_on = samples.source
    runners = session(first.original), session(second.original)
    if inputs is not None:
        tried(runners[0], first.original, first.analysis.shapes, feeds, f"--inputs {inputs}")
    error = likeness(first.original, second.original, runners, feeds).difference
    costs = [s.before for s in sides]
    kinds = [Counter(node.op_type for node in side.original.nodes) for side in sides]
    rows: list[tuple[str, Any, Any]] = [
        ("MACs", f"{costs[0].macs:,.0f}", f"{costs[1].macs:,.0f}"),
        ("parameters", f"{costs[0].params:,.0f}", f"{costs[1].params:,.0f}"),
        ("bytes", f"{first.original_bytes:,}", f"{second.original_bytes:,}"),
        ("activations at once", f"{costs[0].memory:,.0f}", f"{costs[1].memory:,.0f}"),
        ("nodes", len(first.original.nodes), len(second.original.nodes)),
        ("same interface", "", "yes" if signatures[0] == signatures[1] else "no"),
        ("outputs compared on", "", compared_on),
        ("largest difference over the largest output", "", f"{error:.3g}"),
    ]
    rows += [
        (f"{kind} nodes", kinds[0][kind], kinds[1][kind])
        for kind in sorted(kinds[0] | kinds[1])
        if kinds[0][kind] != kinds[1][kind]
    ]
    shapes = [
        (name, list(tensor.dims), list(second.original.initializers[name].dims))
        for name, tensor in first.original.initializers.items()
        if name in second.original.initializers
    ]
    changed = [row for row in shapes if row[1] != row[2]]
    rows.append(("weights of other shape", "", len(changed)))
    document = {
        "schema": "graphprune.compare/1",
        "graphprune": __version__,
        "a": {**_counted(costs[0]), **_of_file(first), "operators": dict(kinds[0])},
        "b": {**_counted(costs[1]), **_of_file(second), "operators": dict(kinds[1])},
        "same_interface": signatures[0] == signatures[1],
        "relative_difference": error,
        "compared_on": compared_on,
        "weights": [{"name": n, "a": x, "b": y} for n, x, y in changed],
    }
    return rows, document


def _counted(costs: Costs) -> dict[str, float]:
    return {kind: whole(costs.of(kind)) for kind in KINDS}


def _of_file(side: Prepared) -> dict[str, int]:
    return {"bytes": side.original_bytes, "nodes": len(side.original.nodes)}


def bench(
    models: Sequence[str | Path],
    *,
    rounds: int = 51,
    threads: int = 1,
    provider: str = "cpu",
    input_shapes: Mapping[str, Shape] | None = None,
    seed: int = 0,
) -> Timing:
    """Interleaved latencies of several models, each on random inputs of its own signature."""
    loaded = [load(path) for path in models]
    feeds = [random_inputs(m, infer(m, input_shapes), seed) for m in loaded]
    runners = [session(m, threads, provider) for m in loaded]
    return time_interleaved(runners, feeds, rounds, budget_s=60.0)
