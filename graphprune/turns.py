"""How often a Loop runs whose condition numbers alone decide, as counters and lengths do.

TensorFlow's while loops ask at every turn whether their counters are below the sequence's length:
what the condition hangs on is a handful of scalar operators, which are computed turn by turn.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from graphprune.model import NOT_COMPUTED, Array, computable

MOST_TURNS = 4096  # computed one after the other; a Loop that goes on stays of unknown length


@dataclass(frozen=True)
class Turning:
    """A Loop's body: its nodes, its inputs and outputs by name, and its state's first values."""

    nodes: Sequence[onnx.NodeProto]
    formal: Sequence[str]  # the number of the turn, the condition, the state
    given: Sequence[str]  # the condition, the state
    first: Sequence[str]  # what the state starts with

    def needed(
        self, value: MutableMapping[str, Array]
    ) -> tuple[list[onnx.NodeProto], list[int]] | None:
        """The nodes that decide the condition, and places of the state that they read; ``None``
        where it hangs on what is not known."""
        maker = {name: i for i, node in enumerate(self.nodes) for name in node.output if name}
        place = {name: i for i, name in enumerate(self.formal[2:])}
        nodes: set[int] = set()
        states: set[int] = set()
        waiting, seen = [self.given[0]], set()
        while waiting:
            name = waiting.pop()
            if name in seen or name in value or name in self.formal[:2]:
                continue
            seen.add(name)
            if name in place:
                if self.first[place[name]] not in value:
                    return None
                states.add(place[name])
                waiting.append(self.given[1 + place[name]])
                continue
            if name not in maker or not computable(self.nodes[maker[name]]):
                return None
            nodes.add(maker[name])
            waiting += [n for n in self.nodes[maker[name]].input if n]
        return [self.nodes[i] for i in sorted(nodes)], sorted(states)


def turns(
    body: Turning,
    value: MutableMapping[str, Array],
    most: int | None,
    opsets: Sequence[onnx.OperatorSetIdProto],
) -> int | None:
    """How often the body runs, once it is entered at all; at most ``most`` times."""
    from onnx.reference import ReferenceEvaluator

    found = body.needed(value)
    if found is None:
        return None
    nodes, states = found
    known = {n: value[n] for node in nodes for n in node.input if n in value}
    state = {body.formal[2 + i]: value[body.first[i]] for i in states}
    results = list(dict.fromkeys([body.given[0], *(body.given[1 + i] for i in states)]))
    made = {name for node in nodes for name in node.output}
    computed = [name for name in results if name in made]
    untyped = onnx.TypeProto()
    graph = helper.make_graph(
        nodes,
        "turn",
        [helper.make_value_info(n, untyped) for n in (*known, *state, *body.formal[:2])],
        [helper.make_value_info(n, untyped) for n in computed],
    )
    goes_on = np.array(True)
    try:
        runner = ReferenceEvaluator(helper.make_model(graph, opset_imports=list(opsets)))
        for turn in range(MOST_TURNS):
            if not goes_on.all() or turn == most:
                return turn
            feeds: dict[str, Array] = {
                body.formal[0]: np.array(turn),
                body.formal[1]: goes_on,
                **known,
                **state,
            }
            outcome = dict(zip(computed, runner.run(None, feeds), strict=True))
            read = ChainMap(outcome, feeds, value)
            goes_on = np.asarray(read[body.given[0]])
            state = {body.formal[2 + i]: np.asarray(read[body.given[1 + i]]) for i in states}
    except NOT_COMPUTED:
        return None
    return None
