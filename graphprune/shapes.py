"""The concrete shape of every tensor, and the value of every small tensor that shapes decide.

One walk over the nodes in order, with ONNX's own inference per node; weights are never copied.
Symbolic dimensions are given a size first, so that Reshape, Slice and their like are concrete.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from onnx import defs, helper, numpy_helper, shape_inference

from graphprune.control import bodies, is_open
from graphprune.control_shapes import Flow
from graphprune.errors import ModelError
from graphprune.fitting import Try, fitting
from graphprune.foreign import infer_alone
from graphprune.model import NOT_COMPUTED, RANDOM_OPS, Array, Model
from graphprune.open_sizes import filled
from graphprune.sizes import (
    axis_names,
    batch_names,
    check_given,
    concrete,
    declared,
    larger,
    nameless_batches,
    symbols,
)
from graphprune.sound import check_axes
from graphprune.wording import counted

Shape = tuple[int, ...]
LARGEST = 1 << 40  # elements of any tensor
SMALL = 4096  # elements: larger values are never carried through shape arithmetic
# Operators defined as functions, for which ONNX's per-node inference finds nothing.
INFERRED_AS = {"GreaterOrEqual": "Greater", "LessOrEqual": "Less"}
SAME_AS_FIRST = {"GroupNormalization", "MeanVarianceNormalization", "RMSNormalization"}
SAME_AS_FIRST |= {"Binarizer", "Imputer"}
FLOATS_LIKE_FIRST = {"Normalizer", "Scaler"}  # of ai.onnx.ml, which infers none of the four
# Sizes tried, in order, for a symbolic dimension nobody named: the first that the graph accepts.
# Axes of length 1 would broadcast against anything and hide where the work is, so 1 is not first.
TRIED_SIZES = (32, 64, 1, 128, 224, 256, 320, 512, 640)
LAST_SIZES = (16, 8)  # tried where nothing else fits: tables of some length may be larger


@dataclass(frozen=True)
class Shapes:
    """Shapes (``None`` where unknown), element types and small values, by tensor name."""

    shape: dict[str, Shape | None]
    dtype: dict[str, int]
    value: dict[str, Array]
    inputs: dict[str, Shape]
    symbolic: dict[str, tuple[int, ...]] = field(default_factory=dict)  # input → symbolic axes
    notes: tuple[str, ...] = ()
    turns: dict[str, int] = field(default_factory=dict)  # loop body → how often it runs, if known
    assumed: frozenset[str] = frozenset()  # inputs whose symbolic sizes might as well be others
    decided: tuple[str, ...] = ()  # tensors of which only the data decides a size
    varying: frozenset[str] = frozenset()  # bounds of ranges that are others at other sizes


def infer(model: Model, input_shapes: Mapping[str, Shape] | None = None) -> Shapes:
    """Shapes of all tensors, symbolic dimensions as given, else the smallest size that works.

    A symbol of an input that is given has that size everywhere; sums of symbols are such.
    """
    given = dict(input_shapes or {})
    check_given(model, given)
    symbolic = {
        value.name: tuple(i for i, size in enumerate(dims) if size is None)
        for value in model.inputs
        if (dims := declared(value)) is not None
    }
    known = symbols(model, given)
    open_names = [
        value.name
        for value in model.inputs
        if value.name not in given
        and any(axis_names(value)[axis] not in known for axis in symbolic.get(value.name, ()))
    ]
    batch, states = batch_names(model), nameless_batches(model)
    tries: list[tuple[int, Shapes]] = []
    waiting = list(TRIED_SIZES if open_names else (1,))
    while waiting:
        size = waiting.pop(0)
        sizes = {v.name: 1 if v.name in states else size for v in model.inputs}
        inputs = {v.name: concrete(v, given, known, sizes[v.name], batch) for v in model.inputs}
        if len(tries) == 1 and inputs == tries[0][1].inputs:
            break  # only the batch is open
        tries.append((size, _walk(model, inputs)))
        if _unknown(tries[-1][1]) == _floor(model, tries[-1][1]):
            break
        if len(tries) == len(TRIED_SIZES):
            seen = [Try(size, shapes.shape, shapes.value) for size, shapes in tries]
            waiting = [*fitting(model.nodes, seen), *LAST_SIZES]
    chosen, last = min(tries, key=lambda entry: _unknown(entry[1]))
    notes = []
    if open_names:
        taken = {last.inputs[name][axis] for name in open_names for axis in symbolic[name]}
        size_text = "1" if taken == {1} else f"{chosen} (batch 1)"
        notes.append(
            f"symbolic dimensions of {', '.join(open_names)} taken as {size_text}; "
            "give others with --input-shape NAME:1,3,224,224"
        )
    if last.decided:
        name = last.decided[0]
        notes.append(
            f"{counted(len(last.decided), 'tensor has', 'tensors have')} a size that only the data "
            f"decides, first {name!r}, taken as {list(last.shape[name] or ())}"
        )
    assumed = open_names if open_names and chosen in (TRIED_SIZES[0], 1) else []
    return replace(
        last,
        symbolic=symbolic,
        notes=tuple(notes),
        assumed=frozenset(assumed),
        varying=_varying(model, last, symbolic),
    )


def open_values(model: Model, shapes: Shapes, inputs: bool) -> frozenset[str]:
    """All that is computed from the shape of a tensor behind one whose size only the data decides;
    with ``inputs`` from any shape: what their sizes decide."""
    behind = set(shapes.decided)
    found: set[str] = set()
    for node in model.nodes if inputs or behind else ():
        written = [name for name in node.output if name]
        if node.op_type in ("Shape", "Size") and node.input[0] not in model.constant_names:
            found.update(written if inputs or node.input[0] in behind else ())
        if not found.isdisjoint(node.input):
            found.update(written)
        if not behind.isdisjoint(node.input):
            behind.update(written)
    return frozenset(found)


def _varying(
    model: Model, known: Shapes, symbolic: Mapping[str, tuple[int, ...]]
) -> frozenset[str]:
    """Computed bounds of Slices and Splits that are others where the inputs have other sizes."""
    bounds = {
        name
        for node in model.nodes
        if node.op_type in ("Slice", "Split")
        for name in node.input[1:3]
        if name in known.value and name not in model.constant_names
    }
    if not bounds or not any(symbolic.values()):
        return frozenset()
    try:
        other = _walk(model, larger(known.inputs, symbolic))
    except ModelError:  # sizes that the model does not take
        return frozenset()
    there = bounds & other.value.keys()  # else the model is not made for these sizes
    return frozenset(n for n in there if not np.array_equal(known.value[n], other.value[n]))


def _unknown(shapes: Shapes) -> int:
    return sum(s is None or min(s, default=1) < 1 for s in shapes.shape.values())


def _floor(model: Model, shapes: Shapes) -> int:
    """Unknown shapes that no input size can cure: operators that ONNX has no schema for."""
    return sum(
        shapes.shape.get(name) is None
        for node in model.nodes
        if _schema(node, model.opsets) is None or bodies(node)
        for name in node.output
        if name
    )


def _schema(node: onnx.NodeProto, opsets: Mapping[str, int]) -> defs.OpSchema | None:
    domain = "" if node.domain == "ai.onnx" else node.domain
    version = opsets.get(domain)
    if version is None or not defs.has(node.op_type, domain):
        return None
    try:
        return defs.get_schema(node.op_type, version, domain)
    except defs.SchemaError:
        return None


def _walk(model: Model, inputs: Mapping[str, Shape]) -> Shapes:
    types: dict[str, onnx.TypeProto] = {}
    value: dict[str, Array] = {}
    for info in model.inputs:
        kind = info.type.tensor_type.elem_type
        types[info.name] = helper.make_tensor_type_proto(kind, inputs[info.name])
    for tensor in model.initializers.values():
        types[tensor.name] = helper.make_tensor_type_proto(tensor.data_type, tensor.dims)
        if _size(tuple(tensor.dims)) <= SMALL and tensor.data_type != onnx.TensorProto.STRING:
            value[tensor.name] = model.array(tensor.name)
    hints = {info.name: info for info in model.graph.value_info}
    flow = Flow(model, types, value)
    decided: list[str] = []
    position = 0
    while position < len(model.nodes):
        node = model.nodes[position]
        position += 1
        for name in node.output:  # of an earlier turn of a Loop's body
            value.pop(name, None)
        if is_open(node):
            again = flow.passed(node, position - 1)
            position = position if again is None else again
            found: Mapping[str, onnx.TypeProto] = flow.found
        else:
            found = _infer_node(node, model, types, value)
        for name in filter(None, node.output):
            proto = found.get(name)
            if _shape(proto) is None:
                proto = _hinted(node, hints.get(name), types, value) or proto
            if proto is not None and _shape(proto) is None:
                first = _shape(types.get(node.input[0])) if node.input else None
                proto = filled(node, proto, first, value)
                decided += [name] * (_shape(proto) is not None)
            types[name] = proto if proto is not None else onnx.TypeProto()
        if not is_open(node):
            _fold(node, model, types, value)
    shape = {name: _shape(proto) for name, proto in types.items()}
    _check_sizes(shape)
    dtype = {name: proto.tensor_type.elem_type for name, proto in types.items()}
    left = tuple(name for name in dict.fromkeys(decided) if name not in value)
    return Shapes(shape, dtype, value, dict(inputs), turns=flow.turns, decided=left)


def _check_sizes(shape: Mapping[str, Shape | None]) -> None:
    for name, sizes in shape.items():
        if sizes and (min(sizes) < 0 or _size(sizes) > LARGEST):
            raise ModelError(
                "a tensor is larger than any memory, or of a negative size",
                f"tensor {name[:200]!r} of shape {list(sizes)[:100]}",
                "Export the model again; it cannot have run like this.",
            )


def _hinted(
    node: onnx.NodeProto,
    hint: onnx.ValueInfoProto | None,
    types: Mapping[str, onnx.TypeProto],
    value: Mapping[str, Array],
) -> onnx.TypeProto | None:
    """What the file declares of an output, where that leaves no size open."""
    if hint is None or None in (declared(hint) or [None]) or _cannot_run(node, types, value):
        return None
    return hint.type


def _size(shape: Shape | None) -> int:
    return SMALL + 1 if shape is None else math.prod(shape)


def _shape(proto: onnx.TypeProto | None) -> Shape | None:
    if proto is None or not proto.HasField("tensor_type"):
        return None
    if not proto.tensor_type.HasField("shape"):
        return None
    dims = proto.tensor_type.shape.dim
    if not all(d.HasField("dim_value") for d in dims):
        return None
    return tuple(d.dim_value for d in dims)


def _infer_node(
    node: onnx.NodeProto,
    model: Model,
    types: Mapping[str, onnx.TypeProto],
    value: Mapping[str, Array],
) -> Mapping[str, onnx.TypeProto]:
    if node.op_type in INFERRED_AS and not node.domain:
        node = helper.make_node(INFERRED_AS[node.op_type], node.input, node.output)
    schema = _schema(node, model.opsets)
    if bodies(node) or _cannot_run(node, types, value):
        return {}
    if schema is None:
        return _infer_foreign(node, model, types, value)
    present = {name for name in node.input if name}
    first = _shape(types.get(node.input[0])) if node.input else None
    check_axes(node, None if first is None else len(first))
    try:
        found = shape_inference.infer_node_outputs(
            schema,
            node,
            {name: types[name] for name in present},
            {name: numpy_helper.from_array(value[name], name) for name in present & value.keys()},
            opset_imports=list(model.skeleton.opset_import),
            ir_version=model.skeleton.ir_version,
        )
    except (
        shape_inference.InferenceError,
        onnx.checker.ValidationError,
        RuntimeError,
        ValueError,
    ):
        found = {}  # an unknown shape: the tensor is pinned and reported
    if node.op_type in SAME_AS_FIRST and _shape(found.get(node.output[0])) is None:
        return {**found, node.output[0]: types[node.input[0]]}
    if node.op_type in FLOATS_LIKE_FIRST and first is not None:
        return {node.output[0]: helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, first)}
    return dict(found)


def _infer_foreign(
    node: onnx.NodeProto,
    model: Model,
    types: Mapping[str, onnx.TypeProto],
    value: Mapping[str, Array],
) -> Mapping[str, onnx.TypeProto]:
    """An operator that ONNX does not know (com.microsoft and the like): ask ONNX Runtime."""
    if any(_shape(types[name]) is None for name in node.input if name):
        return {}
    opsets = model.skeleton.opset_import
    return infer_alone(node, types, value, opsets, model.skeleton.ir_version)


def _cannot_run(
    node: onnx.NodeProto, types: Mapping[str, onnx.TypeProto], value: Mapping[str, Array]
) -> bool:
    """What ONNX's inference accepts and nothing runs: an input smaller than a convolution's kernel
    or than the positions that a Gather picks, or not of the size that a Reshape makes."""
    if node.op_type not in ("Conv", "Gather", "GatherElements", "Reshape") or len(node.input) < 2:
        return False
    x, other = (_shape(types[name]) for name in node.input[:2])
    if x is None or other is None:
        return False
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    known = value.get(node.input[1])
    if node.op_type == "Reshape":
        return not given.get("allowzero", 0) and not _fills(x, known)
    if node.op_type.startswith("Gather"):
        return _beyond(x, given.get("axis", 0), known)
    return len(x) == len(other) and not _covers(x, other, given)


def _beyond(shape: Shape, axis: int, picked: Array | None) -> bool:
    """Whether any position lies outside the axis."""
    if picked is None or not picked.size or not -len(shape) <= axis < len(shape):
        return False
    return bool(picked.max() >= shape[axis] or picked.min() < -shape[axis])


def _covers(x: Shape, kernel: Shape, given: Mapping[str, Any]) -> bool:
    """Whether the padded input is as large as the spread kernel."""
    if given.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        return True
    rank = len(x) - 2
    pads, spread = given.get("pads", [0] * 2 * rank), given.get("dilations", [1] * rank)
    if len(pads) != 2 * rank or len(spread) != rank:
        return True  # ill-formed: for others to say
    return all(
        x[2 + i] + pads[i] + pads[rank + i] > (kernel[2 + i] - 1) * spread[i] for i in range(rank)
    )


def _fills(shape: Shape, target: Array | None) -> bool:
    """Whether so many elements can take the target's shape (0 copies a size, -1 is the rest)."""
    if target is None or not target.reshape(-1)[len(shape) :].all():
        return True
    sizes = [int(t) or shape[i] for i, t in enumerate(target.reshape(-1))]
    rest = int(np.prod([size for size in sizes if size > 0], dtype=np.int64))
    whole = int(np.prod(shape, dtype=np.int64))
    return whole % max(rest, 1) == 0 if -1 in sizes else whole == rest


