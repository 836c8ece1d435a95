"""Sums and normalisations that were one node are one again."""

from __future__ import annotations

from dataclasses import dataclass

import onnx
from onnx import helper

from graphprune.bypass import only_reader
from graphprune.model import Model, label
from graphprune.pipeline import Change, Context, PassResult
from graphprune_passes.open_skips import DOMAIN, FUSED, MARK, opened_from


@dataclass(frozen=True)
class CloseSkips:
    """1. A sum that `open_skips` made, and the normalisation of it, are one node again: also where
          what lay between that sum and this normalisation has left.
    2. The bias that was in it, now with one term of the sum or the sum, goes into it again.
    3. Where the sum has left, the normalisation of what was beside the block stays.
    """

    name: str = "close_skips"

    def run(self, model: Model, context: Context) -> PassResult:
        marked = [i for i, node in enumerate(model.nodes) if opened_from(node)]
        if not marked:
            return PassResult(model)
        fused: dict[int, onnx.NodeProto] = {}
        gone: set[int] = set()
        for i in marked:
            found = _fused(model, i, gone)
            if found is not None:
                fused[i], rest = found
                gone |= rest
        nodes = [_unmarked(fused.get(i, n)) for i, n in enumerate(model.nodes) if i not in gone]
        changes = tuple(
            Change(self.name, label(node), "sum", "Add", node.op_type, "")
            for node in fused.values()
        )
        return PassResult(model.with_graph(nodes, model.initializers.values()), changes)


def _fused(model: Model, index: int, gone: set[int]) -> tuple[onnx.NodeProto, set[int]] | None:
    """The one node in the place of this sum, and the nodes that go into it."""
    sum_ = model.nodes[index]
    terms, total, bias = list(sum_.input), sum_.output[0], ""
    if sum_.op_type != "Add" or model.constant_names.intersection(terms):
        return None
    inside: set[int] = set()
    norm = _norm_of(model, total, gone)
    if norm is None:  # of the sum and a bias
        after = only_reader(model, total)
        added = None if after is None else _bias_of(model, after)
        if after is None or added is None:
            return None
        total, bias = after.output[0], added[1]
        inside.add(model.producer[total])
        norm = _norm_of(model, total, gone)
        if norm is None:
            return None
    normal = model.nodes[norm]
    for place, name in enumerate(terms):
        at = model.producer.get(name)
        if bias or at is None or not model.read_once(name):
            continue
        added = _bias_of(model, model.nodes[at])
        if added is not None:
            terms[place], bias = added
            inside.add(at)
    kind = opened_from(normal)
    shift = [normal.input[2] if len(normal.input) > 2 else ""]
    inputs = [*terms, normal.input[1], *shift * (kind == "SkipLayerNormalization"), bias]
    while not inputs[-1]:
        inputs.pop()
    read = total in model.output_names or len(model.consumers[total]) > 1
    outputs = [normal.output[0], "", "", total] if read else [normal.output[0]]
    new = helper.make_node(kind, inputs, outputs, normal.name, normal.doc_string, DOMAIN)
    new.attribute.extend(a for a in normal.attribute if a.name == "epsilon")
    new.metadata_props.extend(normal.metadata_props)
    return new, inside | {norm}


def _norm_of(model: Model, total: str, gone: set[int]) -> int | None:
    """The first normalisation of this sum that was made of a fused one."""
    for i in sorted({i for i, _ in model.consumers.get(total, ())} - gone - {-1}):
        node = model.nodes[i]
        if node.op_type == FUSED.get(opened_from(node), ("", 0.0))[0] and node.input[0] == total:
            return i
    return None


def _bias_of(model: Model, node: onnx.NodeProto) -> tuple[str, str] | None:
    """What this node adds the bias of a fused one to, and the bias."""
    if node.op_type != "Add" or not opened_from(node) or node.input[1] not in model.initializers:
        return None
    return node.input[0], node.input[1]


def _unmarked(node: onnx.NodeProto) -> onnx.NodeProto:
    if not opened_from(node):
        return node
    new = onnx.NodeProto()
    new.CopyFrom(node)
    del new.metadata_props[:]
    new.metadata_props.extend(entry for entry in node.metadata_props if entry.key != MARK)
    return new
