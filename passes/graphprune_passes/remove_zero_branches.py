"""Branches that only compute constants become these constants; sums with zero are bypassed."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from math import prod

import numpy as np
import onnx
from onnx import helper

from graphprune import cleaned
from graphprune.control import is_open, regions
from graphprune.coupling import FLOAT_TYPES
from graphprune.errors import ModelError
from graphprune.facts import Facts
from graphprune.model import Array, Model, label, set_initializer
from graphprune.pipeline import Change, Context, PassResult
from graphprune.rules.elementwise import BROADCAST
from graphprune.shapes import Shapes, infer
from graphprune.validate import other_sizes
from graphprune_passes.lift_constants import rename_inputs

LARGEST = 1 << 16  # elements of a constant that stands for a branch
ADDS = {"Add": (0, 1), "Sub": (1,)}  # operator → inputs of which zeros change nothing


@dataclass(frozen=True)
class RemoveZeroBranches:
    """1. A tensor whose every element is known beforehand is not computed where it meets another
       one element by element: a small constant is read instead.
    2. Where it is zeros that are added, the node goes as well.
    3. Tensors of sizes that an input may choose stay computed where they decide the result's shape.
    """

    name: str = "remove_zero_branches"

    def run(self, model: Model, context: Context) -> PassResult:
        analysis = context.analysis(model)
        facts = context.facts(model)
        sizes = _Sizes(model, analysis.shapes)
        alias: dict[str, str] = {}
        constants: dict[str, Array] = {}
        nodes: list[onnx.NodeProto] = []
        changes: list[Change] = []
        insides = regions(model.nodes)
        for node, inside in zip(model.nodes, insides, strict=True):
            done = None
            if node.op_type in BROADCAST and not (inside or node.domain or is_open(node)):
                done = _without(node, facts, sizes)
            if done is None:
                nodes.append(rename_inputs(node, alias))
                continue
            place, value = done
            where = label(node), cleaned.BRANCH, node.input[place]
            other = node.input[1 - place] if len(node.input) == 2 else ""
            adds = place in ADDS.get(node.op_type, ()) and not value.any()
            if adds and node.output[0] not in model.output_names:
                alias[node.output[0]] = alias.get(other, other)
                changes.append(Change(self.name, *where, "bypassed", "adds zeros"))
            else:
                name = f"{node.input[place]}/graphprune_constant_{len(constants)}"
                constants[name] = value
                new = rename_inputs(node, alias)
                if new is node:
                    new = onnx.NodeProto()
                    new.CopyFrom(node)
                new.input[place] = name
                nodes.append(new)
                changes.append(Change(self.name, *where, "constant", "known beforehand"))
        if not changes:
            return PassResult(model)
        made = [set_initializer(name, value) for name, value in constants.items()]
        tensors = [*model.initializers.values(), *made]
        return PassResult(model.with_graph(nodes, tensors), tuple(changes))


def _without(node: onnx.NodeProto, facts: Facts, sizes: _Sizes) -> tuple[int, Array] | None:
    """Which input of a node is known beforehand, and its value, if the others give the shape."""
    model = facts.model
    found = None
    for place, name in enumerate(node.input):
        if not name or name in model.constant_names or name in {v.name for v in model.inputs}:
            continue
        fact = facts.known.get(name)
        dtype = facts.shapes.dtype.get(name)
        if fact is None or dtype not in FLOAT_TYPES or not fact.known.all():
            continue
        if fact.low.size > LARGEST or fact.low.size > prod(facts.shapes.shape[name] or (1,)):
            continue
        others = [n for i, n in enumerate(node.input) if i != place and n]
        if sizes.given_by(others, name, fact.low.shape, node.output[0]):
            numpy_type = helper.tensor_dtype_to_np_dtype(dtype)
            found = place, fact.low.astype(numpy_type)
    return found


def _broadcast(*shapes: tuple[int, ...]) -> tuple[int, ...] | None:
    try:
        return np.broadcast_shapes(*shapes)
    except ValueError:  # sizes that the model does not take
        return None


class _Sizes:
    """Shapes at the sizes of the analysis and, where inputs leave them open, at others."""

    def __init__(self, model: Model, shapes: Shapes) -> None:
        self.model, self.shapes = model, shapes
        self.several: list[Shapes] | None = None

    def given_by(self, others: list[str], name: str, known: tuple[int, ...], result: str) -> bool:
        """Whether ``others`` alone broadcast to the shape of ``result`` and a constant of shape
        ``known`` to that of ``name``, at all sizes tried."""
        if self.several is None:
            self.several = [self.shapes]
            for inputs in other_sizes(self.shapes):
                with suppress(ModelError):  # sizes that the model does not take
                    self.several.append(infer(self.model, inputs))
        for shapes in self.several:
            parts = [shapes.shape.get(other) for other in others]
            whole, mine = shapes.shape.get(result), shapes.shape.get(name)
            if whole is None or mine is None or any(part is None for part in parts):
                return False
            if _broadcast(*(p for p in parts if p is not None)) != whole:
                return False
            if _broadcast(known, mine) != mine:
                return False
        return bool(others)
