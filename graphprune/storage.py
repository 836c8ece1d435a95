"""Read a model and check it; write one, all of it or nothing."""

from __future__ import annotations

import errno
import math
import os
import shutil
import tempfile
from collections.abc import Iterable
from graphlib import CycleError, TopologicalSorter
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx
from onnx import inliner

from graphprune.control import bodies
from graphprune.errors import ModelError, UsageError
from graphprune.external import LAZY, in_memory, on_disk, pointed, raw_chunks, size_of
from graphprune.model import (
    ELEMENT_BITS,
    PROTOBUF_LIMIT,
    Model,
    captured,
    label,
    without,
)
from graphprune.sound import check_nodes, check_tensor, densify
from graphprune.wording import counted, listed

WHOLE_BYTES = {kind for kind, bits in ELEMENT_BITS.items() if bits % 8 == 0}
SMALLEST_OUTSIDE = 1024  # bytes: smaller weights stay in the graph's file
TWICE = "Every tensor needs a name of its own: rename one, or export the model again."
MISSING = "A node or a weight is gone or renamed: put it back, or export the model again."
LARGEST_VERSION = 2**31 - 1
ALIGNMENT = 4096  # of a weight in the data file, so that it can be mapped

TOO_MANY = 1 << 21  # operators once functions are inlined: to double each time fills any memory
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
        if any(on_disk(t) for t in (*proto.graph.initializer, *_inner_tensors(proto))):
            raise ModelError("the weights are not in the model", hint="Give the model's path.")
    else:
        proto, data_files = _read(Path(source))
    if not proto.graph.node:
        raise ModelError(
            "not an ONNX model, or one without a node",
            f"{source}" if not isinstance(source, onnx.ModelProto) else "",
            "Check the path, or export the model again.",
        )
    if proto.functions:
        proto = _inlined(proto)
    sparse = densify(proto)
    _check_names(proto)
    check_nodes(proto)
    proto = _sorted(proto)
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    notes = [
        f"{counted(len(sparse), 'sparse initialiser')} made dense, first {name!r}"
        for name in sparse[:1]
    ]
    try:
        skeleton = without(proto, ("initializer",))
    except UnicodeDecodeError as error:
        raise ModelError(
            "a text in the model is not UTF-8",
            f"{error.reason}",
            "The file is damaged; export it again.",
        ) from error
    model = Model(skeleton, tensors, data_files, tuple(notes))
    _check(model)
    return model


def through(path: str | Path) -> Path:
    """What a path stands for: of a link its target, so that renaming does not replace the link."""
    return Path(os.path.realpath(path)) if Path(path).is_symlink() else Path(path)


def save(model: Model, path: str | Path) -> None:
    """Write ``model`` to ``path``: beside it first, then renamed, so no half-written file remains.

    Models above the protobuf limit, or that came with external data, get ``<path>.data`` beside.
    """
    path = through(path)
    external = bool(model.data_files) or model.weight_bytes > PROTOBUF_LIMIT
    try:
        if external and shutil.disk_usage(path.parent).free < model.weight_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            data = path.with_name(path.name + ".data")
            beside, beside_data = Path(folder) / path.name, Path(folder) / data.name
            if external:
                _write_beside(model, beside, beside_data)
            else:
                beside.write_bytes(model.assemble().SerializeToString())
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


