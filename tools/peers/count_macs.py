"""Count the multiply-accumulates and parameters of ONNX files: one counter for every tool.

    python -m tools.peers.count_macs A.onnx B.onnx

Prints one JSON document: file → {"macs", "parameters"} or {"error"}. MACs are those of Conv, Gemm
and MatMul, at the shapes of the graph's inputs; parameters are the elements of float constants,
each stored tensor once.
"""

import math
import sys
from collections.abc import Iterator

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from tools.peers.search import emit, reason

Shape = tuple[int, ...]
SMALL = 1024  # elements; smaller tensors may hold shapes, larger ones are weights
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)


def constants(graph: GraphProto) -> Iterator[TensorProto]:
    """Stored tensors: initialisers and Constant nodes."""
    yield from graph.initializer
    for node in graph.node:
        if node.op_type == "Constant":
            yield from (a.t for a in node.attribute if a.name == "value")


def shapes(model: ModelProto) -> dict[str, Shape]:
    """Shape of every tensor, inferred afresh, without copying the weights."""
    graph = model.graph
    light = ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    light.functions.extend(model.functions)
    light.graph.name = graph.name or "graph"
    light.graph.node.extend(graph.node)
    light.graph.output.extend(graph.output)
    stored = {t.name for t in graph.initializer}
    light.graph.input.extend(v for v in graph.input if v.name not in stored)
    for tensor in graph.initializer:
        if math.prod(tensor.dims) <= SMALL:
            light.graph.initializer.append(tensor)
        else:
            value = helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            light.graph.input.append(value)
    fold(light.graph)
    inferred = onnx.shape_inference.infer_shapes(light, data_prop=True).graph
    values = [*inferred.input, *inferred.value_info, *inferred.output]
    found = {v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in values}
    return found | {t.name: tuple(t.dims) for t in [*graph.initializer, *light.graph.initializer]}


def fold(graph: GraphProto) -> None:
    """Replace nodes of constant inputs by their values: Expand of a computed shape needs them."""
    known = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    kept = []
    for node in graph.node:
        if not all(name in known for name in node.input if name):
            kept.append(node)
            continue
        values = ReferenceEvaluator(node).run(None, {n: known[n] for n in node.input if n})
        for name, value in zip(node.output, values, strict=True):
            known[name] = np.asarray(value)
            graph.initializer.append(numpy_helper.from_array(known[name], name))
    del graph.node[:]
    graph.node.extend(kept)


def node_macs(node: NodeProto, known: dict[str, Shape]) -> int:
    """MACs of one node: elements of the output times the length of each sum."""
    if node.op_type not in ("Conv", "Gemm", "MatMul"):
        return 0
    a, b, out = (known.get(n, ()) for n in (node.input[0], node.input[1], node.output[0]))
    if not (all(a) and all(b) and out and all(out)):
        raise ValueError(f"no static shape at {node.op_type} {node.name}")
    transposed = any(x.name == "transA" and x.i for x in node.attribute)
    length = math.prod(b[1:]) if node.op_type == "Conv" else a[0 if transposed else -1]
    return math.prod(out) * length


def count_macs(model: ModelProto) -> int:
    known = shapes(model)
    return sum(node_macs(node, known) for node in model.graph.node)


def count_parameters(model: ModelProto) -> int:
    return sum(math.prod(t.dims) for t in constants(model.graph) if t.data_type in FLOATS)


def count(path: str) -> dict[str, int | str]:
    try:
        model = onnx.load(path)
        return {"macs": count_macs(model), "parameters": count_parameters(model)}
    except Exception as error:  # an unreadable file is a result of the tool that wrote it
        return {"error": reason(error)}


if __name__ == "__main__":
    emit({path: count(path) for path in sys.argv[1:]})
