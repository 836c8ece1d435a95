"""Numbers that say a position along an axis (which expert TopK has chosen), and who reads them.

Operators that only move numbers hand them on. One that looks positions up, in weights stacked along
the same axis, reads them right whatever stays; anything else would see other numbers, so then the
axis must stay.
"""

from __future__ import annotations

import onnx

from graphprune.model import Model
from graphprune.relations import Pin, Relations

HAND_ON = """
Cast Expand Flatten Gather Identity Reshape Slice Split Squeeze Tile Transpose Unsqueeze
""".split()


def handed_on(node: onnx.NodeProto, index: int, relations: Relations) -> None:
    """What moves positions gives positions."""
    source = node.input[0] if node.input else ""
    if node.op_type not in HAND_ON or node.domain or source not in relations.positions:
        return
    relations.looked_up.add((index, 0))
    for name in filter(None, node.output):
        relations.positions[name] = relations.positions[source]


def pin_numbers(model: Model, relations: Relations) -> None:
    """Axes whose positions anything reads as plain numbers must stay."""
    for name, slots in relations.positions.items():
        if name in model.output_names:
            relations.pins.append(Pin(slots, f"graph output {name!r} holds positions", -1))
        for node, place in model.consumers.get(name, ()):
            if (node, place) not in relations.looked_up:
                kind = model.nodes[node].op_type
                reason = f"{kind}: positions along the axis are read as numbers"
                relations.pins.append(Pin(slots, reason, node))
