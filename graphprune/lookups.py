"""Inputs that look rows of tables up: token ids and categories, and how many of each there are.

A bound is a table's number of rows, less what the graph adds to the ids on their way. TensorFlow
lets ids count from the end (``ids < 0 ? ids + rows : ids``) and Keras declares them as floats.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper

from graphprune.model import NOT_COMPUTED, Array, Model, computable
from graphprune.shapes import Shapes

# Operators of com.microsoft that look rows up: input of indices → input that is the table.
LOOK_UPS = {
    "EmbedLayerNormalization": {0: 2, 1: 4, 8: 3},
    "QEmbedLayerNormalization": {0: 2, 1: 4},
    "GatherBlockQuantized": {1: 0},
    "RotaryEmbedding": {1: 2},
}
# Operators that hand an index on unchanged to the Gather whose table bounds it,
INDEX_KEEPERS = {"Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze", "Flatten", "Clip"}
# and those that may move it.
ARITHMETIC = {"Add", "Sub", "Mul", "Where", "Max", "Min", "Mod"}
INTEGERS = {TensorProto.INT32, TensorProto.INT64, TensorProto.UINT32, TensorProto.UINT64}
TRIED = (0, 1, 2, 5)  # ids that are followed through arithmetic
MOST_NODES = 32  # of the arithmetic of one index


def index_bounds(model: Model, shapes: Shapes, name: str) -> list[int]:
    """How many ids each of the tables has rows for that the numbers of ``name`` look up."""
    bounds = []
    moved = {name: False}  # what is reached → whether by arithmetic
    waiting = [name]
    while waiting:
        source = waiting.pop()
        for i, position in model.consumers.get(source, ()):
            node = model.nodes[i]
            if node.op_type == "Gather" and position == 1:
                table = shapes.shape.get(node.input[0])
                axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
                shift = _shift(model, shapes, name, source) if moved[source] else 0
                if table and shift is not None:
                    bounds.append(table[axis] - shift)
            elif node.domain == "com.microsoft" and position in LOOK_UPS.get(node.op_type, {}):
                table = shapes.shape.get(node.input[LOOK_UPS[node.op_type][position]])
                if table and not moved[source]:
                    bounds.append(table[0])
            elif node.op_type in INDEX_KEEPERS and position == 0:
                new = [output for output in node.output if output not in moved]
                moved.update(dict.fromkeys(new, moved[source]))
                waiting += new
            elif node.op_type in ARITHMETIC and shapes.dtype.get(node.output[0]) in INTEGERS:
                new = [output for output in node.output if output not in moved]
                moved.update(dict.fromkeys(new, True))
                waiting += new
    return [bound for bound in bounds if bound > 0]


def _shift(model: Model, shapes: Shapes, name: str, index: str) -> int | None:
    """What is added to every id from ``name`` on the way to ``index``; ``None`` where that is no
    sum of the id and a constant, or not known."""
    compute = _arithmetic(model, shapes, name, index)
    if compute is None:
        return None
    try:
        first, *others = [compute(id_) for id_ in TRIED]
    except NOT_COMPUTED:
        return None
    moves = [result - first for result in others]
    if not first.size or any((m != id_).any() for m, id_ in zip(moves, TRIED[1:], strict=True)):
        return None
    return int(first.max())


def _arithmetic(
    model: Model, shapes: Shapes, name: str, index: str
) -> Callable[[int], Array] | None:
    """From an id to the index that it becomes, everywhere in the input."""
    from onnx.reference import ReferenceEvaluator

    known: dict[str, Array] = {}
    nodes: set[int] = set()
    waiting = [index]
    while waiting:
        tensor = waiting.pop()
        if tensor == name or tensor in known:
            continue
        if tensor in shapes.value:
            known[tensor] = shapes.value[tensor]
            continue
        made = model.producer.get(tensor)
        if made is None or len(nodes) > MOST_NODES or not computable(model.nodes[made]):
            return None
        if made not in nodes:
            nodes.add(made)
            waiting += [n for n in model.nodes[made].input if n]
    untyped = onnx.TypeProto()
    graph = helper.make_graph(
        [model.nodes[i] for i in sorted(nodes)],
        "index",
        [helper.make_value_info(n, untyped) for n in (name, *known)],
        [helper.make_value_info(index, untyped)],
    )
    opsets = model.skeleton.opset_import
    dtype = helper.tensor_dtype_to_np_dtype(shapes.dtype[name])
    shape = shapes.inputs[name]
    try:
        runner = ReferenceEvaluator(helper.make_model(graph, opset_imports=opsets))
    except NOT_COMPUTED:
        return None

    def compute(id_: int) -> Array:
        (result,) = runner.run(None, {name: np.full(shape, id_, dtype), **known})
        return np.asarray(result)

    return compute
