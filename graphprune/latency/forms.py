"""What a piece is but for its channel counts: a text with letters where sizes may change.

Pieces of one form cost the same at the same counts, in whichever model they stand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_lowercase

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, defs, helper
from scipy.sparse import csr_array

from graphprune.analysis import Analysis
from graphprune.latency.pieces import Piece
from graphprune.slots import SlotArray

LEFT_OUT = {"strides": 1, "dilations": 1, "pads": 0}  # lists, of any length
UNSPOKEN = {onnx.AttributeProto.TENSOR, onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS}


@dataclass(frozen=True)
class Form:
    """A piece's text, and its knobs: the sets of units that change its sizes in one way each."""

    text: str
    knobs: tuple[NDArray[np.int64], ...]  # units of each knob; a count is how many survive
    width: tuple[int, ...]  # channels that a unit of each knob is, where it is most


def form_of(analysis: Analysis, piece: Piece, blocked: frozenset[str]) -> Form:
    """The form of ``piece``; ``blocked`` names the pictures that arrive in the blocked layout."""
    axes = _axes(analysis, piece)
    units, ways = _ways(analysis.coupling.widths(list(axes.values())))
    knobs = tuple(units[ways == way] for way in range(int(ways.max(initial=-1)) + 1))
    size = analysis.coupling.widths(list(axes.values()))
    weights = [np.asarray(size[:, [int(k[0])]].todense()).reshape(-1) for k in knobs]
    texts = {}
    for row, (key, slots) in enumerate(axes.items()):
        fixed = int((analysis.coupling.unit_of(slots) < 0).sum())
        parts = [(int(w[row]), _letter(i)) for i, w in enumerate(weights) if w[row]]
        named = [f"{w}{letter}" if w > 1 else letter for w, letter in parts]
        texts[key] = "+".join([*named, *([str(fixed)] if fixed or not named else [])])
    widest = tuple(int(w.max()) for w in weights)
    return Form(_text(analysis, piece, blocked, texts), knobs, widest)


def _axes(analysis: Analysis, piece: Piece) -> dict[tuple[str | int, str | int], SlotArray]:
    """Slots of every axis of every tensor the piece touches, and of its attributes' counts."""
    tensors = analysis.relations.slots.tensors
    nodes = [analysis.model.nodes[i] for i in piece.nodes]
    names = dict.fromkeys(n for node in nodes for n in (*node.input, *node.output) if n in tensors)
    found: dict[tuple[str | int, str | int], SlotArray] = {
        (name, axis.index): axis.slots for name in names for axis in tensors[name]
    }
    inner = set(piece.nodes)
    for count in analysis.relations.counts:
        if count.node in inner and count.attr is not None and count.element is None:
            found[count.node, count.attr] = count.slots
    return found


def _ways(size: csr_array) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Units that change any of the axes, and the number of the way in which each does."""
    columns = size.tocsc()
    units = np.flatnonzero(np.diff(columns.indptr))
    seen: dict[bytes, int] = {}
    ways = []
    for unit in units:
        start, stop = columns.indptr[unit], columns.indptr[unit + 1]
        order = np.argsort(columns.indices[start:stop])
        rows = columns.indices[start:stop][order].astype(np.int64)
        key = rows.tobytes() + columns.data[start:stop][order].tobytes()
        ways.append(seen.setdefault(key, len(seen)))
    return units.astype(np.int64), np.array(ways, dtype=np.int64)


def _letter(index: int) -> str:
    return ascii_lowercase[index] if index < len(ascii_lowercase) else f"k{index}_"


def _text(
    analysis: Analysis,
    piece: Piece,
    blocked: frozenset[str],
    sizes: dict[tuple[str | int, str | int], str],
) -> str:
    model, shapes = analysis.model, analysis.shapes
    numbers: dict[str, int] = {}

    def tensor(name: str) -> str:
        if not name:
            return "-"
        if name in numbers:
            return f"t{numbers[name]}"
        numbers[name] = len(numbers)
        rank = len(shapes.shape.get(name) or ())
        dims = ",".join(sizes.get((name, axis), "?") for axis in range(rank))
        kind = TensorProto.DataType.Name(shapes.dtype.get(name, 0)).lower()
        how = "=" if name in model.constant_names else "~" if name in blocked else ":"
        return f"t{numbers[name]}{how}{kind}[{dims}]"

    def attribute(i: int, item: onnx.AttributeProto) -> str:
        value = sizes.get((i, item.name)) or helper.get_attribute_value(item)
        return f"{item.name}={value.decode() if isinstance(value, bytes) else value}"

    def said_of(i: int, node: onnx.NodeProto) -> list[str]:
        known = [a for a in node.attribute if a.type not in UNSPOKEN and not _usual(node, a)]
        return sorted(attribute(i, a) for a in known)

    lines = []
    for i in piece.nodes:
        node = model.nodes[i]
        taken, given = (", ".join(map(tensor, names)) for names in (node.input, node.output))
        kind = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        lines.append(f"{kind}{{{', '.join(said_of(i, node))}}}({taken}) -> {given}")
    return "\n".join(lines)


def _usual(node: onnx.NodeProto, item: onnx.AttributeProto) -> bool:
    """Whether the attribute says what leaving it out would."""
    value = helper.get_attribute_value(item)
    if item.name in LEFT_OUT:
        return set(value) == {LEFT_OUT[item.name]}
    if item.name == "kernel_shape" and len(node.input) > 1:
        return True  # the weight's shape says it
    if not defs.has(node.op_type, node.domain):
        return False
    default = defs.get_schema(node.op_type, node.domain).attributes.get(item.name)
    if default is None or not default.default_value.name:
        return False
    return bool(helper.get_attribute_value(default.default_value) == value)


def counts_matrix(forms: Sequence[Form], n_units: int) -> csr_array:
    """[knobs of all forms, units]: times the units that survive, every knob's count."""
    knobs = [knob for form in forms for knob in form.knobs]
    rows = np.repeat(np.arange(len(knobs)), [len(k) for k in knobs])
    columns = np.concatenate([*knobs, np.empty(0, np.int64)])
    shape = (len(knobs), n_units)
    return csr_array((np.ones(len(columns)), (rows, columns)), shape=shape)
