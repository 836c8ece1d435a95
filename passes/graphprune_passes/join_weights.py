"""Weights that an exporter puts together at run time become stored ones, whole."""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from graphprune.coupling import FLOAT_TYPES
from graphprune.model import Model, set_initializer
from graphprune.outside.beside import MOVES, beside
from graphprune.pipeline import Arrays, Change, Context, PassResult


@dataclass(frozen=True)
class JoinWeights:
    """1. A constant that is concatenated from pieces of float initialisers (a recurrent operator's
       gates in another order, say) is computed once and stored; the initialisers go.
    2. One whose initialisers are read anywhere else stays as it is: it would be stored twice.
    """

    name: str = "join_weights"

    def run(self, model: Model, context: Context) -> PassResult:
        moves = _moves(model)
        ends = _ends(model, moves)
        sources: dict[str, set[str]] = {}  # tensor of a chain → the initialisers it is made of
        joined: set[str] = set()
        for node in moves.values():
            made = set().union(*(sources.get(n, {n} & ends.keys()) for n in node.input if n))
            for output in filter(None, node.output):
                sources[output] = made
                if node.op_type == "Concat" or joined.intersection(node.input):
                    joined.add(output)
        whole = [
            name
            for name in sources
            if name in joined and ends[name] == {name} and name not in model.output_names
            if sources[name] and all(ends[source] == {name} for source in sources[name])
        ]
        if not whole:
            return PassResult(model)
        gone = set(whole)
        nodes = [node for node in model.nodes if not gone.intersection(node.output)]
        stored = [set_initializer(name, model.array(name)) for name in whole]
        changes = [Change(self.name, name, "weight", "computed", "stored", "") for name in whole]
        result = model.with_graph(nodes, [*model.initializers.values(), *stored])

        def carry(arrays: Arrays) -> Arrays:
            made = {name: beside(model, name, arrays) for name in whole}
            return {**arrays, **{name: array for name, array in made.items() if array is not None}}

        return PassResult(result, tuple(changes), carry=carry)


def _moves(model: Model) -> dict[int, onnx.NodeProto]:
    """Nodes that only move constants, in order."""
    return {
        i: node
        for i, node in enumerate(model.nodes)
        if node.op_type in MOVES
        and not node.domain
        and model.constant_names.issuperset(filter(None, node.input))
    }


def _ends(model: Model, moves: dict[int, onnx.NodeProto]) -> dict[str, set[str]]:
    """Float initialisers, and what moves make of any constant → the tensors of it that something
    else reads in the end."""
    ends: dict[str, set[str]] = {}
    floats = [n for n, t in model.initializers.items() if t.data_type in FLOAT_TYPES]
    made = [name for node in moves.values() for name in node.output if name]
    for name in [*made[::-1], *floats]:
        ends[name] = {name} if name in model.output_names else set()
        for i, _ in model.consumers.get(name, ()):
            after = [ends[output] for output in moves[i].output if output] if i in moves else []
            ends[name] |= set().union(*after) if after else {name}
    return ends
