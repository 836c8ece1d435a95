"""Write a model the way the peers can read it, without changing what it computes.

    python -m tools.accuracy.peer_model IN.onnx OUT.onnx --input-shape x:1,3,32,32 ...

Run from the repository with the peers' own Python. Symbolic sizes get values, and onnxsim folds the
shape arithmetic but optimises nothing. For the benchmark's ONNX to torch converter whole numbers
become Constant nodes, and uneven pads of a convolution a Pad in front of it.
"""

import argparse
from pathlib import Path

import numpy as np
import onnx
import onnxsim
from onnx import NodeProto, helper, numpy_helper

from tools.accuracy.static import frozen, parse_sizes
from tools.peers.search import emit, reason


def pad_in_front(node: NodeProto) -> list[NodeProto]:
    """The convolution; if its pads differ from side to side, a Pad and one that has none."""
    pads = next((list(a.ints) for a in node.attribute if a.name == "pads"), [])
    half = len(pads) // 2
    if node.op_type != "Conv" or pads[:half] == pads[half:]:
        return [node]
    amounts, padded = f"{node.output[0]}_pads", f"{node.output[0]}_padded"
    values = np.array([0, 0, *pads[:half], 0, 0, *pads[half:]], np.int64)
    constant = helper.make_node("Constant", [], [amounts], value=numpy_helper.from_array(values))
    pad = helper.make_node("Pad", [node.input[0], amounts], [padded], f"{node.name}_pad")
    conv = NodeProto()
    conv.CopyFrom(node)
    conv.input[0] = padded
    kept = [a for a in node.attribute if a.name != "pads"]
    del conv.attribute[:]
    conv.attribute.extend(kept)
    return [constant, pad, conv]


def readable(model: onnx.ModelProto) -> onnx.ModelProto:
    """Whole-number initialisers as Constant nodes, uneven pads as Pad nodes."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE)
    whole = [t for t in graph.initializer if t.data_type not in floats]
    constants = [helper.make_node("Constant", [], [t.name], value=t) for t in whole]
    nodes = [*constants, *(n for node in model.graph.node for n in pad_in_front(node))]
    weights = [t for t in model.graph.initializer if t.data_type in floats]
    for field, values in ((graph.node, nodes), (graph.initializer, weights)):
        del field[:]
        field.extend(values)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--input-shape", action="append", default=[])
    arguments = parser.parse_args()
    model = frozen(onnx.load(arguments.source), parse_sizes(arguments.input_shape))
    try:
        simple, _ = onnxsim.simplify(model, perform_optimization=False)
    except Exception as error:  # whatever the peer raises is its result
        emit({"error": reason(error)})
        return
    onnx.save(readable(simple), arguments.target)
    emit({"written": arguments.target.name})


if __name__ == "__main__":
    main()
