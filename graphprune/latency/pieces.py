"""A model in pieces that can be timed alone: an operator with MACs and all that follows it.

ONNX Runtime fuses a linear operator with what comes after it (activations, additions,
normalisation), so a piece is what it runs as a few kernels. Every other node belongs to the piece
of its latest producer; control flow is one piece with its bodies. What dequantises stands with
whatever takes it: there ONNX Runtime fuses it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from graphprune.analysis import Analysis
from graphprune.control import is_open, regions
from graphprune.model import Model
from graphprune.selectors import is_selector

# Operators that ONNX Runtime's blocked layout (NCHWc) passes through; Conv enters it.
BLOCKED = {"Add", "Sum", "Mul", "Concat", "Relu", "Sigmoid", "Tanh", "Clip", "LeakyRelu"} | {
    "HardSigmoid",
    "HardSwish",
    "BatchNormalization",
    "MaxPool",
    "AveragePool",
    "GlobalMaxPool",
    "GlobalAveragePool",
    "Resize",
    "Upsample",
}
IMAGE_RANK = 4
DEQUANTISER = "DequantizeLinear"


@dataclass(frozen=True)
class Piece:
    """Indices of a piece's nodes, in order; tensors it takes from other pieces and gives away. A
    node that dequantises may stand in several pieces."""

    nodes: tuple[int, ...]
    takes: tuple[str, ...]
    gives: tuple[str, ...]


def split(analysis: Analysis) -> tuple[Piece, ...]:
    """Every node in exactly one piece; constants belong to whoever reads them."""
    model = analysis.model
    heads = {macs.node for macs in analysis.relations.macs}
    inside = regions(model.nodes)
    owner: dict[int, int] = {}
    for i, node in enumerate(model.nodes):
        if node.output and set(node.output) <= model.constant_names:
            continue
        if inside[i] or is_open(node):
            owner[i] = _control_piece(owner, inside, model, i)
            continue
        sources = [owner[p] for p in _producers(model, i) if p in owner]
        owner[i] = i if i in heads or not sources else max(sources)
    members: dict[int, list[int]] = {}
    for i, piece in owner.items():
        for at in _readers_pieces(model, owner, i) or {piece}:
            members.setdefault(at, []).append(i)
    return tuple(_piece(model, sorted(nodes)) for _, nodes in sorted(members.items()))


def _readers_pieces(model: Model, owner: Mapping[int, int], i: int) -> set[int]:
    """The pieces of all that reads what node ``i`` dequantises; none for any other node."""
    node = model.nodes[i]
    if node.op_type != DEQUANTISER or node.output[0] in model.output_names:
        return set()
    return {owner[reader] for reader, _ in model.consumers.get(node.output[0], ())}


def _control_piece(
    owner: Mapping[int, int], inside: list[tuple[str, ...]], model: Model, i: int
) -> int:
    """Neighbouring nodes of opened bodies are one piece: they are run together or not at all."""
    before = i - 1
    together = before in owner and bool(inside[before] or is_open(model.nodes[before]))
    return owner[before] if together else i


def _producers(model: Model, i: int) -> list[int]:
    return [model.producer[name] for name in model.nodes[i].input if name in model.producer]


def _piece(model: Model, nodes: list[int]) -> Piece:
    own = {name for i in nodes for name in model.nodes[i].output if name}
    read = dict.fromkeys(name for i in nodes for name in model.nodes[i].input if name)
    takes = tuple(n for n in read if n not in own and n not in model.constant_names)
    inner = set(nodes)
    gives = tuple(
        name
        for i in nodes
        for name in model.nodes[i].output
        if name in model.output_names
        or any(reader not in inner for reader, _ in model.consumers.get(name, ()))
    )
    return Piece(tuple(nodes), takes, gives)


def blocked(analysis: Analysis) -> frozenset[str]:
    """Pictures that ONNX Runtime is likely to hold in its blocked layout: what Conv writes, and
    what operators that keep the layout make of it. A selector may be none in the end."""
    model, shape = analysis.model, analysis.shapes.shape
    found: set[str] = set()
    for node in model.nodes:
        data = [name for name in node.input if name and name not in model.constant_names]
        passes = node.op_type in BLOCKED or is_selector(node)
        keeps = passes and data and all(name in found for name in data)
        if node.op_type == "Conv" or keeps:
            found.update(n for n in node.output if len(shape.get(n) or ()) == IMAGE_RANK)
    return frozenset(found)
