"""What a result holds beyond the costs that were counted when it was planned."""

from __future__ import annotations

from graphprune.analysis import Scope
from graphprune.cost import count_params
from graphprune.interface import fitted_sizes
from graphprune.model import Model
from graphprune.prepared import Prepared, analyse


def recounted(result: Model, prepared: Prepared) -> dict[str, float]:
    """Kinds of cost → what ``result`` has. Memory only where it is not what was counted: a repair
    may give a last MatMul a bias, and ONNX Runtime lets nothing be added into a graph's output in
    place, so that both are in use at once."""
    counts: dict[str, float] = {
        "bytes": result.stored_bytes,
        "params": count_params(result),
    }
    if _makers(prepared.original.closed) == _makers(result.closed):
        return counts
    given = fitted_sizes(result, prepared.context.scope.input_shapes or {})
    scope = Scope(input_shapes=given, lossless=False)
    analysis = analyse(result, result.stored_bytes, scope, prepared.registry).analysis
    return {**counts, "memory": analysis.cost.of(analysis.nothing_removed).memory}


def _makers(model: Model) -> list[str]:
    """The operators that make the outputs."""
    made = [model.producer[value.name] for value in model.outputs if value.name in model.producer]
    return [model.nodes[index].op_type for index in made]
