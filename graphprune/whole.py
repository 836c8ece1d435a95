"""Copies of everything: a Slice, Gather or Split that takes all there is left, in its order, once
what it left out has gone from a model."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from graphprune.control import regions
from graphprune.coupling import Coupling, Mask
from graphprune.model import Model, captured, set_initializer
from graphprune.selectors import is_selector


def without_copies(model: Model, cut: Model, coupling: Coupling, alive: Mask) -> Model:
    """``cut`` is ``model`` with the slots of ``alive`` alone: without such copies, and without
    pieces of a Split that have nothing left. Names of the interface stay."""
    fixed = model.output_names | {name for node in cut.nodes for name in captured(node)}
    alias: dict[str, str] = {}  # name → the one that it becomes
    order: list[onnx.NodeProto] = []
    sizes: list[onnx.TensorProto] = []
    for old, inside in zip(cut.nodes, regions(cut.nodes), strict=True):
        node = onnx.NodeProto()
        node.CopyFrom(old)
        node.input[:] = [alias.get(name, name) for name in node.input]
        if node.op_type == "Split" and not node.domain:
            sizes += _without_nothing(cut, node)
        copies = not inside and _is_copy(cut, node, old.input[0], coupling, alive)
        if copies and node.output[0] not in fixed:
            alias[node.output[0]] = node.input[0]
        else:
            order.append(node)
    if not alias and not sizes:
        return cut
    written = {name for node in order for name in node.output}
    infos = [info for info in cut.graph.value_info if info.name in written]
    return cut.with_graph(order, [*cut.initializers.values(), *sizes], infos)


def _is_copy(
    cut: Model, node: onnx.NodeProto, source: str, coupling: Coupling, alive: Mask
) -> bool:
    """Whether the node's one output is all of ``source``, its first input, which has lost slots on
    every axis that some were taken of: sizes that an input may choose are not counted on."""
    known = node.op_type in ("Slice", "Gather", "Split") and not node.domain
    tensors = coupling.relations.slots.tensors
    x, y = tensors.get(source), tensors.get(node.output[0])
    if not known or is_selector(node) or len(node.output) != 1 or x is None or y is None:
        return False
    if x.rank != y.rank:
        return False
    pairs = [(alive[a.slots], alive[b.slots]) for a, b in zip(x, y, strict=True)]
    taken = [a for a, b in pairs if len(a) != len(b)]
    if any(a.sum() != b.sum() for a, b in pairs) or any(a.all() for a in taken) or not taken:
        return False
    return node.op_type == "Split" or _from_the_start(cut, node, len(taken))


def _from_the_start(cut: Model, node: onnx.NodeProto, axes: int) -> bool:
    """Whether a Slice names just so many axes, or a Gather takes places in ascending order."""
    starts = next((a.ints for a in node.attribute if a.name == "starts"), None)
    if starts is None and node.input[1] not in cut.constant_names:
        return False
    given = cut.array(node.input[1]) if starts is None else np.array(starts)
    if node.op_type == "Slice":
        return given.size == axes
    return bool(given.ndim == 1 and np.array_equal(given, np.arange(len(given))))


def _without_nothing(cut: Model, node: onnx.NodeProto) -> list[onnx.TensorProto]:
    """Drop pieces of nothing that nobody reads from a Split, in place; the new sizes, where it
    reads them."""
    said = next((a for a in node.attribute if a.name == "split"), None)
    given = node.input[1] if len(node.input) > 1 else ""
    if said is None and given not in cut.initializers:
        return []
    sizes = list(said.ints) if said is not None else cut.array(given).reshape(-1).tolist()
    read = [name in cut.consumers or name in cut.output_names for name in node.output]
    kept = [i for i, size in enumerate(sizes) if size or read[i]]
    if len(kept) == len(sizes) or len(sizes) != len(node.output):
        return []
    node.output[:] = [node.output[i] for i in kept]
    left = [sizes[i] for i in kept]
    if said is not None:
        node.attribute.remove(said)
        node.attribute.append(helper.make_attribute("split", left))
        return []
    name = f"{given}/graphprune_left_{'x'.join(map(str, left))}"
    node.input[1] = name
    return [set_initializer(name, np.array(left, np.int64))]
