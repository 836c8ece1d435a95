"""Statistics over what is left: the original's side of the proof where a removal shifts some.

A normalisation over fewer channels is not the one with zeros in their place, so for the proof the
node in the original gets the survivors alone, and its results are put back where they belong:

    x ─Gather(kept)─► node ─Gather(rank)─► y

Slots that left get a survivor's result: whatever reads them is masked, or gathers in its turn.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from graphprune.coupling import Mask
from graphprune.model import Array, set_initializer
from graphprune.relations import Count, Relations


def shifted_nodes(relations: Relations, alive: Mask) -> list[int]:
    """Nodes that take statistics over slots of which some left, in order."""
    return sorted({pin.node for pin in relations.shifts if not alive[pin.slots].all()})


def bound_to_sizes(relations: Relations, alive: Mask) -> bool:
    """Whether survivors stand where they do at the analysed sizes alone: an axis that is made of
    others, as (channels, height, width) is, has them elsewhere in larger pictures."""
    made = {int(fold.whole[0]) for fold in relations.folds if len(fold.whole)}
    lost = (pin.slots for pin in relations.shifts if not alive[pin.slots].all())
    return any(int(slots[0]) in made for slots in lost)


class Survivors:
    """Nodes that see survivors alone; new constants in ``tensors``."""

    def __init__(self, relations: Relations, alive: Mask) -> None:
        self.relations = relations
        self.alive = alive
        self.tensors: dict[str, onnx.TensorProto] = {}
        self.counts: dict[int, list[Count]] = {}
        for count in relations.counts:
            self.counts.setdefault(count.node, []).append(count)

    def apply(
        self, index: int, original: onnx.NodeProto, node: onnx.NodeProto
    ) -> tuple[list[onnx.NodeProto], list[onnx.NodeProto]]:
        """What goes before and after ``node``, which is the model's ``original`` with masks or
        without, and is changed in place."""
        before, after = [], []
        for place, name in enumerate(original.input):
            found = self._moved(name, node.input[place], f"graphprune/left_{index}_{place}", False)
            if found:
                node.input[place] = found[-1].output[0]
                before += found
        for place, name in enumerate(original.output):
            source = f"{name}/graphprune_left"
            found = self._moved(name, source, name, True)
            if found:
                node.output[place] = source
                found[-1].output[0] = name
                after += found
        for count in self.counts.get(index, ()):
            self._write(node, count)
        return before, after

    def _moved(self, tensor: str, source: str, base: str, back: bool) -> list[onnx.NodeProto]:
        """A Gather for each axis of ``tensor`` that lost slots: the survivors, or ``back``."""
        nodes: list[onnx.NodeProto] = []
        for axis in self.relations.slots.tensors.get(tensor, ()):
            kept = self.alive[axis.slots]
            if kept.all():
                continue
            where = np.cumsum(kept) - 1 if back else np.flatnonzero(kept)
            new = f"{base}/graphprune_{'back' if back else 'kept'}_{axis.index}"
            inputs = [source, self._constant(f"{new}/where", where.clip(min=0))]
            nodes.append(helper.make_node("Gather", inputs, [new], new, axis=axis.index))
            source = new
        return nodes

    def _write(self, node: onnx.NodeProto, count: Count) -> None:
        """An attribute that counts slots, as it must be for the survivors."""
        old = next((a for a in node.attribute if a.name == count.attr), None)
        if old is None or self.alive[count.slots].all():
            return
        number = int(self.alive[count.slots].sum())
        if count.element is None:
            old.i = number
        else:
            old.ints[count.element] = number

    def _constant(self, name: str, value: Array) -> str:
        self.tensors[name] = set_initializer(name, value.astype(np.int64))
        return name
