"""Residual blocks y = x + F(x), found by dominators: what can leave so that y is x again.

In the graph of operators and tensors, from the graph's inputs:

1. A sum is an Add or Sum with all those that it alone reads; its terms are t1 + t2 + …, of one
   shape. So parallel branches x + A(x) + M(x) are two blocks, in whatever order they are added.
2. Term x, or what x is but for Identity, Dropout and Cast, is the way past the block.
3. F is all that reaches an output of the model through another term t alone: t post-dominates it.
4. F has a single entry: what it reads from outside and depends on x is x, or dominated by x (a
   normalisation that parallel branches share). Masks, positions and an encoder's states come in
   from the side. Shortcuts that compute something are no way past a block, so such a block is none.
5. F has multiply-accumulates: x + 0.04 x³ is an activation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import networkx as nx
import numpy as np

from graphprune.control import is_open, regions
from graphprune.model import Model, captured, label
from graphprune.relations import Branch, Relations
from graphprune.shapes import Shapes

SUMS = ("Add", "Sum")
SAME = ("Identity", "Dropout", "Cast")  # what comes out is what went in
ATTENTION = {"Softmax", "Attention", "MultiHeadAttention", "GroupQueryAttention"} | {
    "DecoderMaskedMultiHeadAttention",
    "DecoderMaskedSelfAttention",
    "LongformerAttention",
    "PackedAttention",
    "PackedMultiHeadAttention",
    "PagedAttention",
    "QAttention",
    "SparseAttention",
}
RECURRENT = {"LSTM", "GRU", "RNN", "Scan", "Loop"}
CONVOLUTION = {"Conv", "ConvTranspose", "FusedConv", "ConvInteger", "QLinearConv", "NhwcConv"}
Vertex = str | int  # a tensor, or a node's index
ROOT, SINK = -1, -2


@dataclass(frozen=True)
class Block:
    """One residual block. ``branch`` is t, ``entry`` x, ``exit`` what the sum writes; ``nodes`` are
    F's, in order, and ``sums`` the nodes from t to the exit."""

    branch: str
    entry: str
    exit: str
    nodes: tuple[int, ...]
    sums: tuple[int, ...]
    kind: str

    @property
    def name(self) -> str:
        return self.branch

    def __str__(self) -> str:
        return f"{self.kind} {self.entry} -> {self.branch}: {len(self.nodes)} nodes"


def find_blocks(model: Model, shapes: Shapes, relations: Relations) -> tuple[Block, ...]:
    """All residual blocks outside of bodies of control flow, in the order of their branches."""
    finder = _Finder(model, shapes, relations)
    found = [block for sum_ in finder.sums() for block in finder.blocks_of(sum_)]
    return tuple(sorted(found, key=lambda block: block.nodes[-1]))


def state_blocks(blocks: Sequence[Block], relations: Relations) -> None:
    """State of each block that its branch is there or not: a slot of its own."""
    for block in blocks:
        slot = np.array([relations.total], dtype=np.int64)
        relations.total += 1
        relations.branches.append(
            Branch(block.branch, slot, frozenset(block.nodes), block.sums[-1])
        )


@dataclass(frozen=True)
class _Sum:
    """Nodes that add ``terms`` up to ``exit``."""

    exit: str
    nodes: tuple[int, ...]
    terms: tuple[str, ...]


