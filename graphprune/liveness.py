"""When each activation's memory is in use: from the node that writes it to the last that reads it.

Counted as ONNX Runtime plans it, in the order of the nodes:

1. A graph input is the caller's: in use all the time, and never written over.
2. A graph output has memory of its own, from the node that writes it to the end.
3. A view (Reshape, Squeeze, Unsqueeze, Flatten, Identity, Dropout) is its input's memory.
4. A pointwise operator, Softmax, and a normalisation by stored statistics write over an input of
   the same number of bytes that nothing reads any more (fusion makes it so for most of them).
5. A convolution whose result is only added (after a normalisation by stored statistics, or none)
   to something that is there and ends with the sum adds to it in place: one fused operator.
6. Every other output has memory of its own. Weights, and what follows from weights alone, count
   nowhere; nor do a kernel's own scratch space, padding to whole vectors, and copies into another
   layout. Both branches of an If, and a body beside what it is called for, count together.

Residual networks take that much in ONNX Runtime, to the byte (its profiler, arena without pattern).
It also keeps freed memory for a later tensor of just the same shape: a transformer's repeat, so it
holds more than is in use.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from graphprune.control import ENTER, is_open
from graphprune.model import ELEMENT_BITS, Model, captured
from graphprune.relations import Relations, Reuse
from graphprune.shapes import Shapes

CONVOLUTIONS = ("Conv", "FusedConv")
Values = NDArray[np.float64]
Steps = NDArray[np.int64]


@dataclass(frozen=True)
class Buffers:
    """Pieces of memory, each named by the tensor first written there, and when they are in use."""

    tensor: tuple[str, ...]
    element_bytes: Values  # [buffers]
    first: Steps  # [buffers], the step that writes it
    last: Steps  # [buffers], the last step that needs it
    steps: int  # one for each node, and one before them for the inputs

    def live(self, sizes: Values) -> Values:
        """Bytes in use at every step [steps], of buffers of these sizes [buffers]."""
        begin = np.bincount(self.first, sizes, minlength=self.steps + 1)
        end = np.bincount(self.last + 1, sizes, minlength=self.steps + 1)
        return np.asarray(np.cumsum(begin - end)[:-1])

    def at_any(self, steps: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which buffers are in use [buffers] at any of these steps [steps]."""
        before = np.concatenate([[0], np.cumsum(steps)])
        return np.asarray(before[self.last + 1] > before[self.first])

    @property
    def fullest(self) -> Steps:
        """Steps at which something begins, and something ends before anything else begins: wherever
        sizes may go, one of these holds most, since what is in use at another also is at one."""
        begins, ends = np.unique(self.first), np.unique(self.last)
        next_end = ends[np.searchsorted(ends, begins)]
        next_begin = np.append(begins[1:], self.steps)
        return np.asarray(begins[next_end < next_begin])


def buffers(model: Model, shapes: Shapes, relations: Relations) -> Buffers:
    """Every activation's buffer. Tensors of unknown shape are left out."""
    plan = _Plan(model, shapes, relations)
    for value in model.inputs:
        if plan.counts(value.name):
            plan.open(value.name, 0, held=True)
    for index, node in enumerate(model.nodes):
        values = node.output[1:] if node.op_type == ENTER and is_open(node) else node.output
        written = [name for name in values if name and plan.counts(name)]
        for name in written:
            source = plan.source(index, name) if name == node.output[0] else None
            if source is None:
                plan.open(name, index + 1, held=name in model.output_names)
            else:
                plan.share(name, source)
        plan.close([*node.input, *captured(node)], written, index + 1)
    width = np.array([plan.element_bytes(name) for name in plan.tensor], dtype=np.float64)
    first, last = np.array(plan.first, np.int64), np.array(plan.last, np.int64)
    return Buffers(tuple(plan.tensor), width, first, last, len(model.nodes) + 1)


class _Plan:
    """The buffers as the walk over the nodes goes on."""

    def __init__(self, model: Model, shapes: Shapes, relations: Relations) -> None:
        self.model, self.shapes, self.tensors = model, shapes, relations.slots.tensors
        self.reuses: dict[int, list[Reuse]] = {}
        for reuse in relations.reuses:
            self.reuses.setdefault(reuse.node, []).append(reuse)
        self.own: dict[str, int] = {}  # tensor → its buffer
        self.unread: Counter[int] = Counter()  # buffer → reads still to come
        self.normalised: dict[str, int] = {}  # a convolution's result → what it is added to
        self.tensor: list[str] = []
        self.first: list[int] = []
        self.last: list[int] = []

    def counts(self, name: str) -> bool:
        known = name in self.tensors and self.shapes.dtype.get(name) in ELEMENT_BITS
        return known and name not in self.model.constant_names

    def element_bytes(self, name: str) -> float:
        return ELEMENT_BITS[self.shapes.dtype[name]] / 8

    def open(self, name: str, step: int, held: bool) -> None:
        """A buffer of its own; ``held`` to the end, which counts as one more read."""
        self.share(name, len(self.tensor))
        self.unread[self.own[name]] += held
        self.tensor.append(name)
        self.first.append(step)
        self.last.append(len(self.model.nodes) if held else step)

    def share(self, name: str, buffer: int) -> None:
        self.own[name] = buffer
        self.unread[buffer] += len(self.model.consumers.get(name, ()))

    def source(self, index: int, name: str) -> int | None:
        """The buffer that the node may write ``name`` to, if there is one."""
        if name in self.model.output_names:
            return None
        if name in self.normalised:
            return self.normalised[name]
        read = [self.own.get(source, -1) for source in self.model.nodes[index].input]
        for reuse in self.reuses.get(index, ()):
            source, buffer = self.model.nodes[index].input[reuse.input], read[reuse.input]
            if buffer < 0:
                continue
            if reuse.view:
                return buffer
            fits = self.tensors[source].shape == self.tensors[name].shape
            fits &= self.element_bytes(source) == self.element_bytes(name)
            if fits and self.unread[buffer] == read.count(buffer):
                return buffer
        return self.summed(index, name)

    def summed(self, index: int, name: str) -> int | None:
        """Case 5: the buffer of what the convolution's result is added to."""
        if self.model.nodes[index].op_type not in CONVOLUTIONS:
            return None
        reader, result = self.only_reader(name), name
        if reader is not None and reader.op_type == "BatchNormalization":
            result = reader.output[0]
            reader = self.only_reader(result)
        if reader is None or reader.op_type != "Add":
            return None
        others = [other for other in reader.input if other != result]
        if len(others) != 1 or self.own.get(others[0], -1) < 0:
            return None
        fits = self.tensors[others[0]].shape == self.tensors[name].shape
        buffer = self.own[others[0]]
        if not fits or self.unread[buffer] != 1:
            return None
        self.normalised[result] = buffer
        return buffer

    def only_reader(self, name: str) -> onnx.NodeProto | None:
        """The node that reads it, where that is one and it is no output."""
        found = self.model.consumers.get(name, [])
        if len(found) != 1 or name in self.model.output_names:
            return None
        return self.model.nodes[found[0][0]]

    def close(self, read: list[str], written: list[str], step: int) -> None:
        """A node has run: what it read it needs no more."""
        for name in read:
            if name in self.own:
                self.unread[self.own[name]] -= 1
        for name in (*read, *written):
            if name in self.own:
                buffer = self.own[name]
                self.last[buffer] = max(self.last[buffer], step)