def _write_beside(model: Model, path: Path, data: Path) -> None:
    """The graph to ``path``, its larger weights to ``data``, one after the other."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.closed.skeleton)
    at = 0
    with data.open("wb") as file:
        for tensor in model.initializers.values():
            size = size_of(tensor) if on_disk(tensor) else len(tensor.raw_data)
            if size < SMALLEST_OUTSIDE:
                proto.graph.initializer.append(in_memory(tensor))
                continue
            gap = -at % ALIGNMENT
            file.write(bytes(gap))
            proto.graph.initializer.append(pointed(tensor, data.name, at + gap, size))
            for part in raw_chunks(tensor):
                file.write(part)
            at += gap + size
    path.write_bytes(proto.SerializeToString())
    if not at:
        data.unlink()


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
        cause = f"cannot read the model: {error.strerror}"
        raise UsageError(cause, str(path), "Check the file and who may read it.") from error
    except (DecodeError, ValueError) as error:
        raise ModelError(
            "not an ONNX file, or a truncated one",
            str(path),
            "Export or download it again; `onnx.load` must read it.",
        ) from error
    files: dict[Path, None] = {}
    inner = [(tensor, False) for tensor in _inner_tensors(proto)]
    for tensor, may_stay in (*((t, True) for t in proto.graph.initializer), *inner):
        if not on_disk(tensor):
            continue
        file, offset, size = _data_of(tensor, path)
        files[file] = None
        if may_stay and size >= LAZY and tensor.data_type in WHOLE_BYTES:
            tensor.CopyFrom(pointed(tensor, file, offset))
            continue
        with file.open("rb") as opened:
            opened.seek(offset)
            tensor.raw_data = opened.read(size)
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


def _inner_tensors(proto: onnx.ModelProto) -> list[onnx.TensorProto]:
    """Every tensor in the model but the graph's initialisers, wherever it stands."""
    found = [t for s in proto.graph.sparse_initializer for t in (s.values, s.indices)]
    graphs: list[onnx.GraphProto] = []
    nodes = [*proto.graph.node, *(node for f in proto.functions for node in f.node)]
    while graphs or nodes:
        if not nodes:
            graph = graphs.pop()
            found += graph.initializer
            found += [t for s in graph.sparse_initializer for t in (s.values, s.indices)]
            nodes += graph.node
            continue
        node = nodes.pop()
        graphs += bodies(node)
        for attribute in node.attribute:
            if attribute.HasField("t"):
                found.append(attribute.t)
            found += attribute.tensors
    return found


def _data_of(tensor: onnx.TensorProto, model: Path) -> tuple[Path, int, int]:
    """The file that holds a tensor's bytes, where they begin, and how many they are.

    Raises ``ModelError`` unless they lie whole in a plain file in the model's own folder: a model
    may not read other files of the machine.
    """
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    shown = repr(location[:200])
    where = f"tensor {tensor.name[:200]!r} of {model}"
    flavours = PurePosixPath(location), PureWindowsPath(location)
    leaves = not location or any(p.is_absolute() or p.drive or ".." in p.parts for p in flavours)
    folders = model.parent.resolve(), model.resolve().parent
    try:
        file = (model.parent / location).resolve(strict=True)
        inside = any(file.is_relative_to(folder) for folder in folders)
        plain, stored = file.is_file(), file.stat().st_size
    except (OSError, ValueError) as error:
        if not leaves:
            raise ModelError(
                f"the external data file {shown} is missing or unreadable",
                where,
                "Keep the data file beside the model, under the name that the model gives it.",
            ) from error
        inside = False
    if leaves or not inside:
        raise ModelError(
            f"the external data file {shown} lies outside the model's folder",
            where,
            "A model may read nothing but its own folder: put the data file itself beside it.",
        )
    size = (math.prod(tensor.dims) * ELEMENT_BITS.get(tensor.data_type, 0) + 7) // 8
    numbers = [entries.get(key) or default for key, default in (("offset", "0"), ("length", size))]
    offset, length = (int(n) if str(n).isdecimal() else -1 for n in numbers)
    fits = min(tensor.dims, default=1) >= 0 and offset >= 0 and length == size
    if not plain or not fits or offset + size > stored:
        raise ModelError(
            f"the external data file {shown} does not hold what the model says",
            where,
            f"It should hold {size} bytes from {numbers[0][:20]} on; it has {stored} in all.",
        )
    return file, offset, size


