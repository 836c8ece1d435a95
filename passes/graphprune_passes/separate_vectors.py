"""Small shared constants get one copy per use, so that sharing does not couple strangers.

Exporters store equal biases, normalisation scales and recurrent states once. A use of such a vector
(or of one number, however often) says nothing about its other uses; a shared matrix (a tied
embedding) does, and stays shared.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import onnx
from onnx import numpy_helper

from graphprune.control import is_open
from graphprune.cost import WEIGHT_TYPES
from graphprune.model import Model
from graphprune.pipeline import Arrays, Change, Context, PassResult
from graphprune.rewriting import copy_names

LARGEST = 1 << 16  # elements of a matrix that is looked into


@dataclass(frozen=True)
class SeparateVectors:
    """A float initialiser (or zero points) with one axis longer than 1, or filled with one number,
    and several readers is copied per reader."""

    name: str = "separate_vectors"

    def run(self, model: Model, context: Context) -> PassResult:
        nodes = list(model.nodes)
        copies: list[onnx.TensorProto] = []
        first: dict[str, str] = {}  # by copy
        changes: list[Change] = []
        kept = {value.name for value in model.outputs} | {v.name for v in model.graph.input}
        for name, tensor in model.initializers.items():
            uses = model.consumers.get(name, [])
            if len(uses) < 2 or tensor.data_type not in WEIGHT_TYPES or name in kept:
                continue
            if any(p == -1 or is_open(model.nodes[i]) for i, p in uses) or not _says_nothing(
                tensor
            ):
                continue
            names = copy_names(model, name)
            for index, position in uses[1:]:
                copy = onnx.TensorProto()
                copy.CopyFrom(tensor)
                copy.name = next(names)
                first[copy.name] = name
                copies.append(copy)
                if nodes[index] is model.nodes[index]:
                    nodes[index] = onnx.NodeProto()
                    nodes[index].CopyFrom(model.nodes[index])
                nodes[index].input[position] = copy.name
            changes.append(Change(self.name, name, "uses", "shared", f"{len(uses)} copies", ""))
        if not changes:
            return PassResult(model)

        def carry(arrays: Arrays) -> Arrays:
            return {**arrays, **{n: arrays[f] for n, f in first.items() if f in arrays}}

        result = model.with_graph(nodes, [*model.initializers.values(), *copies])
        return PassResult(result, tuple(changes), carry=carry)


def _says_nothing(tensor: onnx.TensorProto) -> bool:
    """Whether equal contents are a coincidence: a vector, or small and filled with one number."""
    longer = [size for size in tensor.dims if size > 1]
    if len(longer) < 2 or not 0 < prod(tensor.dims) <= LARGEST:
        return len(longer) == 1
    array = numpy_helper.to_array(tensor)
    return bool((array == array.flat[0]).all())
