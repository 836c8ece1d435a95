"""Products with weights that are written as Einsum become MatMul."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
import onnx
from onnx import helper

from graphprune.coupling import FLOAT_TYPES
from graphprune.external import on_disk
from graphprune.model import Array, Model, label, set_initializer
from graphprune.pipeline import Arrays, Change, Context, PassResult


@dataclass(frozen=True)
class Product:
    """``x`` [batch.., summed..] times ``w`` is ``y`` [batch.., made..], by letters, in any order.

    ``summed`` are in the order in which ``x`` has them, ``made`` in that of ``y``.
    A point stands for an ellipsis.
    """

    x: str
    w: str
    y: str
    weight: int  # which of the two inputs it is

    @property
    def batch(self) -> str:
        return "".join(c for c in self.x if c not in self.w)

    @property
    def summed(self) -> str:
        return "".join(c for c in self.x if c in self.w)

    @property
    def made(self) -> str:
        return "".join(c for c in self.y if c not in self.x)

    @property
    def fits(self) -> bool:
        """Whether that is all there is: no diagonal, no letter of all three, no other sum."""
        terms = (self.x, self.w, self.y)
        whole = sorted(self.w) == sorted(self.summed + self.made)
        plain = all(len(set(t)) == len(t) and t.replace(".", "").isalpha() for t in terms)
        some = bool(self.batch and self.summed and self.made)
        if any("." in term for term in terms):  # of any rank: nothing may change places
            as_they_are = (self.batch + self.summed, self.batch + self.made)
            plain = (
                plain and self.is_matrix and "." not in self.w and (self.x, self.y) == as_they_are
            )
        return plain and some and whole and sorted(self.y) == sorted(self.batch + self.made)

    @property
    def is_matrix(self) -> bool:
        """Whether MatMul reads the weight as it is stored."""
        return len(self.w) == 2 and self.w == self.summed + self.made

    def matrix(self, weight: Array) -> Array:
        """[summed, made]: the weight, or an array of its shape, as MatMul reads it."""
        order = [self.w.index(c) for c in self.summed + self.made]
        rows = int(np.prod([weight.shape[i] for i in order[: len(self.summed)]]))
        return np.ascontiguousarray(weight.transpose(order).reshape(rows, -1))


@dataclass(frozen=True)
class LowerEinsums:
    """1. An Einsum of an activation and a stored weight that only sums over letters of both becomes
       a MatMul, with a Transpose or Reshape on either side where its letters ask for one.
    2. Where both have a letter that the output keeps (experts, say), it stays an Einsum; and where
       a weight would have to be stored otherwise that something else reads, or that is on disk.
    """

    name: str = "lower_einsums"

    def run(self, model: Model, context: Context) -> PassResult:
        products = {i: p for i, node in enumerate(model.nodes) if (p := _product(model, node))}
        if not products:
            return PassResult(model)
        nodes: list[onnx.NodeProto] = []
        tensors = dict(model.initializers)
        weights: dict[str, Product] = {}
        for i, node in enumerate(model.nodes):
            product = products.get(i)
            if product is None:
                nodes.append(node)
                continue
            name = node.input[product.weight]
            weights[name] = product
            lowered, shapes = _lowered(node, product, tuple(tensors[name].dims))
            nodes += lowered
            tensors |= {tensor.name: tensor for tensor in shapes}
            if not product.is_matrix:
                tensors[name] = set_initializer(name, product.matrix(model.array(name)))
        changes = [
            Change(self.name, label(model.nodes[i]), "weight", "Einsum", "MatMul", "")
            for i in products
        ]

        def carry(arrays: Arrays) -> Arrays:
            moved = {n: weights[n].matrix(arrays[n]) for n in weights.keys() & arrays.keys()}
            return {**arrays, **moved}

        return PassResult(model.with_graph(nodes, tensors.values()), tuple(changes), carry=carry)


def _product(model: Model, node: onnx.NodeProto) -> Product | None:
    if node.op_type != "Einsum" or node.domain or len(node.input) != 2:
        return None
    known = [name in model.constant_names for name in node.input]
    equation = next(a.s.decode() for a in node.attribute if a.name == "equation")
    sources, arrow, target = equation.replace(" ", "").replace("...", ".").partition("->")
    terms = sources.split(",")
    if sum(known) != 1 or not arrow or len(terms) != 2:
        return None
    place = known.index(True)
    weight = model.initializers.get(node.input[place])
    if weight is None or weight.data_type not in FLOAT_TYPES:
        return None
    product = Product(terms[1 - place], terms[place], target, place)
    if not product.fits or len(weight.dims) != len(product.w):
        return None
    if any(weight.dims[product.w.index(c)] == 1 for c in product.summed if c != "."):
        return None  # it may be broadcast
    own = len(model.consumers[weight.name]) == 1 and weight.name not in model.output_names
    return product if product.is_matrix or (own and not on_disk(weight)) else None


def _lowered(
    node: onnx.NodeProto, product: Product, sizes: tuple[int, ...]
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """The nodes in place of one, and the shapes that they read."""
    x, weight = node.input[1 - product.weight], node.input[product.weight]
    y = node.output[0]
    batch, summed, made = product.batch, product.summed, product.made
    # operator, its attributes, and the target shape or the weight that it reads besides
    steps: list[tuple[str, dict[str, list[int]], list[int] | str]] = []
    if product.x != batch + summed:
        steps.append(("Transpose", {"perm": [product.x.index(c) for c in batch + summed]}, ""))
    if len(summed) > 1:  # its size is said: -1 could not be told of a batch of none
        width = prod(sizes[product.w.index(c)] for c in summed)
        steps.append(("Reshape", {}, [0] * len(batch) + [width]))
    steps.append(("MatMul", {}, weight))
    if len(made) > 1:
        steps.append(("Reshape", {}, [0] * len(batch) + [sizes[product.w.index(c)] for c in made]))
    if product.y != batch + made:
        steps.append(("Transpose", {"perm": [(batch + made).index(c) for c in product.y]}, ""))
    nodes, shapes, current = [], [], x
    for number, (operator, attributes, other) in enumerate(steps):
        last = number == len(steps) - 1
        output = y if last else f"{y}/graphprune_{number}"
        inputs = [current]
        if isinstance(other, list):
            shapes.append(set_initializer(f"{output}_shape", np.array(other, np.int64)))
            inputs.append(shapes[-1].name)
        elif other:
            inputs.append(other)
        name = node.name if operator == "MatMul" else f"{output}_{operator}"
        nodes.append(helper.make_node(operator, inputs, [output], name=name))
        nodes[-1].attribute.extend(helper.make_attribute(k, v) for k, v in attributes.items())
        current = output
    return nodes, shapes
