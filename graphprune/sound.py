"""Is a loaded graph sound? Damage is named here, before a native library dies of it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import ml_dtypes
import numpy as np
import onnx
from onnx import numpy_helper

from graphprune.control import bodies
from graphprune.errors import ModelError
from graphprune.external import Array, chunks
from graphprune.model import label

ANEW = "Export the model again; if that changes nothing, the exporter is at fault."
MOST_ELEMENTS = 1 << 40  # of one tensor: beyond any file or memory
DENSE = "The file is damaged; export it again, with dense weights if the exporter lets you."
# Attributes that name axes of the first input; ONNX's own inference reads beyond its end where
# they are out of range.
AXES = ("axis", "axes", "batch_axis", "time_axis")
# Bits of infinity without its sign, NaN above: integers compare forty times faster.
INFINITY = {np.dtype(np.float16): 0x7C00, np.dtype(ml_dtypes.bfloat16): 0x7F80}


def check_nodes(proto: onnx.ModelProto) -> None:
    """Every operator has the inputs, outputs and attributes that ONNX says, bodies' ones too.

    Operators outside ONNX's own domains are not looked at, nor are those that newer opsets drop.
    """
    context = onnx.checker.C.CheckerContext()
    context.ir_version = proto.ir_version
    context.opset_imports = opsets = {e.domain: e.version for e in proto.opset_import}
    for node in _all_nodes(proto.graph):
        if node.domain not in opsets or node.domain not in ("", "ai.onnx.ml"):
            continue
        plain = node
        if bodies(node):
            plain = onnx.NodeProto()
            plain.CopyFrom(node)
            for body in bodies(plain):
                del body.node[:]
        _check_attributes(node)
        try:
            onnx.checker.check_node(plain, context)
        except onnx.checker.ValidationError as error:
            text = str(error).partition("\n")[0]
            if not any(known in text for known in ("deprecated", "No Op registered", "in graph")):
                raise ModelError(
                    f"a node is not what ONNX says of {node.op_type}: {text[:300]}",
                    f"node {label(node)[:300]!r}",
                    "Export the model again.",
                ) from error
        except UnicodeDecodeError as error:  # of the message that the checker wanted to give
            raise ModelError(
                f"a node is not what ONNX says of {node.op_type}, and names in it are no text",
                hint="The file is damaged; export the model again.",
            ) from error


def _all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    waiting = [graph]
    while waiting:
        for node in waiting.pop().node:
            yield node
            waiting += bodies(node)


def _check_attributes(node: onnx.NodeProto) -> None:
    names = [attribute.name for attribute in node.attribute]
    if len(set(names)) < len(names):
        raise ModelError("an attribute is given twice", f"node {label(node)[:300]!r}", ANEW)


def check_axes(node: onnx.NodeProto, rank: int | None) -> None:
    """Attributes that name axes lie within the rank of the first input (one more may be new)."""
    if rank is None or node.domain:
        return
    for attribute in node.attribute:
        if attribute.name not in AXES or attribute.type not in (2, 7):
            continue
        values = list(attribute.ints) if attribute.type == 7 else [attribute.i]
        most = rank + max(1, len(values))
        wrong = [value for value in values if not -most <= value <= most]
        if wrong:
            raise ModelError(
                f"{attribute.name} {wrong[0]} is out of range for an input of rank {rank}",
                f"node {label(node)[:300]!r}",
                "If sizes were given with --input-shape, check them; else export the model again.",
            )


def check_tensor(tensor: onnx.TensorProto, name: str) -> None:
    """The data fits shape and type, and holds no NaN."""
    try:
        if min(tensor.dims, default=0) < 0 or math.prod(tensor.dims) > MOST_ELEMENTS:
            raise ValueError(f"no such shape: {list(tensor.dims)}")
        spoiled = any(has_nan(part) for part in chunks(tensor))
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as error:
        raise ModelError(
            "a weight's data does not fit its shape",
            f"tensor {name[:300]!r}",
            "The file is damaged; export it again.",
        ) from error
    if spoiled:
        raise ModelError(
            "weights contain NaN",
            f"tensor {name[:300]!r}",
            "Such a model computes nothing useful; check the training run or the export.",
        )


def has_nan(value: Array) -> bool:
    """Whether any element is NaN, of whatever floating type; no number of another type is."""
    infinity = INFINITY.get(value.dtype)
    if value.size and infinity is not None and value.flags.c_contiguous:
        positive, negative = value.view(np.int16).max(), value.view(np.uint16).max()
        return bool(positive > infinity or negative > infinity + (1 << 15))
    if value.dtype.kind == "V":  # bfloat16 and the 8-bit floats, which numpy itself lacks
        value = value.astype(np.float32)
    return bool(value.size and value.dtype.kind == "f" and np.isnan(value.min()))


def densify(proto: onnx.ModelProto) -> list[str]:
    """Sparse initialisers become plain ones, in place; their names."""
    names = []
    for sparse in proto.graph.sparse_initializer:
        name = sparse.values.name
        where = f"tensor {name[:300]!r}"
        names.append(name)
        check_tensor(sparse.values, name)
        check_tensor(sparse.indices, name)
        values = numpy_helper.to_array(sparse.values).reshape(-1)
        places = numpy_helper.to_array(sparse.indices)
        shape = tuple(sparse.dims)
        size = math.prod(shape)
        if values.dtype.kind == "O":
            raise ModelError(
                "a sparse weight holds text", where, "Weights are numbers; export the model again."
            )
        if min(shape, default=0) < 0 or size > MOST_ELEMENTS or places.dtype != np.int64:
            raise ModelError("a sparse weight has no usable shape", where, DENSE)
        if places.ndim == 2 and places.shape[1] == len(shape):
            outside = (places < 0) | (places >= np.array(shape))
            flat = np.zeros(len(places), np.int64)
            for axis, length in enumerate(shape):
                flat = flat * length + places[:, axis]
        else:
            flat, outside = places, (places < 0) | (places >= size)
        if flat.shape != values.shape or outside.any():
            raise ModelError("a sparse weight's places lie outside it", where, DENSE)
        dense = np.zeros(size, values.dtype)
        dense[flat] = values
        proto.graph.initializer.append(numpy_helper.from_array(dense.reshape(shape), name))
    del proto.graph.sparse_initializer[:]
    return names
