"""Read a model and check it; write one, all of it or nothing."""

from __future__ import annotations

import os
import tempfile
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import numpy as np
import onnx
from onnx import external_data_helper, inliner, numpy_helper

from graphprune.control import bodies
from graphprune.errors import ModelError, UsageError
from graphprune.model import PROTOBUF_LIMIT, Model, captured, label, without

DEEPEST = 31  # bodies inside one another that protobuf parses, whatever stands in the innermost


def load(source: str | Path | onnx.ModelProto) -> Model:
    """Read a model from a path or take a ``ModelProto`` (copied).

    Raises ``UsageError`` where the file cannot be read, ``ModelError`` where it is no valid model.
    """
    data_files: tuple[Path, ...] = ()
    if isinstance(source, onnx.ModelProto):
        _check_depth(source.graph)
        proto = onnx.ModelProto()
        proto.CopyFrom(source)
    else:
        proto, data_files = _read(Path(source))
    if not proto.graph.node:
        raise ModelError(
            "the graph is empty",
            f"{source}" if not isinstance(source, onnx.ModelProto) else "",
            "Export the model again; an ONNX model needs at least one node.",
        )
    if proto.functions:
        proto = _inlined(proto)
    _check_names(proto)
    proto = _sorted(proto)
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    model = Model(without(proto, ("initializer",)), tensors, data_files)
    _check(model)
    return model


def save(model: Model, path: str | Path) -> None:
    """Write ``model`` to ``path``: beside it first, then renamed, so no half-written file remains.

    Models above the protobuf limit, or that came with external data, get ``<path>.data`` beside.
    """
    path = Path(path)
    external = bool(model.data_files) or model.weight_bytes > PROTOBUF_LIMIT
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            data = path.with_name(path.name + ".data")
            beside, beside_data = Path(folder) / path.name, Path(folder) / data.name
            proto = model.assemble()
            if external:
                onnx.save(proto, beside, save_as_external_data=True, location=data.name)
                if beside_data.exists():  # onnx makes it readable by its owner alone
                    beside_data.chmod(beside.stat().st_mode)
            else:
                beside.write_bytes(proto.SerializeToString())
            earlier = Path(folder) / "earlier"
            if beside_data.exists() and data.exists():
                os.replace(data, earlier)
            try:
                if beside_data.exists():
                    os.replace(beside_data, data)
                os.replace(beside, path)
            except OSError:  # all or nothing: what was there before comes back
                if external:
                    data.unlink(missing_ok=True)
                if earlier.exists():
                    os.replace(earlier, data)
                raise
    except OSError as error:
        raise UsageError(
            f"cannot write the result: {error.strerror or error}",
            str(path),
            "Choose a folder that is writable and has room with -o OUT; nothing was left behind.",
        ) from error


def source_bytes(source: str | Path | onnx.ModelProto, model: Model) -> int:
    """Size of a source on disk (its data files too), or as it would be stored."""
    if isinstance(source, onnx.ModelProto):
        return model.stored_bytes
    return Path(source).stat().st_size + sum(path.stat().st_size for path in model.data_files)


def _read(path: Path) -> tuple[onnx.ModelProto, tuple[Path, ...]]:
    from google.protobuf.message import DecodeError

    if path.is_dir():
        raise UsageError("the model is a folder", str(path), "Name the .onnx file in it.")
    if not path.is_file():
        raise UsageError("there is no such model file", str(path), "Check the path.")
    try:
        proto = onnx.load(path, load_external_data=False, format="protobuf")
    except OSError as error:
        raise UsageError(f"cannot read the model: {error.strerror}", str(path)) from error
    except (DecodeError, ValueError) as error:
        raise ModelError(
            "not an ONNX file, or a truncated one",
            str(path),
            "Export or download it again; `onnx.load` must read it.",
        ) from error
    external = external_data_helper._get_all_tensors(proto)
    outside = [t for t in external if external_data_helper.uses_external_data(t)]
    files: dict[Path, None] = {}
    for tensor in outside:
        location = next((e.value for e in tensor.external_data if e.key == "location"), "?")
        try:
            external_data_helper.load_external_data_for_tensor(tensor, str(path.parent))
        except (OSError, ValueError, onnx.checker.ValidationError) as error:
            raise ModelError(
                f"the external data file {location!r} is missing or unreadable",
                f"tensor {tensor.name!r} of {path}",
                "Keep the data file beside the model, under the name that the model gives it.",
            ) from error
        files[(path.parent / location).resolve()] = None
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]
    return proto, tuple(files)