def _inlined(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Calls of local functions replaced by what they do, in bodies too; functions of another opset
    are converted, and stay calls (to be pinned) where ONNX cannot convert them."""
    from google.protobuf.message import DecodeError

    _check_inlined_size(proto)
    _one_version(proto)
    try:
        try:
            return inliner.inline_local_functions(proto, convert_version=True)
        except RuntimeError:
            return inliner.inline_local_functions(proto)
    except (onnx.checker.ValidationError, DecodeError, RuntimeError, ValueError) as error:
        raise ModelError(
            f"the model's local functions are invalid: {' '.join(str(error).split())[:300]}",
            hint="A function may call others, but neither itself nor what is not there.",
        ) from error


def _one_version(proto: onnx.ModelProto) -> None:
    """Domains that hold local functions alone have no versions to convert between: whatever some
    function states is taken for the model's, as ONNX Runtime does."""
    versions = {entry.domain: entry.version for entry in proto.opset_import}
    local = {function.domain for function in proto.functions} - {"", "ai.onnx"}
    for function in proto.functions:
        for entry in function.opset_import:
            if entry.domain in local and entry.domain in versions:
                entry.version = versions[entry.domain]


def _check_inlined_size(proto: onnx.ModelProto) -> None:
    """Functions that call others several times each make a graph of any size from a short file."""
    functions = {(f.domain, f.name): _with_inner(f.node) for f in proto.functions}
    calls = {
        key: {(n.domain, n.op_type) for n in nodes} & functions.keys()
        for key, nodes in functions.items()
    }
    try:
        order = list(TopologicalSorter(calls).static_order())
    except CycleError:
        return  # ONNX says which
    sizes: dict[tuple[str, str], int] = {}

    def size(nodes: list[onnx.NodeProto]) -> int:
        return min(TOO_MANY, sum(sizes.get((n.domain, n.op_type), 1) for n in nodes))

    for key in order:
        sizes[key] = size(functions[key])
    if size(_with_inner(proto.graph.node)) == TOO_MANY:
        raise ModelError(
            f"the model's local functions stand for {TOO_MANY:,} operators or more",
            hint="Functions that call others again and again make this; export the model flatter.",
        )


def _with_inner(nodes: Iterable[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Nodes, and those of their bodies."""
    found: list[onnx.NodeProto] = []
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        found.append(node)
        waiting += [inner for body in bodies(node) for inner in body.node]
    return found


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
        raise ModelError(
            "the graph has a cycle",
            f"node {cycle!r}",
            "Something renamed tensors so that a node reads what comes after it: undo that, or "
            "export the model again.",
        ) from error
    ordered = [onnx.NodeProto.FromString(nodes[i].SerializeToString()) for i in order]
    del proto.graph.node[:]
    proto.graph.node.extend(ordered)
    return proto


def _check_names(proto: onnx.ModelProto) -> None:
    """Every tensor has one origin, and there is something to compute."""
    if not proto.graph.output:
        raise ModelError("the graph has no outputs", hint="Nothing it computes can be used.")
    versions = {entry.domain: entry.version for entry in proto.opset_import}
    stated = {(entry.domain, entry.version) for entry in proto.opset_import}
    if len(stated) > len(versions):
        raise ModelError("the model declares two opsets of one domain", hint="Export it again.")
    if not 0 < proto.ir_version < LARGEST_VERSION:
        raise ModelError(
            f"the model declares no usable IR version: {proto.ir_version}",
            hint="Export it again, or set `model.ir_version` as onnx.helper.make_model does.",
        )
    stated_versions = [f"{domain or 'ai.onnx'} {number}" for domain, number in versions.items()]
    if min(versions.values(), default=0) < 1 or max(versions.values()) > LARGEST_VERSION:
        raise ModelError(
            f"the model declares no usable opset: {listed(stated_versions, 'none')}",
            hint="Export it again; every operator's domain needs an opset version from 1 on.",
        )
    stored: set[str] = set()
    for tensor in proto.graph.initializer:
        if tensor.name in stored:
            raise ModelError(f"the initialiser {tensor.name!r} is stored twice", hint=TWICE)
        stored.add(tensor.name)
    written = stored | {value.name for value in proto.graph.input}
    for node in proto.graph.node:
        for name in filter(None, node.output):
            if name in written:
                where = f"node {label(node)!r}"
                raise ModelError(f"tensor {name!r} is written twice", where, TWICE)
            written.add(name)


def _check(model: Model) -> None:
    """What every later stage relies on: defined inputs and outputs, sound weights."""
    defined = {value.name for value in model.graph.input} | set(model.initializers)
    for node in model.nodes:
        for name in (*(n for n in node.input if n), *captured(node)):
            if name not in defined:
                where = f"node {label(node)!r}"
                raise ModelError(f"input {name!r} is produced by nothing", where, MISSING)
        defined.update(node.output)
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                check_tensor(attribute.t, label(node))
    for value in model.outputs:
        if value.name not in defined:
            raise ModelError(
                f"the graph output {value.name!r} is produced by nothing", hint=MISSING
            )
    for name, tensor in model.initializers.items():
        check_tensor(tensor, name)
