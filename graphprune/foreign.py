"""Shapes of nodes whose operators ONNX itself has no schema for: ONNX Runtime's own inference.

A session of the one node alone, on inputs of the known shapes: nothing is executed and no weight is
read, and ONNX Runtime infers as it resolves the graph (0.2 ms each).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import onnx
from onnx import TensorProto, helper, numpy_helper

from graphprune.model import Array

ELEMENT_TYPE = {
    f"tensor({name})": kind
    for name, kind in {
        **{name.lower(): number for name, number in TensorProto.DataType.items()},
        "float": TensorProto.FLOAT,
    }.items()
}


def infer_alone(
    node: onnx.NodeProto,
    types: Mapping[str, onnx.TypeProto],
    value: Mapping[str, Array],
    opsets: Iterable[onnx.OperatorSetIdProto],
    ir_version: int,
) -> dict[str, onnx.TypeProto]:
    """Types of the node's outputs by name; those that stay unknown are left out.

    ``value`` holds the small inputs that are known: inference may depend on them.
    """
    import onnxruntime as ort

    names = [name for name in dict.fromkeys(node.input) if name]
    outputs = [name for name in node.output if name]
    graph = helper.make_graph(
        [node],
        "alone",
        [helper.make_value_info(name, types[name]) for name in names if name not in value],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [numpy_helper.from_array(value[name], name) for name in names if name in value],
    )
    proto = helper.make_model(graph, opset_imports=list(opsets), ir_version=ir_version)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    try:
        runner = ort.InferenceSession(
            proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception:  # no schema or no kernel here either: the shape stays unknown, and is pinned
        return {}
    found = {}
    for output in runner.get_outputs():
        known = output.shape and all(isinstance(size, int) for size in output.shape)
        if known and output.type in ELEMENT_TYPE:  # an empty list also stands for an unknown rank
            kind = ELEMENT_TYPE[output.type]
            found[output.name] = helper.make_tensor_type_proto(kind, output.shape)
    return found