def _check_depth(graph: onnx.GraphProto) -> None:
    """Bodies inside one another, level by level: protobuf's own limit would end in a riddle."""
    level = [graph]
    for _ in range(DEEPEST + 1):
        level = [body for graph in level for node in graph.node for body in bodies(node)]
        if not level:
            return
    raise ModelError(
        f"bodies of control flow lie more than {DEEPEST} deep inside one another",
        hint="Neither protobuf nor ONNX Runtime reads such a file; export the model flatter.",
    )


def _inlined(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Calls of local functions replaced by what they do, in bodies too; functions of another opset
    are converted, and stay calls (to be pinned) where ONNX cannot convert them."""
    from google.protobuf.message import DecodeError

    try:
        try:
            return inliner.inline_local_functions(proto, convert_version=True)
        except RuntimeError:
            return inliner.inline_local_functions(proto)
    except (onnx.checker.ValidationError, DecodeError, RuntimeError) as error:
        raise ModelError(
            f"the model's local functions are invalid: {' '.join(str(error).split())[:300]}",
            hint="A function may call others, but not itself.",
        ) from error


def _sorted(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Nodes in topological order (stable where they already are)."""
    nodes = list(proto.graph.node)
    producer = {name: i for i, node in enumerate(nodes) for name in node.output if name}
    needs = {
        i: {producer[n] for n in (*node.input, *captured(node)) if n in producer}
        for i, node in enumerate(nodes)
    }
    if all(source < i for i, sources in needs.items() for source in sources):
        return proto
    try:
        order = list(TopologicalSorter(needs).static_order())
    except CycleError as error:
        cycle = label(nodes[error.args[1][0]])
        raise ModelError("the graph has a cycle", f"node {cycle!r}") from error
    ordered = [onnx.NodeProto.FromString(nodes[i].SerializeToString()) for i in order]
    del proto.graph.node[:]
    proto.graph.node.extend(ordered)
    return proto


def _check_names(proto: onnx.ModelProto) -> None:
    """Every tensor has one origin, and there is something to compute."""
    if not proto.graph.output:
        raise ModelError("the graph has no outputs", hint="Nothing it computes can be used.")
    versions = {entry.domain: entry.version for entry in proto.opset_import}
    if min(versions.values(), default=0) < 1:
        raise ModelError(
            f"the model declares no usable opset: {versions or 'none'}",
            hint="Export it again; every operator's domain needs an opset version from 1 on.",
        )
    stored: set[str] = set()
    for tensor in proto.graph.initializer:
        if tensor.name in stored:
            raise ModelError(f"the initialiser {tensor.name!r} is stored twice")
        stored.add(tensor.name)
    written = stored | {value.name for value in proto.graph.input}
    for node in proto.graph.node:
        for name in filter(None, node.output):
            if name in written:
                raise ModelError(f"tensor {name!r} is written twice", f"node {label(node)!r}")
            written.add(name)


def _check(model: Model) -> None:
    """What every later stage relies on: defined inputs and outputs, sound weights."""
    defined = {value.name for value in model.graph.input} | set(model.initializers)
    defined |= {t.values.name for t in model.graph.sparse_initializer}
    for node in model.nodes:
        for name in (*(n for n in node.input if n), *captured(node)):
            if name not in defined:
                raise ModelError(f"input {name!r} is produced by nothing", f"node {label(node)!r}")
        defined.update(node.output)
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                _check_tensor(attribute.t, label(node))
    for value in model.outputs:
        if value.name not in defined:
            raise ModelError(f"the graph output {value.name!r} is produced by nothing")
    for name, tensor in model.initializers.items():
        _check_tensor(tensor, name)


def _check_tensor(tensor: onnx.TensorProto, name: str) -> None:
    try:
        value = numpy_helper.to_array(tensor)
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(
            "a weight's data does not fit its shape",
            f"tensor {name!r}",
            "The file is damaged; export it again.",
        ) from error
    if value.dtype.kind == "V":  # bfloat16 and the 8-bit floats, which numpy itself lacks
        value = value.astype(np.float32)
    if value.size and value.dtype.kind == "f" and np.isnan(value.min()):
        raise ModelError(
            "weights contain NaN",
            f"tensor {name!r}",
            "Such a model computes nothing useful; check the training run or the export.",
        )
