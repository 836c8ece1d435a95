"""A piece as a model of its own, at given channel counts, between stand-ins for its neighbours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx
from onnx import TensorProto, helper

from graphprune.analysis import Analysis
from graphprune.coupling import Coupling, Mask
from graphprune.cut import cut
from graphprune.latency.pieces import BLOCKED, Piece
from graphprune.model import Array, Model, set_initializer
from graphprune.shapes import Shape
from graphprune.slots import Slots

NEAR = "graphprune_near"  # in the names of all that stands in for a neighbour
THIN, NARROW = 3, 16  # channels of the stand-ins: what feeds a picture, and what reads one


@dataclass(frozen=True)
class Micro:
    """A piece to be timed: the model, inputs that fit it, and how it is called in a report."""

    model: onnx.ModelProto
    feeds: Mapping[str, Array]
    name: str


def micro(analysis: Analysis, piece: Piece, blocked: frozenset[str], alive: Mask) -> Micro:
    """``piece`` with the slots of ``alive`` alone. Pictures in the blocked layout come from a thin
    convolution and go into one, so that ONNX Runtime reorders them only where it would anyway."""
    whole = _part(analysis, piece)
    coupling = _restricted(analysis, whole)
    small = cut(whole.model, analysis.shapes, coupling, alive)[0].closed
    sizes = {n: _size(analysis, alive, n) for n in (*piece.takes, *piece.gives)}
    graph = onnx.GraphProto(name="piece")
    graph.initializer.extend(small.initializers.values())
    feeds: dict[str, Array] = {}
    standing: dict[str, str] = {}
    kinds = analysis.shapes.dtype
    for name in piece.takes:
        source = name
        if name in blocked and kinds[name] == TensorProto.FLOAT:
            source = f"{NEAR}_{len(standing)}"
            standing[name] = f"{source}_picture"
            _conv(graph, source, standing[name], THIN, sizes[name][1])
            feeds[source] = np.ones((sizes[name][0], THIN, *sizes[name][2:]), np.float32)
        else:
            feeds[name] = _value(analysis, name, sizes[name])
        value = feeds[source]
        kind = TensorProto.FLOAT if source != name else kinds[name]
        graph.input.append(helper.make_tensor_value_info(source, kind, value.shape))
    for node in small.nodes:
        new = onnx.NodeProto()
        new.CopyFrom(node)
        new.input[:] = [standing.get(name, name) for name in node.input]
        graph.node.append(new)
    for name in piece.gives:
        if name in blocked and kinds[name] == TensorProto.FLOAT and _stays(analysis, piece, name):
            read = f"{NEAR}_{name}"
            _conv(graph, name, read, sizes[name][1], NARROW)
            graph.node.append(
                helper.make_node("GlobalAveragePool", [read], [f"{read}_mean"], f"{read}_mean")
            )
            graph.output.append(helper.make_tensor_value_info(f"{read}_mean", 1, None))
        else:
            graph.output.append(helper.make_tensor_value_info(name, kinds.get(name, 1), None))
    skeleton = analysis.model.skeleton
    model = onnx.ModelProto(ir_version=skeleton.ir_version, graph=graph)
    model.opset_import.extend(skeleton.opset_import)
    head = analysis.model.nodes[piece.nodes[0]]
    return Micro(model, feeds, head.name or head.output[0])


@dataclass(frozen=True)
class _Part:
    model: Model
    indices: dict[int, int]  # node of the whole model → node of the part


def _part(analysis: Analysis, piece: Piece) -> _Part:
    """The piece's nodes, and those that compute the constants it reads."""
    model = analysis.model
    chosen, waiting = set(piece.nodes), list(piece.nodes)
    while waiting:
        for name in model.nodes[waiting.pop()].input:
            source = model.producer.get(name)
            if source is not None and source not in chosen and name in model.constant_names:
                chosen.add(source)
                waiting.append(source)
    order = sorted(chosen)
    read = {name for i in order for name in model.nodes[i].input}
    skeleton = onnx.ModelProto(ir_version=model.skeleton.ir_version)
    skeleton.opset_import.extend(model.skeleton.opset_import)
    skeleton.graph.node.extend(model.nodes[i] for i in order)
    for name in piece.gives:
        skeleton.graph.output.append(onnx.ValueInfoProto(name=name))
    weights = {name: t for name, t in model.initializers.items() if name in read}
    return _Part(Model(skeleton, weights), {i: at for at, i in enumerate(order)})


def _restricted(analysis: Analysis, part: _Part) -> Coupling:
    """The coupling as far as it speaks of the part, by the numbers its nodes have there."""
    relations, indices = analysis.relations, part.indices
    known = relations.slots.tensors
    names = {n for node in part.model.nodes for n in (*node.input, *node.output)} & known.keys()
    return replace(
        analysis.coupling,
        relations=replace(
            relations,
            slots=Slots({name: known[name] for name in sorted(names)}, relations.slots.total),
            counts=[
                replace(c, node=indices[c.node]) for c in relations.counts if c.node in indices
            ],
            defaults=[
                replace(d, node=indices[d.node]) for d in relations.defaults if d.node in indices
            ],
            renumbers=[
                replace(r, node=indices[r.node]) for r in relations.renumbers if r.node in indices
            ],
            shape_reads=[indices[i] for i in relations.shape_reads if i in indices],
        ),
    )


def _size(analysis: Analysis, alive: Mask, name: str) -> Shape:
    tensor = analysis.relations.slots.tensors.get(name)
    if tensor is None:
        return tuple(analysis.shapes.shape.get(name) or ())
    return tuple(int(alive[axis.slots].sum()) for axis in tensor)


def _value(analysis: Analysis, name: str, size: Shape) -> Array:
    """What the piece is fed with: known sizes as they are, positions 0, masks true, else ones."""
    known = analysis.shapes.value.get(name)
    if known is not None:
        return known
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(analysis.shapes.dtype[name]))
    return np.zeros(size, dtype) if dtype.kind in "iu" else np.ones(size, dtype)


def _stays(analysis: Analysis, piece: Piece, name: str) -> bool:
    """Whether all that reads the picture outside the piece takes it in the blocked layout."""
    nodes, inner = analysis.model.nodes, set(piece.nodes)
    readers = [
        nodes[i].op_type for i, _ in analysis.model.consumers.get(name, ()) if i not in inner
    ]
    outside = name in analysis.model.output_names
    return not outside and all(kind == "Conv" or kind in BLOCKED for kind in readers)


def _conv(graph: onnx.GraphProto, source: str, output: str, inputs: int, outputs: int) -> None:
    weight = f"{output}_weight"
    values = np.full((outputs, inputs, 1, 1), 1 / inputs, np.float32)
    graph.initializer.append(set_initializer(weight, values))
    graph.node.append(helper.make_node("Conv", [source, weight], [output], output))
