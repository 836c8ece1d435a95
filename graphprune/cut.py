"""Remove planned slots: slice constants, rewrite counts. Knows no operator by name but Shape."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper

from graphprune import external
from graphprune.bypass import PASS as BLOCKS
from graphprune.bypass import without_terms
from graphprune.coupling import Coupling, Mask
from graphprune.interface import narrowed, reshaped
from graphprune.model import Array, Model, label, set_initializer
from graphprune.pipeline import Change
from graphprune.relations import Count, Default
from graphprune.shapes import Shapes

PASS = "remove_channels"
TO_THE_END = 2**31 - 1  # a Slice's bound beyond any axis: -0 would mean its beginning


@dataclass
class _Edit:
    """What a cut collects before the new graph is assembled."""

    model: Model
    shapes: Shapes
    alive: Mask
    nodes: list[onnx.NodeProto]
    before: dict[int, list[onnx.NodeProto]]
    after: dict[int, list[onnx.NodeProto]]
    constants: dict[str, Array]
    changes: list[Change]

    def survivors(self, slots: Array) -> int:
        return int(self.alive[slots].sum())

    def changed(self, counts: list[Count]) -> list[tuple[int, int]]:
        """(element, new value) of the counts that lost slots; the others keep what they say."""
        return [
            (count.element or 0, (-left or TO_THE_END) if count.negative else left)
            for count in counts
            if (left := self.survivors(count.slots)) != len(count.slots)
        ]

    def constant(self, base: str, value: Array) -> str:
        """Name of a new constant; equal ones under one base are one."""
        text = "x".join(str(v) for v in value.reshape(-1).tolist())
        name = f"{base}/graphprune_{text if len(text) < 60 else len(self.constants)}"
        while name in self.constants and not np.array_equal(self.constants[name], value):
            name += "_"
        self.constants[name] = value
        return name


def cut(
    model: Model, shapes: Shapes, coupling: Coupling, alive: Mask
) -> tuple[Model, tuple[Change, ...]]:
    """The model with the slots of ``alive`` (bool per slot) alone, and what changed where."""
    relations = coupling.relations
    edit = _Edit(
        model,
        shapes,
        alive,
        [onnx.NodeProto.FromString(node.SerializeToString()) for node in model.nodes],
        defaultdict(list),
        defaultdict(list),
        {},
        [],
    )
    slots = relations.slots.tensors
    touched_tensors = {
        name for name, tensor in slots.items() if any(not alive[a.slots].all() for a in tensor)
    }
    touched = {
        i
        for i, node in enumerate(model.nodes)
        if touched_tensors.intersection(node.input) or touched_tensors.intersection(node.output)
    }
    initializers = _slice_initializers(edit, coupling, touched_tensors)
    grouped: dict[tuple[int, str | int], list[Count]] = defaultdict(list)
    for count in relations.counts:
        where = count.attr if count.attr is not None else count.input
        assert where is not None
        grouped[count.node, where].append(count)
    for (node, where), counts in grouped.items():
        if node in touched or any(not alive[c.slots].all() for c in counts):
            _write_counts(edit, node, where, counts)
    for default in relations.defaults:
        if not alive[default.slots].all():
            _spell_out(edit, default)
    for renumber in relations.renumbers:
        if not alive[renumber.slots].all():
            _renumber(edit, renumber.node, renumber.input, renumber.slots, coupling)
    for node in relations.shape_reads:
        if model.nodes[node].input[0] in touched_tensors:
            _keep_reading_original_shape(edit, node, coupling)
    for i in sorted(touched):
        entry = edit.nodes[i].metadata_props.add()
        entry.key, entry.value = "graphprune.pass", PASS
    order = [
        node
        for i in range(len(edit.nodes))
        for node in (*edit.before[i], edit.nodes[i], *edit.after[i])
    ]
    new = [set_initializer(name, value) for name, value in edit.constants.items()]
    branches = (*relations.branches, *relations.apart)
    gone = {b.tensor for b in branches if not alive[b.slots].all()}
    order, sums = without_terms(order, gone)
    info = _value_info(model, coupling, alive)
    result = narrowed(model.with_graph(order, [*initializers, *new], info), _kept(edit, coupling))
    if gone:  # nobody asks what happened to weights that are no longer there
        left = {name for name in model.initializers if name not in result.initializers}
        edit.changes[:] = [change for change in edit.changes if change.node not in left]
    edit.changes += [Change(BLOCKS, name, "block", terms, "", "planned") for name, terms in sums]
    for ends in reshaped(model, result):
        sizes = str(list(ends.before)), str(list(ends.after))
        edit.changes.append(Change(PASS, ends.name, f"{ends.side} shape", *sizes, "planned"))
    return result, tuple(edit.changes)


def _kept(edit: _Edit, coupling: Coupling) -> dict[str, dict[int, Mask]]:
    """Axes of graph inputs and outputs that lose slots, and which of these stay."""
    slots = coupling.relations.slots.tensors
    names = [value.name for value in (*edit.model.inputs, *edit.model.outputs)]
    ends = {
        name: {a.index: edit.alive[a.slots] for a in slots[name] if not edit.alive[a.slots].all()}
        for name in names
        if name in slots
    }
    return {name: axes for name, axes in ends.items() if axes}


def _slice_initializers(
    edit: _Edit, coupling: Coupling, touched: set[str]
) -> list[onnx.TensorProto]:
    result = []
    for tensor in edit.model.initializers.values():
        if tensor.name not in touched:
            result.append(tensor)
            continue
        axes = coupling.relations.slots.tensors[tensor.name]
        kept = {a.index: edit.alive[a.slots] for a in axes if not edit.alive[a.slots].all()}
        result.append(_sliced(edit.model, tensor, kept))
        before, after = str(list(tensor.dims)), str(list(result[-1].dims))
        edit.changes.append(Change(PASS, tensor.name, "shape", before, after, "planned"))
    return result


def _sliced(model: Model, tensor: onnx.TensorProto, kept: dict[int, Mask]) -> onnx.TensorProto:
    if external.on_disk(tensor):
        return external.sliced(tensor, kept)  # written when the model is
    array = model.array(tensor.name)
    for axis, mask in kept.items():
        array = np.compress(mask, array, axis=axis)
    sliced = set_initializer(tensor.name, array)
    sliced.doc_string = tensor.doc_string
    sliced.data_type = tensor.data_type
    return sliced


def _write_counts(edit: _Edit, index: int, where: str | int, counts: list[Count]) -> None:
    if isinstance(where, str):
        _write_attribute(edit, index, where, counts)
    else:
        _write_input(edit, index, where, counts)


def _write_attribute(edit: _Edit, index: int, name: str, counts: list[Count]) -> None:
    node = edit.nodes[index]
    old = next((a for a in node.attribute if a.name == name), None)
    value: Any = helper.get_attribute_value(old) if old is not None else None
    new: int | list[int]
    if old is None:  # an omitted list means equal parts, which they may no longer be
        new = [edit.survivors(count.slots) for count in counts]
    elif not edit.changed(counts):
        return
    elif counts[0].element is None:
        new = edit.changed(counts)[0][1]
    else:
        new = list(value)
        for element, number in edit.changed(counts):
            new[element] = number
    if old is not None:
        node.attribute.remove(old)
    node.attribute.append(helper.make_attribute(name, new))
    edit.changes.append(Change(PASS, label(node), name, str(value), str(new), "count of survivors"))


def _spell_out(edit: _Edit, default: Default) -> None:
    """An attribute whose default would follow the new sizes keeps the original's value."""
    node = edit.nodes[default.node]
    for old in [a for a in node.attribute if a.name == default.attr]:
        node.attribute.remove(old)
    node.attribute.append(helper.make_attribute(default.attr, default.value))
    text = f"{default.value:g}"
    edit.changes.append(Change(PASS, label(node), default.attr, "default", text, "kept as it was"))


