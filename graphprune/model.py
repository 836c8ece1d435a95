"""An ONNX model with look-ups by name; never edited in place: passes build new ones."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from graphprune import external
from graphprune.control import bodies, close_bodies, is_open, open_bodies
from graphprune.errors import UncomputableError
from graphprune.external import in_memory, on_disk, raw_chunks

Array = NDArray[Any]

PROTOBUF_LIMIT = 2**31 - 2**20  # a little below 2 GiB: larger models need external data
ELEMENT_BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32} | {
    13: 64,
    14: 64,
    15: 128,
    16: 16,
    17: 8,
    18: 8,
    19: 8,
    20: 8,
    21: 4,
    22: 4,
    23: 4,
    24: 8,
    25: 2,
    26: 2,
}  # by TensorProto.DataType
DRAWN = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
RANDOM_OPS = DRAWN | {
    "Bernoulli",
    "Multinomial",
}
# What ONNX's reference evaluator raises where it lacks an operator or its input is out of range.
NOT_COMPUTED = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)
QUANTISERS = {"QuantizeLinear", "DequantizeLinear"}
QUANTISER_OPSET = 21  # with 4 and 16 bits and blocks


def computable(node: onnx.NodeProto) -> bool:
    """Whether the node alone says what it computes: no body, nothing drawn at random."""
    return not (is_open(node) or bodies(node) or node.op_type in RANDOM_OPS)


@dataclass(frozen=True)
class Model:
    """An ONNX model (local functions inlined, nodes sorted) with look-ups by tensor name.

    Weights stand beside the graph, so that models derived from one another share them.
    """

    skeleton: onnx.ModelProto  # everything but the initialisers
    initializers: Mapping[str, onnx.TensorProto]
    data_files: tuple[Path, ...] = ()  # where the source kept its weights, beside itself
    notes: tuple[str, ...] = ()  # what reading it has changed

    @property
    def graph(self) -> onnx.GraphProto:
        return self.skeleton.graph

    def assemble(self) -> onnx.ModelProto:
        """The whole model as one proto: a copy, weights included."""
        proto = onnx.ModelProto()
        proto.CopyFrom(self.closed.skeleton)
        for tensor in self.initializers.values():
            proto.graph.initializer.append(in_memory(tensor))
        return proto

    @cached_property
    def opened(self) -> Model:
        """The same with the bodies of control flow laid open (see ``graphprune.control``)."""
        taken = {value.name for value in (*self.graph.input, *self.graph.output)}
        taken |= {t.values.name for t in self.graph.sparse_initializer} | set(self.initializers)
        taken |= {name for node in self.nodes for name in (*node.input, *node.output)}
        taken |= {name for node in self.nodes for name in captured(node)}
        found = open_bodies(self.nodes, taken, self.opsets.get("", 1))
        if found is None:
            return self
        tensors = [*self.initializers.values(), *found.initializers]
        return self.with_graph(found.nodes, tensors, [*self.graph.value_info, *found.infos])

    @cached_property
    def closed(self) -> Model:
        """The same with all bodies in their place: what ONNX Runtime can run."""
        if not any(is_open(node) for node in self.nodes):
            return self
        skeleton = without(self.skeleton, ("node", "value_info", "initializer"))
        nodes, infos = close_bodies(self.nodes, self.graph.value_info)
        skeleton.graph.node.extend(nodes)
        skeleton.graph.value_info.extend(infos)
        return Model(skeleton, self.initializers, self.data_files)

    @cached_property
    def nodes(self) -> list[onnx.NodeProto]:
        return list(self.graph.node)

    @cached_property
    def producer(self) -> dict[str, int]:
        """Tensor name → index of the node that writes it."""
        return {name: i for i, node in enumerate(self.nodes) for name in node.output if name}

    @cached_property
    def consumers(self) -> dict[str, list[tuple[int, int]]]:
        """Tensor name → (node index, input index) of every read, captured reads of bodies as -1."""
        table: dict[str, list[tuple[int, int]]] = {}
        for i, node in enumerate(self.nodes):
            for j, name in enumerate(node.input):
                if name:
                    table.setdefault(name, []).append((i, j))
            for name in captured(node):
                table.setdefault(name, []).append((i, -1))
        return table

    @cached_property
    def inputs(self) -> list[onnx.ValueInfoProto]:
        """Graph inputs that a user feeds (old models list their initialisers too)."""
        return [value for value in self.graph.input if value.name not in self.initializers]

    @property
    def outputs(self) -> list[onnx.ValueInfoProto]:
        return list(self.graph.output)

    @cached_property
    def output_names(self) -> frozenset[str]:
        return frozenset(value.name for value in self.graph.output)

    def read_once(self, name: str) -> bool:
        """Whether one input of one node reads this tensor, and nothing else does."""
        reads = self.consumers.get(name, ())
        return len(reads) == 1 and reads[0][1] >= 0 and name not in self.output_names

    @cached_property
    def opsets(self) -> dict[str, int]:
        return {
            "" if entry.domain == "ai.onnx" else entry.domain: entry.version
            for entry in self.skeleton.opset_import
        }

    @cached_property
    def constant_names(self) -> frozenset[str]:
        """Tensors whose value does not depend on any graph input."""
        known = set(self.initializers)
        for node in self.nodes:
            fixed = all(name in known for name in node.input if name)
            if is_open(node) or bodies(node):
                continue
            if fixed and node.op_type not in RANDOM_OPS:
                known.update(name for name in node.output if name)
        return frozenset(known)

    def array(self, name: str, known: dict[str, Array] | None = None) -> Array:
        """The value of a constant tensor: an initialiser, or computed from initialisers.

        ``known`` are values that need not be computed; those that had to be are added.
        """
        if name in self.initializers:
            return external.array(self.initializers[name])
        values = {} if known is None else known
        if name in values:
            return values[name]
        needed, waiting = {name}, [name]
        while waiting:
            node = self.nodes[self.producer[waiting.pop()]]
            sources = {n for n in node.input if n and n not in self.initializers} - needed
            sources -= values.keys()
            needed |= sources
            waiting += sorted(sources)
        for index in sorted({self.producer[n] for n in needed}):
            values |= self._evaluated(self.nodes[index], needed, values)
        return values[name]

    def _evaluated(
        self, node: onnx.NodeProto, wanted: set[str], known: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Those of a node's outputs that are wanted, from initialisers and what is known."""
        from onnx.reference import ReferenceEvaluator

        node = as_standard(node)
        feeds = {n: known[n] if n in known else self.array(n) for n in node.input if n}
        names = [n for n in node.output if n in wanted]
        graph = helper.make_graph(
            [node],
            "constant",
            [helper.make_value_info(source, onnx.TypeProto()) for source in feeds],
            [helper.make_value_info(n, onnx.TypeProto()) for n in names],
        )
        imports = self.skeleton.opset_import
        if node.op_type in QUANTISERS:  # newer opsets only widen the types
            imports = [helper.make_opsetid("", max(QUANTISER_OPSET, self.opsets.get("", 1)))]
        lone = helper.make_model(graph, opset_imports=imports)
        try:
            with np.errstate(all="ignore"):
                results: Any = ReferenceEvaluator(lone).run(names, feeds)
        except NOT_COMPUTED as error:
            said = " ".join(str(error).split())[:200]
            raise UncomputableError(
                f"a constant cannot be computed: {said}", f"node {label(node)!r}"[:300]
            ) from error
        if any(isinstance(result, list) for result in results):
            raise UncomputableError("a constant is a sequence", f"node {label(node)!r}"[:300])
        return {n: np.asarray(result) for n, result in zip(names, results, strict=True)}

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of all initialisers as they are stored."""
        return sum(tensor_bytes(tensor) for tensor in self.initializers.values())

    @property
    def stored_bytes(self) -> int:
        """Bytes of the model as ``save`` writes it into one file."""
        graph = int(self.graph.ByteSize())
        return int(self.skeleton.ByteSize()) - _field(graph) + _field(graph + self.weight_bytes)

    @cached_property
    def sha256(self) -> str:
        """Content hash: the graph, then every initialiser, wherever its data was stored."""
        digest = hashlib.sha256()
        digest.update(self.skeleton.SerializeToString(deterministic=True))
        for name, tensor in self.initializers.items():
            digest.update(f"{name}:{tensor.data_type}:{list(tensor.dims)}".encode())
            for part in _payload(tensor):
                digest.update(part)
        return digest.hexdigest()

    def with_graph(
        self,
        nodes: Iterable[onnx.NodeProto],
        initializers: Iterable[onnx.TensorProto],
        value_info: Iterable[onnx.ValueInfoProto] | None = None,
    ) -> Model:
        """A new model with other nodes and initialisers, less what reaches no output.

        Everything else is carried over; initialisers are shared, not copied.
        """
        kept, needed = _reaching_outputs(list(nodes), self.output_names)
        tensors = {t.name: t for t in initializers if t.name in needed}
        skeleton = without(self.skeleton, ("node", "value_info", "input", "initializer"))
        skeleton.graph.node.extend(kept)
        skeleton.graph.value_info.extend(
            self.graph.value_info if value_info is None else value_info
        )
        for value in self.graph.input:  # old models list initialisers here too
            if value.name in self.initializers and value.name not in tensors:
                continue
            skeleton.graph.input.append(value)
            if value.name in tensors:
                _set_dims(skeleton.graph.input[-1], tensors[value.name].dims)
        return Model(skeleton, tensors, self.data_files)


def _reaching_outputs(
    nodes: list[onnx.NodeProto], outputs: Iterable[str]
) -> tuple[list[onnx.NodeProto], set[str]]:
    """Nodes that some output needs, in order, and every tensor name they need."""
    needed = set(outputs)
    kept: list[onnx.NodeProto] = []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(name for name in node.input if name)
            needed.update(captured(node))
    return kept[::-1], needed


def tensor_bytes(tensor: onnx.TensorProto) -> int:
    """Bytes of an initialiser in the file, its tag and length included; raw data is not copied."""
    header = onnx.TensorProto()
    raw = tensor.HasField("raw_data") or on_disk(tensor)
    for field, value in tensor.ListFields() if not raw else ():
        _assign(header, field.name, value)
    size = int(header.ByteSize())
    if raw:
        header.dims.extend(tensor.dims)
        header.data_type, header.name = tensor.data_type, tensor.name
        header.doc_string = tensor.doc_string
        values = int(np.prod(tensor.dims, dtype=np.int64))
        data = (values * ELEMENT_BITS.get(tensor.data_type, 32) + 7) // 8
        unset = 0 if tensor.doc_string else 2  # an empty doc string is stored only where it is set
        size = int(header.ByteSize()) - unset * (not tensor.HasField("doc_string")) + _field(data)
    return _field(size)


def _field(length: int) -> int:
    """Bytes of a length-delimited field: tag, length as a varint, content."""
    return 1 + max(1, (length.bit_length() + 6) // 7) + length


def _payload(tensor: onnx.TensorProto) -> Iterable[bytes | memoryview]:
    if tensor.HasField("raw_data") or on_disk(tensor):
        return raw_chunks(tensor)
    return [bytes(tensor.SerializeToString(deterministic=True))]


def label(node: onnx.NodeProto) -> str:
    """How a node is named to a person: its name, else its first output."""
    return node.name or next((name for name in node.output if name), node.op_type)


def captured(node: onnx.NodeProto) -> set[str]:
    """Outer tensors that the node's bodies read."""
    names: set[str] = set()
    for body in bodies(node):
        local = {v.name for v in body.input} | {t.name for t in body.initializer}
        local |= {t.values.name for t in body.sparse_initializer}
        for inner in body.node:
            names.update(n for n in inner.input if n and n not in local)
            names.update(n for n in captured(inner) if n not in local)
            local.update(inner.output)
        names.update(v.name for v in body.output if v.name not in local)
    return names