class _Finder:
    """The dominator trees of one model, and what they say of its sums."""

    def __init__(self, model: Model, shapes: Shapes, relations: Relations) -> None:
        self.model, self.shapes = model, shapes
        self.inside = regions(model.nodes)
        self.working = {macs.node for macs in relations.macs}
        self.sizes = set(relations.shape_reads)
        graph = _graph(model)
        behind = nx.immediate_dominators(graph.reverse(copy=False), SINK)
        for i in self.sizes:  # a tensor's sizes say nothing of what is in it
            graph.remove_edges_from([*graph.in_edges(i)])
            graph.add_edge(ROOT, i)
        self.above = nx.immediate_dominators(graph, ROOT)
        self.below: dict[Vertex, list[Vertex]] = {}  # children in the tree of post-dominators
        for vertex, parent in behind.items():
            if parent is not None and vertex != parent:
                self.below.setdefault(parent, []).append(vertex)

    def sums(self) -> Iterator[_Sum]:
        """Every sum of tensors of one shape."""
        taken: set[int] = set()
        for index in range(len(self.model.nodes) - 1, -1, -1):
            if index in taken or not self._adds(index):
                continue
            exit_ = self.model.nodes[index].output[0]
            nodes, terms, waiting = [], [], [index]
            while waiting:
                at = waiting.pop()
                nodes.append(at)
                for name in self.model.nodes[at].input:
                    inner = self.model.producer.get(name, -1)
                    if self.model.read_once(name) and self._adds(inner) and self._apart(inner):
                        waiting.append(inner)
                    else:
                        terms.append(name)
            taken.update(nodes)
            yield _Sum(exit_, tuple(sorted(nodes)), tuple(terms))

    def _adds(self, index: int) -> bool:
        """Whether this node adds tensors of one shape, all of them data."""
        node = self.model.nodes[index] if index >= 0 else None
        if node is None or node.op_type not in SUMS or node.domain not in ("", "ai.onnx"):
            return False
        sizes = {self.shapes.shape.get(name) for name in (*node.input, *node.output)}
        data = not self.model.constant_names.intersection(node.input)
        return data and len(sizes) == 1 and None not in sizes and not self.inside[index]

    def _apart(self, index: int) -> bool:
        """Whether the terms of this sum share no work that serves them alone: else they are one
        branch."""
        shared = [v for v in self.below.get(index, ()) if v not in self.model.nodes[index].input]
        return not any(self.working.intersection(self._behind(v)) for v in shared)

    def blocks_of(self, found: _Sum) -> list[Block]:
        """The branches of a sum past which another of its terms leads."""
        blocks = []
        for term in found.terms:
            if not self.model.read_once(term) or term not in self.model.producer:
                continue
            nodes = self._behind(term)
            if not self.working.intersection(nodes) or self._has_bodies(nodes):
                continue
            for other in found.terms:
                entry = None if other == term else self._entry(other, term, nodes)
                if entry is not None:
                    kind = _kind(self.model, nodes)
                    made = Block(term, entry, found.exit, tuple(nodes), found.nodes, kind)
                    blocks.append(made)
                    break
        return blocks

    def _behind(self, vertex: Vertex) -> list[int]:
        """Nodes whose every way to an output leads through ``vertex``, itself among them."""
        nodes, waiting = [], [vertex]
        while waiting:
            vertex = waiting.pop()
            if isinstance(vertex, int):
                nodes.append(vertex)
            waiting += self.below.get(vertex, ())
        return sorted(nodes)

    def _has_bodies(self, nodes: Sequence[int]) -> bool:
        return any(self.inside[i] or is_open(self.model.nodes[i]) for i in nodes)

    def _entry(self, other: str, term: str, nodes: Sequence[int]) -> str | None:
        """What the block reads and the way past it starts at: ``other``, or what that was before
        operators that hand their input on."""
        entries = self._entries(nodes)
        while True:
            if self._single(other, entries):
                return other
            index = self.model.producer.get(other)
            if index is None or self.model.nodes[index].op_type not in SAME:
                return None
            before = self.model.nodes[index].input[0]
            if self.shapes.shape.get(before) != self.shapes.shape.get(term):
                return None
            other = before

    def _entries(self, nodes: Sequence[int]) -> set[str]:
        """Tensors of the data that these nodes read and do not write."""
        model = self.model
        written = {name for i in nodes for name in model.nodes[i].output}
        read = {name for i in nodes for name in (*model.nodes[i].input, *captured(model.nodes[i]))}
        return {n for n in read - written if n and n not in model.constant_names}

    def _single(self, x: str, entries: set[str]) -> bool:
        """Whether all entries that depend on ``x`` are dominated by it, and some are."""
        through = {name for name in entries if self._dominated(name, x)}
        return bool(through) and not any(self._depends(n, x) for n in entries - through)

    def _dominated(self, name: str, x: str) -> bool:
        first = self.model.producer.get(x, -1)
        vertex: Vertex | None = name
        while vertex is not None and vertex != ROOT:
            if vertex == x:
                return True
            place = self.model.producer.get(vertex, -1) if isinstance(vertex, str) else vertex
            if place < first:  # nodes are sorted: x comes later
                return False
            vertex = self.above.get(vertex)
        return False

    def _depends(self, name: str, x: str) -> bool:
        """Whether any way leads from ``x`` to ``name``."""
        model, first = self.model, self.model.producer.get(x, -1)
        waiting, seen = [name], {name}
        while waiting:
            at = waiting.pop()
            if at == x:
                return True
            index = model.producer.get(at, -1)
            if index <= first or index in self.sizes:
                continue
            reads = {*model.nodes[index].input, *captured(model.nodes[index])} - seen
            seen |= reads
            waiting += reads
        return False


def _graph(model: Model) -> nx.DiGraph[Vertex]:
    """Tensors and nodes; the graph's inputs come from one root, its outputs go to one sink. What
    follows from weights alone has no way from the root."""
    graph: nx.DiGraph[Vertex] = nx.DiGraph()
    graph.add_nodes_from([ROOT, SINK])
    for value in model.inputs:
        graph.add_edge(ROOT, value.name)
    for i, node in enumerate(model.nodes):
        for name in (*node.input, *sorted(captured(node))):
            if name and name not in model.initializers:
                graph.add_edge(name, i)
        for name in filter(None, node.output):
            graph.add_edge(i, name)
        if not any(node.input) and not set(node.output) <= model.constant_names:
            graph.add_edge(ROOT, i)
    for name in sorted(model.output_names):
        graph.add_edge(name, SINK)
    return graph


def _kind(model: Model, nodes: Sequence[int]) -> str:
    """What a block is, by the operators it contains."""
    types = {model.nodes[i].op_type for i in nodes}
    if types & ATTENTION:
        return "attention"
    if types & RECURRENT:
        return "recurrent"
    return "convolution" if types & CONVOLUTION else "mlp"


def names_in(block: Block, model: Model) -> set[str]:
    """What its operators are called, with the tensors that they write and the weights they read."""
    nodes = [model.nodes[i] for i in block.nodes]
    tensors = {name for node in nodes for name in (*node.input, *node.output) if name}
    written = {name for node in nodes for name in node.output}
    return {label(node) for node in nodes} | tensors & (written | model.constant_names)