def _write_input(edit: _Edit, index: int, position: int, counts: list[Count]) -> None:
    node = edit.nodes[index]
    source = node.input[position] if position < len(node.input) else ""
    if not source:
        sizes = [edit.survivors(c.slots) for c in sorted(counts, key=lambda c: c.element or 0)]
        while len(node.input) <= position:
            node.input.append("")
        node.input[position] = edit.constant(label(node), np.array(sizes, np.int64))
        for attribute in [a for a in node.attribute if a.name == "num_outputs"]:
            node.attribute.remove(attribute)  # exclusive with explicit sizes
        edit.changes.append(Change(PASS, label(node), "sizes", "equal", str(sizes), "explicit"))
    elif source in edit.model.constant_names:
        value = edit.model.array(source)
        new = value.copy().reshape(-1)
        for element, number in edit.changed(counts):
            new[element] = number
        if not np.array_equal(new, value.reshape(-1)):
            node.input[position] = edit.constant(source, new.reshape(value.shape))
            text = str(value.tolist()), str(new.tolist())
            edit.changes.append(Change(PASS, label(node), f"input {position}", *text, "counts"))
    else:
        _scale_computed(edit, index, position, counts)


def _scale_computed(edit: _Edit, index: int, position: int, counts: list[Count]) -> None:
    """Sizes computed at run time: times survivors, over the original number, element by element."""
    node = edit.nodes[index]
    source = node.input[position]
    known = edit.shapes.value[source]
    up = np.ones(known.size, known.dtype)
    down = np.ones(known.size, known.dtype)
    for count in counts:
        place = count.element or 0
        if known.reshape(-1)[place] > 0:  # Reshape's 0 and -1 follow by themselves
            up[place], down[place] = edit.survivors(count.slots), len(count.slots)
    if np.array_equal(up, down):
        return
    node.input[position] = _scaled(edit, edit.before[index], source, up, down, known.shape, index)
    change = Change(
        PASS, label(node), f"input {position}", "computed", "scaled to survivors", "counts"
    )
    edit.changes.append(change)