def as_standard(node: onnx.NodeProto) -> onnx.NodeProto:
    """ONNX Runtime's own quantisers as ONNX's, which took them over; other nodes as they are."""
    if node.domain != "com.microsoft" or node.op_type not in QUANTISERS:
        return node
    new = onnx.NodeProto()
    new.CopyFrom(node)
    new.domain = ""
    return new


def set_initializer(name: str, value: Array) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(value, order="C"), name)


def without(proto: onnx.ModelProto, left_out: Sequence[str]) -> onnx.ModelProto:
    """A copy without some fields of the graph."""
    copy = onnx.ModelProto()
    for field, value in proto.ListFields():
        if field.name != "graph":
            _assign(copy, field.name, value)
    for field, value in proto.graph.ListFields():
        if field.name not in left_out:
            _assign(copy.graph, field.name, value)
    return copy


def _assign(message: Any, name: str, value: Any) -> None:
    target = getattr(message, name)
    if hasattr(target, "extend"):
        target.extend(value)
    elif hasattr(target, "CopyFrom"):
        target.CopyFrom(value)
    else:
        setattr(message, name, value)


def _set_dims(value: onnx.ValueInfoProto, dims: Sequence[int]) -> None:
    shape = value.type.tensor_type.shape
    del shape.dim[:]
    for size in dims:
        shape.dim.add().dim_value = size
