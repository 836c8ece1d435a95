"""Copies of one vector that are equal again after the cut become one, as the exporter had it."""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from graphprune.linear import COPY_MARK
from graphprune.model import Model, tensor_bytes
from graphprune.pipeline import Change, Context, PassResult
from graphprune_passes.lift_constants import rename_inputs


@dataclass(frozen=True)
class ShareVectors:
    """1. A copy made by `separate_vectors` that equals an earlier one of its family is dropped.
    2. Its readers read the earlier one.
    """

    name: str = "share_vectors"

    def run(self, model: Model, context: Context) -> PassResult:
        first: dict[tuple[str, bytes], str] = {}
        alias: dict[str, str] = {}
        saved = 0
        families = {n.partition(COPY_MARK)[0] for n in model.initializers if COPY_MARK in n}
        for name, tensor in model.initializers.items():
            family = name.partition(COPY_MARK)[0]
            if family not in families:
                continue
            key = family, _content(tensor)
            if key in first and COPY_MARK in name:
                alias[name] = first[key]
                saved += tensor_bytes(tensor)
            first.setdefault(key, name)
        if not alias:
            return PassResult(model)
        nodes = [rename_inputs(node, alias) for node in model.nodes]
        change = Change(
            self.name, "constants", "copies", str(len(alias)), "0", f"equal: {saved} B less"
        )
        return PassResult(model.with_graph(nodes, model.initializers.values()), (change,))


def _content(tensor: onnx.TensorProto) -> bytes:
    nameless = onnx.TensorProto()
    nameless.CopyFrom(tensor)
    nameless.ClearField("name")
    return bytes(nameless.SerializeToString(deterministic=True))
