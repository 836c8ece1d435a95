"""Activations of a model on the calibration samples, moved forward segment by segment.

Every node runs once for every chunk of samples, however many operators ask for its inputs: the
activations between what has run and what has not are kept, so the cost is linear in the depth.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper

from graphprune.interface import fitted
from graphprune.model import Array, Model, captured, set_initializer
from graphprune.runtime import Feeds, run_values, session

MOST_SIZES = 16  # numbers in a list of sizes
Value = Any  # an array; a list of arrays where the graph has a sequence


class Chunks(Sequence[Value]):
    """One tensor's values, chunk by chunk; some of them may lie on disk until they are read."""

    def __init__(self) -> None:
        self.values: list[Value | Path] = []

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: Any) -> Value:
        value = self.values[index]
        return np.load(value) if isinstance(value, Path) else value

    def release(self) -> int:
        """Let go of everything; the bytes of memory that frees."""
        for value in self.values:
            if isinstance(value, Path):
                value.unlink()
        return sum(_size(value) for value in self.values)


class Frontier:
    """One model's activations, chunk by chunk, for each tensor still needed.

    ``feeds`` may be those of the model that this one was cut from. Beyond ``memory`` bytes, arrays
    are written to a temporary folder and read from there.
    """

    def __init__(
        self, model: Model, feeds: Sequence[Feeds], memory: float = 4e9, threads: int = 0
    ) -> None:
        self.model = model
        self.weights = dict(model.initializers)  # a caller may change those of nodes yet to run
        self.memory = memory
        self.threads = threads
        self.chunks = len(feeds)
        self.done: set[str] = set()  # outputs of nodes that have run
        self.model_inputs = {value.name for value in model.inputs}
        self._bytes = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._files = 0
        self.held = {value.name: Chunks() for value in model.inputs}
        for index in range(self.chunks):
            feed = fitted(model, feeds[index])
            for name, chunks in self.held.items():
                chunks.values.append(self._stored(np.asarray(feed[name])))

    def __getitem__(self, name: str) -> Chunks:
        return self.held[name]

    def reaches(self, name: str, barred: set[int]) -> bool:
        """Whether ``name`` can be computed from here without running any of the barred nodes."""
        return not any(i in barred for i in self._needed([name]))

    def advance(self, wanted: Iterable[str]) -> None:
        """Compute ``wanted``; activations that nothing will read any more are let go."""
        kept = set(wanted)
        missing = sorted(name for name in kept if name not in self.held)
        if missing:
            self._run(self._needed(missing), missing)
        for name in [name for name in self.held if name not in kept]:
            if not self._read_later(name):
                self._bytes -= self.held.pop(name).release()

    def _read_later(self, name: str) -> bool:
        readers = (self.model.nodes[i] for i, _ in self.model.consumers.get(name, ()))
        return any(not any(o in self.done for o in node.output if o) for node in readers)

    def _needed(self, wanted: Sequence[str]) -> list[int]:
        """Nodes to run for ``wanted``, in order; constants are computed anew in each segment."""
        nodes: set[int] = set()
        waiting = [name for name in wanted if name not in self.held]
        while waiting:
            index = self.model.producer.get(waiting.pop())
            if index is None or index in nodes:
                continue
            nodes.add(index)
            node = self.model.nodes[index]
            waiting += [n for n in (*node.input, *captured(node)) if n and n not in self.held]
        return sorted(nodes)

    def _run(self, indices: list[int], wanted: list[str]) -> None:
        model = self.model
        nodes = [model.nodes[i] for i in indices]
        mine = {name for node in nodes for name in node.output if name}
        self.done |= {name for name in mine if name not in model.constant_names}
        outputs = list(dict.fromkeys(wanted))
        outputs += [
            name
            for name in sorted(mine - set(outputs))
            if name not in model.constant_names and self._read_later(name)
        ]
        reads = {n for node in nodes for n in (*node.input, *captured(node)) if n} - mine
        read = sorted(name for name in reads if name in self.held)
        fixed = {name: value for name in read if (value := self._size_read(name)) is not None}
        inputs = [name for name in read if name not in fixed]
        typed = [open_input(name, self.held[name][0]) for name in inputs]
        weights = self.weights | {n: set_initializer(n, value) for n, value in fixed.items()}
        part = segment(model, weights, nodes, typed, outputs)
        runner = session(part, self.threads, spinning=False)
        results = {name: Chunks() for name in outputs}
        for chunk in range(self.chunks):
            feeds = {name: self.held[name][chunk] for name in inputs}
            for name, value in zip(outputs, run_values(runner, feeds), strict=True):
                results[name].values.append(self._stored(value))
        self.held |= results

    def _size_read(self, name: str) -> Array | None:
        """A few whole numbers that are the same in every chunk: sizes, which ONNX Runtime's own
        inference of shapes may insist on."""
        chunks = self.held[name]
        first = chunks[0]
        if not isinstance(first, np.ndarray) or first.dtype.kind != "i" or first.size > MOST_SIZES:
            return None
        if first.ndim > 1 or name in self.model_inputs:
            return None
        same = all(np.array_equal(first, chunks[i]) for i in range(1, self.chunks))
        return first if same else None

    def _stored(self, value: Value) -> Value | Path:
        size = _size(value)
        if self._bytes + size <= self.memory or not isinstance(value, np.ndarray):
            self._bytes += size
            return value
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="graphprune-")
        path = Path(self._folder.name) / f"{self._files}.npy"
        self._files += 1
        np.save(path, value)
        return path


def _size(value: Value | Path) -> int:
    return value.nbytes if isinstance(value, np.ndarray) else 0


def segment(
    model: Model,
    weights: Mapping[str, onnx.TensorProto],
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[str],
) -> Model:
    """These nodes as a model of their own; shapes are left open, ONNX Runtime knows the types of
    outputs better than any inference before it."""
    reads = {name for node in nodes for name in (*node.input, *captured(node))}
    skeleton = onnx.ModelProto()
    skeleton.ir_version = model.skeleton.ir_version
    skeleton.opset_import.extend(model.skeleton.opset_import)
    skeleton.graph.name = "segment"
    skeleton.graph.node.extend(nodes)
    skeleton.graph.input.extend(inputs)
    skeleton.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    mine = {name: weights[name] for name in sorted(reads) if name in weights}
    return Model(skeleton, mine, model.data_files)


def open_input(name: str, value: Value, shape: Sequence[int] | None = None) -> onnx.ValueInfoProto:
    """A graph input of the type that the value has; its shape is left open unless given."""
    first = value[0] if isinstance(value, list) else value
    kind = helper.make_tensor_type_proto(helper.np_dtype_to_tensor_dtype(first.dtype), shape)
    if isinstance(value, list):
        kind = helper.make_sequence_type_proto(kind)
    return helper.make_value_info(name, kind)