def _scaled(
    edit: _Edit,
    into: list[onnx.NodeProto],
    source: str,
    up: Array,
    down: Array,
    shape: tuple[int, ...],
    index: int,
) -> str:
    name = f"{source}/graphprune_{index}"
    times = edit.constant(f"{source}/times", up.reshape(shape))
    over = edit.constant(f"{source}/over", down.reshape(shape))
    into.append(helper.make_node("Mul", [source, times], [f"{name}_up"], name=f"{name}_up"))
    into.append(helper.make_node("Div", [f"{name}_up", over], [name], name=name))
    return name


def _renumber(edit: _Edit, index: int, position: int, slots: Array, coupling: Coupling) -> None:
    """Positions along an axis become ranks among the survivors."""
    node = edit.nodes[index]
    source = edit.model.nodes[index].input[position]
    kept = edit.alive[slots]
    value = edit.model.array(source)
    rank = np.cumsum(kept) - 1
    new = rank[value].astype(value.dtype)
    for axis in coupling.relations.slots.tensors[source]:
        new = np.compress(edit.alive[axis.slots], new, axis=axis.index)
    node.input[position] = edit.constant(source, new)
    edit.changes.append(
        Change(
            PASS, label(node), f"input {position}", str(value.tolist()), str(new.tolist()), "moved"
        )
    )


def _keep_reading_original_shape(edit: _Edit, index: int, coupling: Coupling) -> None:
    """Shape arithmetic stays in the original's numbers; each consumer corrects what it counts."""
    node = edit.nodes[index]
    output = node.output[0]
    axes = coupling.relations.slots.tensors[node.input[0]].axes
    known = edit.shapes.value[output]
    up = np.array([max(1, len(a)) for a in axes], known.dtype)
    down = np.array([max(1, edit.survivors(a.slots)) for a in axes], known.dtype)
    if node.op_type == "Size":
        up, down = up.prod(dtype=known.dtype), down.prod(dtype=known.dtype)
    else:
        attributes = {a.name: a.i for a in node.attribute}
        window = slice(attributes.get("start", 0), attributes.get("end"))
        up, down = up[window], down[window]
    if np.array_equal(up, down):
        return
    if not any(edit.shapes.symbolic.values()):  # every size is known: the reading is a constant
        edit.nodes[index] = helper.make_node(
            "Identity", [edit.constant(output, known)], [output], name=node.name
        )
    else:
        node.output[0] = f"{output}/graphprune_pruned"
        scaled = _scaled(edit, edit.after[index], node.output[0], up, down, known.shape, index)
        edit.after[index][-1].output[0] = output
        edit.after[index][-1].name = scaled
    edit.changes.append(
        Change(PASS, label(node), "output", "sizes", "sizes of the original", "shape arithmetic")
    )


def _value_info(model: Model, coupling: Coupling, alive: Mask) -> list[onnx.ValueInfoProto]:
    """Declared shapes of inner tensors with the new sizes; of what nothing reads nobody knows."""
    result = []
    for info in model.graph.value_info:
        if info.name not in model.consumers:
            continue
        new = onnx.ValueInfoProto()
        new.CopyFrom(info)
        tensor = coupling.relations.slots.tensors.get(info.name)
        if tensor is not None and info.type.tensor_type.HasField("shape"):
            for axis, dim in zip(tensor, new.type.tensor_type.shape.dim, strict=False):
                if dim.HasField("dim_value"):
                    dim.dim_value = int(alive[axis.slots].sum())
        result.append(new)
    return result
