"""Make every body of control flow run, so that law 3 holds in it too and not only where random
inputs happen to lead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from graphprune.control import ENTER, attribute, is_open, parts, regions
from graphprune.coupling import Coupling, Mask
from graphprune.model import Model, set_initializer
from graphprune.shapes import Shapes

UNSQUEEZE_BY_INPUT = 13  # opset from which Unsqueeze reads its axes as an input
ZERO, TRUE, FIRST = "graphprune/turn", "graphprune/true", "graphprune/first_axis"

Path = tuple[str, ...]  # the tokens of bodies inside one another, the outermost first


@dataclass(frozen=True)
class Branches:
    """Bodies to be forced to run: ``paths`` to those that a cut rewrites, and of each branch of an
    If the other one's token."""

    paths: tuple[Path, ...]
    rival: dict[str, str]

    def together(self) -> Iterator[tuple[frozenset[str], tuple[Path, ...]]]:
        """Few sets of tokens that can be forced at once, with the paths that each set covers."""
        todo = sorted(self.paths, key=lambda path: (-len(path), path))
        while todo:
            taken: set[str] = set()
            rest, covered = [], []
            for path in todo:
                if any(self.rival.get(token) in taken for token in path):
                    rest.append(path)
                else:
                    taken.update(path)
                    covered.append(path)
            yield frozenset(taken), tuple(covered)
            todo = rest


def rewritten_branches(model: Model, shapes: Shapes, coupling: Coupling, alive: Mask) -> Branches:
    """The bodies in which a node reads a weight that loses slots, and that may not run by
    themselves: branches, and loops whose first turn nothing promises."""
    lost = {axis.tensor for axis in coupling.parameters if not alive[axis.slots].all()}
    return _reading(model, shapes, lost)


def smaller_branches(before: Model, after: Model, shapes: Shapes) -> Branches:
    """Likewise, of ``after``, those in which a node reads a weight that is smaller than it was."""
    known = before.opened.initializers
    lost = {
        name
        for name, tensor in after.initializers.items()
        if name in known and known[name].dims != tensor.dims
    }
    return _reading(after, shapes, lost)


def _reading(model: Model, shapes: Shapes, lost: set[str]) -> Branches:
    uncertain: set[str] = set()
    rival: dict[str, str] = {}
    for node in model.nodes:
        if not is_open(node):
            continue
        kind = attribute(node, "of", b"").decode()
        if kind == "If" or (kind == "Loop" and not _runs(node, shapes)):
            uncertain.add(node.output[0])
        if node.op_type == "If":
            (then, _), (other, _) = parts(node).bodies
            rival |= {then: other, other: then}
    paths = {
        tuple(token for token in inside if token in uncertain)
        for node, inside in zip(model.nodes, regions(model.nodes), strict=True)
        if inside and lost.intersection(node.input)
    }
    return Branches(tuple(path for path in paths if path), rival)


def _runs(enter: onnx.NodeProto, shapes: Shapes) -> bool:
    """Whether a Loop is known to take a first turn."""
    most, go = enter.input[:2]
    known = not most or (most in shapes.value and bool((shapes.value[most] > 0).all()))
    return known and (not go or (go in shapes.value and bool(shapes.value[go].all())))


def forced(model: Model, taken: frozenset[str]) -> Model:
    """The model without the choice: of each If with a body in ``taken`` that one always runs, and
    each Loop there takes one turn."""
    if not taken:
        return model
    model = model.opened
    nodes: list[onnx.NodeProto] = []
    place: dict[str, int] = {}  # token → where its Enter stands in ``nodes``
    for node in model.nodes:
        if is_open(node) and node.op_type == ENTER:
            place[node.output[0]] = len(nodes)
        chosen = next((b for b in parts(node).bodies if b[0] in taken), None)
        if chosen is None:
            nodes.append(node)
        else:
            _force(model, node, chosen[1], [place[t] for t, _ in parts(node).bodies], nodes)
    constants = {ZERO: np.array(0), TRUE: np.array(True), FIRST: np.array([0])}
    tensors = [set_initializer(name, value) for name, value in constants.items()]
    return model.with_graph(nodes, [*model.initializers.values(), *tensors])


def _force(
    model: Model,
    node: onnx.NodeProto,
    chosen: list[str],
    places: list[int],
    nodes: list[onnx.NodeProto],
) -> None:
    """Append what takes the node's place; what ``nodes`` has of its bodies are bodies no more."""
    formal = nodes[places[0]].output[1:]
    body = [n for i, n in enumerate(nodes[places[0] :], places[0]) if i not in places]
    del nodes[places[0] :]
    for inner in body:
        inner.name = ""  # unique in its own graph alone
    if node.op_type == "If":
        nodes += body + _copies(chosen, node.output)
        return
    initial = parts(node).own[2:]
    carried = len(initial)
    nodes += _copies([ZERO, TRUE, *initial], formal) + body
    nodes += _copies(chosen[1 : 1 + carried], node.output[:carried])
    for source, name in zip(chosen[1 + carried :], node.output[carried:], strict=False):
        if model.opsets.get("", 1) >= UNSQUEEZE_BY_INPUT:
            nodes.append(helper.make_node("Unsqueeze", [source, FIRST], [name]))
        else:
            nodes.append(helper.make_node("Unsqueeze", [source], [name], axes=[0]))


def _copies(sources: Sequence[str], names: Sequence[str]) -> list[onnx.NodeProto]:
    pairs = zip(sources, names, strict=False)
    return [helper.make_node("Identity", [a], [b]) for a, b in pairs if a and b]
