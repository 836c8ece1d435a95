"""Activations of a model on the calibration samples, moved forward segment by segment.

Every node runs once for every chunk of samples, however many operators ask for its inputs: the
activations between what has run and what has not are kept, so the cost is linear in the depth.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from graphprune.model import Array, Model, captured
from graphprune.runtime import Feeds, run_session, session

Chunks = list[Array]


class Frontier:
    """One model's activations, one array for each chunk of samples, for each tensor still needed.

    Beyond ``memory`` bytes, arrays are written to a temporary folder and mapped from there.
    """

    def __init__(
        self,
        model: Model,
        dtypes: Mapping[str, int],
        feeds: Sequence[Feeds],
        memory: float = 4e9,
        threads: int = 0,
    ) -> None:
        self.model = model
        self.weights = dict(model.initializers)  # a caller may change those of nodes yet to run
        self.dtypes = dtypes
        self.memory = memory
        self.threads = threads
        self.done: set[str] = set()  # outputs of nodes that have run
        self.held: dict[str, Chunks] = {
            value.name: [np.asarray(feed[value.name]) for feed in feeds] for value in model.inputs
        }
        self.chunks = len(feeds)
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._files = 0

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
                del self.held[name]

    def _read_later(self, name: str) -> bool:
        return any(
            self.model.nodes[i].output[0] not in self.done
            for i, _ in self.model.consumers.get(name, ())
        )

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
        inputs = sorted(name for name in reads if name in self.held)
        segment = _segment(model, self.weights, nodes, inputs, outputs, self.dtypes)
        runner = session(segment, self.threads)
        results: dict[str, Chunks] = {name: [] for name in outputs}
        for chunk in range(self.chunks):
            feeds = {name: self.held[name][chunk] for name in inputs}
            for name, array in zip(outputs, run_session(runner, feeds), strict=True):
                results[name].append(self._stored(array))
        self.held |= results

    def _stored(self, array: Array) -> Array:
        held = sum(a.nbytes for chunks in self.held.values() for a in chunks[:1]) * self.chunks
        if held + array.nbytes * self.chunks <= self.memory:
            return array
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="graphprune-")
        path = Path(self._folder.name) / f"{self._files}.npy"
        self._files += 1
        np.save(path, array)
        return np.asarray(np.load(path, mmap_mode="r"))


def _segment(
    model: Model,
    weights: Mapping[str, onnx.TensorProto],
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[str],
    outputs: Sequence[str],
    dtypes: Mapping[str, int],
) -> Model:
    """These nodes as a model of their own; shapes are left open."""
    reads = {name for node in nodes for name in (*node.input, *captured(node))}
    skeleton = onnx.ModelProto()
    skeleton.ir_version = model.skeleton.ir_version
    skeleton.opset_import.extend(model.skeleton.opset_import)
    skeleton.graph.name = "segment"
    skeleton.graph.node.extend(nodes)
    skeleton.graph.input.extend(_open_value(name, dtypes) for name in inputs)
    skeleton.graph.output.extend(_open_value(name, dtypes) for name in outputs)
    mine = {name: weights[name] for name in sorted(reads) if name in weights}
    return Model(skeleton, mine, model.data_files)


def _open_value(name: str, dtypes: Mapping[str, int]) -> onnx.ValueInfoProto:
    return helper.make_value_info(name, helper.make_tensor_type_proto(dtypes[name], None))
