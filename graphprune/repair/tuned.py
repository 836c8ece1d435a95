"""A model whose linear operators can be tuned, and how far its outputs are from another's.

Behind every linear operator stand a scale and a shift by channel, which are graph inputs: one run
yields the loss and its gradient by all of them, and no weight is touched until they are folded in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
from onnx import TensorProto, helper

from graphprune.calibrate.match import class_scores
from graphprune.gradient.extend import extended, tape_for, value_of
from graphprune.gradient.tape import Tape, Value
from graphprune.linear import CONVOLUTIONS, Linear, repairable
from graphprune.model import Array, Model
from graphprune.runtime import Feeds, run_session, session
from graphprune.shapes import Shape, Shapes, infer

TINY = 1e-12  # spread of an output that does not vary


@dataclass(frozen=True)
class Site:
    """A linear operator whose outputs are scaled and shifted by channel; ``scale`` and ``shift``
    name graph inputs of ``shape``, which broadcasts to its output."""

    linear: Linear
    scale: str
    shift: str
    shape: Shape


@dataclass(frozen=True)
class Tunable:
    """The model with scales and shifts, and its shapes."""

    model: Model
    sites: tuple[Site, ...]
    shapes: Shapes

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(name for site in self.sites for name in (site.scale, site.shift))

    def neutral(self) -> list[Array]:
        """Scales of one and shifts of zero, in the order of ``inputs``."""
        return [
            value(site.shape, np.float32) for site in self.sites for value in (np.ones, np.zeros)
        ]


def tunable(model: Model, inputs: Mapping[str, Shape]) -> Tunable:
    """Scales and shifts behind all linear operators of which the shape is known; only 32-bit
    floats, of which gradients can be trusted. ``inputs`` are the sizes that will be run."""
    shapes = infer(model, inputs)
    tape = tape_for(model)
    sites, nodes = [], {}
    for linear in repairable(model):
        shape = shapes.shape.get(linear.y or "")
        if linear.y is None or not linear.affine:
            continue
        if not shape or shapes.dtype[linear.y] != TensorProto.FLOAT:
            continue
        own = (shape[1], *(1 for _ in shape[2:])) if linear.kind in CONVOLUTIONS else shape[-1:]
        site = Site(linear, tape.name("scale"), tape.name("shift"), own)
        sites.append(site)
        nodes[model.producer[linear.y]] = _tuned(model, tape, site)
    order = [n for i, node in enumerate(model.nodes) for n in nodes.get(i, [node])]
    skeleton = onnx.ModelProto()
    skeleton.CopyFrom(model.skeleton)
    for site in sites:
        for name in (site.scale, site.shift):
            skeleton.graph.input.append(
                helper.make_tensor_value_info(name, TensorProto.FLOAT, site.shape)
            )
    grown = replace(model, skeleton=skeleton)
    made = grown.with_graph(order, model.initializers.values(), value_info=())
    return Tunable(made, tuple(sites), infer(made, inputs))


def _tuned(model: Model, tape: Tape, site: Site) -> list[onnx.NodeProto]:
    """The node that computes the operator's output, and what tunes it."""
    y = site.linear.y
    assert y is not None
    node = onnx.NodeProto()
    node.CopyFrom(model.nodes[model.producer[y]])
    raw, scaled = tape.name("raw"), tape.name("scaled")
    node.output[list(node.output).index(y)] = raw
    return [
        node,
        helper.make_node("Mul", [raw, site.scale], [scaled]),
        helper.make_node("Add", [scaled, site.shift], [y]),
    ]


def spreads(made: Tunable, several: Sequence[Feeds]) -> Array:
    """The standard deviation of what each number of ``inputs`` tunes, all in a row: a channel's for
    a shift, 1 for a scale. Not tuned yet, on all these inputs together."""
    tape = tape_for(made.model)
    found = []
    for site in made.sites:
        assert site.linear.y is not None
        y = value_of(tape, made.shapes, site.linear.y)
        channel = y.rank - len(site.shape)
        axes = [axis for axis in range(y.rank) if axis != channel]
        mean = y.mean(axes)
        square = y.sum_of_squares(axes) * (site.shape[0] / int(np.prod(y.shape)))
        flat = (site.shape[0],)
        found += [mean.reshape(flat), square.reshape(flat)]
    total = (sum(value.shape[0] for value in found),)
    joined = tape.write("Concat", found, total, axis=0)
    values = dict(zip(made.inputs, made.neutral(), strict=True))
    runner = session(extended(made.model, tape, [joined], []))
    runs = [run_session(runner, {**feeds, **values})[0].astype(np.float64) for feeds in several]
    moments = np.mean(runs, axis=0)
    parts, start = [], 0
    for site in made.sites:
        m, s = moments[start : (start := start + 2 * site.shape[0])].reshape(2, -1)
        parts += [np.ones_like(m), np.sqrt(np.maximum(s - m**2, 0))]
    return np.concatenate(parts)


@dataclass(frozen=True)
class Compared:
    """An output that is to agree with the original's: the ``place`` among the outputs, the tensor
    that stands for it (logits where it is a table of classes), and the original's spread there."""

    place: int
    tensor: str
    logits: bool
    spread: float


def compared(model: Model, shapes: Shapes, several: Sequence[Sequence[Array]]) -> list[Compared]:
    """The float outputs of known shape; ``several`` are the original's on some inputs each."""
    logits = class_scores(model, shapes)
    found = []
    for place, value in enumerate(model.outputs):
        arrays = [expected[place] for expected in several]
        if shapes.dtype.get(value.name) != TensorProto.FLOAT or not arrays[0].size:
            continue
        if any(shapes.shape.get(value.name) != a.shape or not np.isfinite(a).all() for a in arrays):
            continue
        own = place == 0 and logits is not None
        tensor = logits if own and logits is not None else value.name
        found_there = [target(array, tensor != value.name, own) for array in arrays]
        wanted = np.stack(found_there).astype(np.float64)
        spread = float(np.square(wanted - wanted.mean()).mean())
        found.append(Compared(place, tensor, own, max(spread, TINY)))
    return found


def target(output: Array, probabilities: bool, logits: bool) -> Array:
    """What an output of the original says as the tensor that is compared: class scores count as
    logits, less each row's mean, which means nothing."""
    if probabilities:
        output = np.log(np.maximum(output, TINY)) if output.min() >= 0 else output
    if not logits:
        return output
    return np.asarray(output - output.mean(axis=1, keepdims=True))


def loss(made: Tunable, outputs: Sequence[Compared]) -> tuple[Model, tuple[str, ...]]:
    """The model with one output, the mean over ``outputs`` of squared error over spread (as in
    ``distortion``), and one input more for each of them: its target."""
    tape = tape_for(made.model)
    total: Value | None = None
    targets = []
    for one in outputs:
        y = value_of(tape, made.shapes, one.tensor)
        wanted = Value(tape, tape.name("target"), y.shape, y.dtype)
        targets.append(wanted)
        centred = y - y.mean([1]) if one.logits else y
        off = (centred - wanted).reshape((int(np.prod(y.shape)),))
        error = off.sum_of_squares([0]) * (1 / off.shape[0] / one.spread / len(outputs))
        total = error if total is None else total + error
    assert total is not None
    names = tuple(value.name for value in targets)
    return extended(made.model, tape, [total], targets), names
