"""Selectors: a Gather of constant positions between a tensor and one of its readers.

A reader behind a selector has slots of its own, so that it may do without channels that others
still read (UPSCALE, arXiv 2307.08771). Marked, so that a rule knows it from a user's own Gather:
that one is tied to what it reads.
"""

from __future__ import annotations

import onnx
from onnx import helper

MARK = "graphprune.read"
WEIGHS = "graphprune.weighs"  # where what is read are a router's shares, by which experts count


def selector(
    source: str, positions: str, output: str, axis: int, weighs: bool = False
) -> onnx.NodeProto:
    """A node that gives a reader ``positions`` (a constant's name) of ``source`` along ``axis``."""
    node = helper.make_node("Gather", [source, positions], [output], name=output, axis=axis)
    entry = node.metadata_props.add()
    entry.key, entry.value = MARK, source
    if weighs:
        entry = node.metadata_props.add()
        entry.key, entry.value = WEIGHS, source
    return node


def is_selector(node: onnx.NodeProto) -> bool:
    return node.op_type == "Gather" and any(entry.key == MARK for entry in node.metadata_props)


def weighs_experts(node: onnx.NodeProto) -> bool:
    return is_selector(node) and any(entry.key == WEIGHS for entry in node.metadata_props)
