"""A quantised model spelled out, and what was done to it put back (see ``graphprune.spelling``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
from onnx import helper

from graphprune.model import Array, Model, set_initializer
from graphprune.quantisation import Quantised, grown, regridded, requantised
from graphprune.slots import Axis, Slots, SlotTensor

PRODUCT = "/graphprune_product"  # ends the name of a product, which a bias is added to


@dataclass(frozen=True)
class Home:
    """Where the bias that is called ``name`` in the spelled model stands in the given one: an input
    of ``node``, the initialiser ``stored``, or, with neither, an Add behind ``node``."""

    name: str
    node: int
    place: int | None = None
    stored: str | None = None
    lead: tuple[int, ...] = ()  # lengths behind the channels, of what is added to a convolution


@dataclass(frozen=True)
class Spelled:
    """``model`` computes what ``given`` does, in QuantizeLinear, DequantizeLinear and floats."""

    given: Model
    model: Model
    same: Mapping[str, tuple[str, bool]]  # tensor → that of ``given``; last two axes swapped
    stands_for: Mapping[str, int]  # output of a float operator → the node that it stands for
    replaced: frozenset[int]  # nodes of ``given``
    made: frozenset[str]  # what nodes that ``given`` has not give
    homes: tuple[Home, ...] = ()
    swapped: Mapping[str, tuple[str, Quantised]] | None = None  # floats → integers turned round

    def node(self, index: int) -> int:
        """Which node of ``given`` a linear operator of ``model`` stands for, or is."""
        first = next(o for o in self.model.nodes[index].output if o)
        return self.stands_for.get(first, self.given.producer.get(first, -1))

    def slots(self, slots: Slots) -> Slots:
        """Those of the given model, and the same for the tensors that stand for its own."""
        tensors = dict(slots.tensors)
        for name, (known, swapped) in self.same.items():
            if known not in tensors:
                continue
            axes = list(tensors[known].axes)
            if swapped:
                axes[-2:] = axes[:-3:-1]
            mine = tuple(Axis(name, i, axis.slots) for i, axis in enumerate(axes))
            tensors[name] = SlotTensor(name, mine)
        return replace(slots, tensors=tensors)

    def back(self, repaired: Model) -> Model:
        """``given`` with the weights and biases of ``repaired``, which was ``model``."""
        if repaired is self.model:
            return self.given
        tensors = {n: repaired.initializers.get(n, t) for n, t in self.given.initializers.items()}
        for name, (integers, how) in (self.swapped or {}).items():
            value = repaired.array(name).swapaxes(-1, -2)
            tensors |= _regridded(self.given, integers, how, value)
        nodes = list(self.given.nodes)
        behind: dict[int, list[onnx.NodeProto]] = {}
        for home in self.homes:
            value = repaired.array(home.name)
            if np.array_equal(value, self.model.array(home.name)):
                continue
            if home.stored is not None:
                dims = self.given.initializers[home.stored].dims
                tensors[home.stored] = set_initializer(home.stored, value.reshape(dims))
                continue
            nodes[home.node] = new = onnx.NodeProto.FromString(nodes[home.node].SerializeToString())
            if home.place is None:
                value = value.reshape(-1, *home.lead)
                result = new.output[0]
                new.output[0] = f"{result}{PRODUCT}"
                names = [new.output[0], home.name]
                behind[home.node] = [helper.make_node("Add", names, [result], f"{home.name}_add")]
            else:
                new.input.extend([""] * (home.place + 1 - len(new.input)))
                new.input[home.place] = home.name
            tensors[home.name] = set_initializer(home.name, value)
        return self._joined(repaired, nodes, behind, tensors)

    def _joined(
        self,
        repaired: Model,
        nodes: Sequence[onnx.NodeProto],
        behind: Mapping[int, Sequence[onnx.NodeProto]],
        tensors: dict[str, onnx.TensorProto],
    ) -> Model:
        """In the order of ``given``; what the repair has added stands before what reads it."""
        mine = {o for node in self.given.nodes for o in node.output if o}
        found = {o: node for node in repaired.nodes for o in node.output if o}
        added = found.keys() - mine - self.made
        known = self.model.initializers.keys() | tensors.keys()
        tensors |= {n: t for n, t in repaired.initializers.items() if n not in known}
        order: list[onnx.NodeProto] = []

        def place(node: onnx.NodeProto) -> None:
            for name in node.input:
                if name in added:
                    added.discard(name)
                    place(found[name])
            order.append(node)

        for i, node in enumerate(nodes):
            first = next((o for o in node.output if o), "")
            own = i in self.replaced or first not in found
            place(node if own else found[first])
            order += behind.get(i, ())
        return self.given.with_graph(order, tensors.values())


def _regridded(
    model: Model, name: str, how: Quantised, value: Array
) -> dict[str, onnx.TensorProto]:
    """Integers for other numbers, and their scale where it is their own."""
    assert how.scale is not None
    if not model.read_once(how.scale):
        return {name: set_initializer(name, requantised(model, name, how, value))}
    found = regridded(model, name, how, value)
    tensors = {name: set_initializer(name, found.integers)}
    return tensors | grown(model, how, found.growth)