def _fold(
    node: onnx.NodeProto,
    model: Model,
    types: dict[str, onnx.TypeProto],
    value: dict[str, Array],
) -> None:
    """Compute the node's outputs where they are small and decided by shapes and constants."""
    first = node.output[0] if node.output else ""
    if node.op_type in ("Shape", "Size") and not node.domain:
        shape = _shape(types[node.input[0]])
        if shape is not None:
            value[first] = _shape_value(node, shape)
        return
    outputs = [name for name in node.output if name]
    if not all(name in value for name in node.input if name) or node.op_type in RANDOM_OPS:
        return
    if bodies(node) or any(_size(_shape(types[name])) > SMALL for name in outputs):
        return
    from onnx.reference import ReferenceEvaluator

    feeds = {name: value[name] for name in node.input if name}
    try:
        graph = helper.make_graph(
            [node],
            "fold",
            [helper.make_value_info(n, onnx.TypeProto()) for n in feeds],
            [helper.make_value_info(n, onnx.TypeProto()) for n in outputs],
        )
        lone = helper.make_model(graph, opset_imports=model.skeleton.opset_import)
        with np.errstate(all="ignore"):  # a log of zero is the model's business
            results = ReferenceEvaluator(lone).run(None, feeds)
    except NOT_COMPUTED:  # the value stays unknown, and what depends on it pinned
        return
    for name, result in zip(outputs, results, strict=True):
        if (
            isinstance(result, np.ndarray | np.generic)
            and np.asarray(result).dtype.kind not in "OSU"
        ):
            value[name] = np.asarray(result)
            if _shape(types[name]) != value[name].shape:  # a stand-in for what the values decide
                kind = types[name].tensor_type.elem_type
                types[name] = helper.make_tensor_type_proto(kind, value[name].shape)


def _shape_value(node: onnx.NodeProto, shape: Shape) -> Array:
    if node.op_type == "Size":
        return np.array(np.prod(shape, dtype=np.int64), dtype=np.int64)
    attributes = {a.name: a.i for a in node.attribute}
    return np.array(shape[slice(attributes.get("start", 0), attributes.get("end"))], dtype=np.int64)
