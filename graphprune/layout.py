"""Which channel counts stay in the runtime's blocked layout.

ONNX Runtime runs convolutions on x86 with channels in blocks (NCHWc): 16 of them with AVX-512, 8
with AVX2. Whatever is not in that layout costs a copy out of it and one back (ReorderOutput,
ReorderInput), and fusions are lost on the way (DenseNet-121 at half of its MACs: 1.4 times as fast
without this, 1.9 times with it). As its optimised graphs show:

1. A convolution reads less than a block of channels from the plain layout (which is accepted for
   layers of less than two blocks).
2. Pools, BatchNormalization (that no convolution before it takes in) and Concat
   (``Target.whole``) take whole blocks alone.
3. A grouped convolution reads and writes whole blocks in each group; a depthwise one any count.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from graphprune.analysis import Analysis
from graphprune.relations import Role
from graphprune.slots import SlotArray
from graphprune.targets import Target

# Blocks from which on a convolution must read one whole block at least. Networks whose layers are
# narrower than that have nothing else to give: ResNet-56 (16, 32, 64 channels) at 0.7 of its MACs
# keeps 78.8 % of its 83.5 % top-1 with layers of 16 left whole, 82.9 % with them pruned.
NARROW = 2
PICTURES, CHANNELS = 4, 1  # rank of what convolutions on pictures read, and its channel axis


@dataclass(frozen=True)
class Blocks:
    """What a group's count must hold to so that nothing leaves the layout that was in it."""

    step: int = 1  # the count is a multiple of this many units
    least: int = 1  # units that stay at least

    def joined(self, other: Blocks) -> Blocks:
        return Blocks(math.lcm(self.step, other.step), max(self.least, other.least))


FREE = Blocks()


def blocks(analysis: Analysis, target: Target) -> Mapping[int, Blocks]:
    """By group index; groups that may have any count are left out. What was outside the layout
    before may stay there."""
    if target.block == 1:
        return {}
    coupling = analysis.coupling
    group_of = np.full(coupling.n_units + 1, -1, dtype=np.int64)
    for group in coupling.groups:
        if _convolved(analysis, group.signature):
            group_of[group.units] = group.index
    found: dict[int, Blocks] = {}
    for slots, parts, whole in _reads(analysis, target):
        block = target.block * parts
        if len(slots) < block or (whole and len(slots) % block):
            continue  # outside the layout as it is
        units, counts = np.unique(coupling.unit_of(slots), return_counts=True)
        groups = group_of[units]
        for index in np.unique(groups[groups >= 0]):
            width = int(counts[groups == index].min())
            step = block // math.gcd(block, width) if whole else 1
            alone = (groups == index).all()
            least = math.ceil(block / width) if alone and len(slots) >= NARROW * block else 1
            if step == least == 1:
                continue
            found[int(index)] = found.get(int(index), FREE).joined(Blocks(step, least))
    return found


def _convolved(analysis: Analysis, signature: tuple[tuple[str, int], ...]) -> bool:
    """Whether a convolution writes these channels."""
    model, coupling = analysis.model, analysis.coupling
    for tensor, index in signature:
        slots = coupling.relations.slots.tensors[tensor][index].slots
        if Role.PRODUCER in coupling.role[slots]:
            readers = model.consumers.get(tensor, ())
            if any(model.nodes[i].op_type == "Conv" for i, _ in readers):
                return True
    return False


def _reads(analysis: Analysis, target: Target) -> Iterator[tuple[SlotArray, int, bool]]:
    """Channels of the pictures that nodes read or write: the slots, the parts that they fall into,
    and whether each part must be whole blocks."""
    for node in analysis.model.nodes:
        if node.op_type == "Conv":
            group = _int(node, "group", 1)
            slots = _channels(analysis, node.input[0])
            if 1 < group < len(slots):
                yield slots, group, True
                yield _channels(analysis, node.output[0]), group, True
            elif len(slots):
                yield slots, 1, False
        elif _is_fused(analysis, node):
            continue
        elif node.op_type in target.whole and _int(node, "axis", CHANNELS) in (CHANNELS, -3):
            names = node.input if node.op_type == "Concat" else node.input[:1]
            for name in names:
                if len(slots := _channels(analysis, name)):
                    yield slots, 1, True


def _is_fused(analysis: Analysis, node: onnx.NodeProto) -> bool:
    """Whether the runtime puts this normalisation into the weights of the convolution before it."""
    model = analysis.model
    if node.op_type != "BatchNormalization" or len(model.consumers[node.input[0]]) > 1:
        return False
    before = model.producer.get(node.input[0])
    if before is None or model.nodes[before].op_type != "Conv":
        return False
    return node.input[0] not in model.output_names


def _channels(analysis: Analysis, name: str) -> NDArray[np.int64]:
    tensor = analysis.relations.slots.tensors.get(name)
    if tensor is None or tensor.rank != PICTURES or name in analysis.model.constant_names:
        return np.empty(0, np.int64)
    return tensor[CHANNELS].slots


def _int(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((int(a.i) for a in node.attribute if a.name == name), default)
