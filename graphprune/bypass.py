"""Blocks that leave: a sum passes on what is left of it; what served the branch alone is dead.

    y = Add(x, t)  →  y = Identity(x)  →  whatever read y reads x

The second step comes after the repair, which finds tensors by their names in the original.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import onnx
from onnx import helper

from graphprune.model import Model, captured, label

PASS = "remove_blocks"
SUMS = ("Add", "Sum", "Concat")  # what a term that may leave is read by: pieces of experts, too
Renamed = tuple[tuple[str, str], ...]  # pairs of a name and the one that it became
MARK = "graphprune.block"  # metadata of the Identity that stands where a sum was


def without_terms(
    nodes: Sequence[onnx.NodeProto], gone: Collection[str]
) -> tuple[list[onnx.NodeProto], list[tuple[str, str]]]:
    """The nodes with sums that have lost the terms ``gone``, and which sum has lost what; a sum of
    nothing is itself such a term."""
    lost = set(gone)
    kept, sums = [], []
    for node in nodes:
        rest = [name for name in node.input if name not in lost]
        if len(rest) == len(node.input) or node.op_type not in SUMS:
            kept.append(node)
            continue
        if not rest:
            lost.add(node.output[0])
            continue
        kind = "Identity" if len(rest) == 1 else node.op_type
        new = helper.make_node(kind, rest, list(node.output), name=node.name)
        if len(rest) > 1:  # that of a Concat
            new.attribute.extend(node.attribute)
        new.doc_string = node.doc_string
        new.metadata_props.extend(node.metadata_props)
        for key, value in (("graphprune.pass", PASS), (MARK, kind)):
            entry = new.metadata_props.add()
            entry.key, entry.value = key, value
        kept.append(new)
        terms = ", ".join(name for name in node.input if name in lost)
        sums.append((label(node), terms))
    return kept, sums


def stands_for_sum(node: onnx.NodeProto) -> bool:
    """Whether this Identity stands where a block was."""
    marked = any(entry.key == MARK for entry in node.metadata_props)
    return marked and node.op_type == "Identity"


def past_blocks(model: Model, name: str) -> str:
    """What ``name`` is once blocks have left right behind it: the last of the tensors that each
    hand on nothing else. A Relu before such a block and one after it are one Relu."""
    while True:
        reader = only_reader(model, name)
        if reader is None:
            return name
        found = reader.output[0] if stands_for_sum(reader) else None
        if found is None and reader.op_type == "Relu":
            after = only_reader(model, reader.output[0])
            if after is not None and stands_for_sum(after):
                last = only_reader(model, after.output[0])
                if last is not None and last.op_type == "Relu":
                    found = after.output[0]
        if found is None:
            return name
        name = found


def only_reader(model: Model, name: str) -> onnx.NodeProto | None:
    readers = model.consumers.get(name, [])
    if len(readers) != 1 or readers[0][1] < 0 or name in model.output_names:
        return None
    return model.nodes[readers[0][0]]


def joined(model: Model) -> tuple[Model, Renamed]:
    """The model without the identities that stand for sums: both names become one. Names of the
    interface stay, and so does an identity between two of them."""
    inside = {name for node in model.nodes for name in captured(node)}
    fixed = {value.name for value in model.graph.input} | model.output_names | inside
    fixed |= set(model.initializers)
    alias: dict[str, str] = {}  # name → the one that it becomes
    dropped = set()

    def now(name: str) -> str:
        while name in alias:
            name = alias[name]
        return name

    for i, node in enumerate(model.nodes):
        if not stands_for_sum(node):
            continue
        source, result = now(node.input[0]), node.output[0]
        if result not in fixed:
            alias[result] = source
        elif source not in fixed:
            alias[source] = result
        else:
            continue
        dropped.add(i)
    if not dropped:
        return model, ()
    nodes = []
    for i, old in enumerate(model.nodes):
        if i in dropped:
            continue
        node = onnx.NodeProto()
        node.CopyFrom(old)
        for names in (node.input, node.output):
            names[:] = [now(name) for name in names]
        nodes.append(node)
    infos = [info for info in model.graph.value_info if info.name not in alias]
    renamed = tuple((old, now(old)) for old in alias)
    return model.with_graph(nodes, model.initializers.values(), infos), renamed
