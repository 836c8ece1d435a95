"""A model whose linear operators can be tuned, and how far its outputs are from another's.

Behind every linear operator stand a scale and a shift by channel, and before those whose input has
other readers a gain by channel: what they read alike is then scaled for each of them. All are graph
inputs: one run yields the loss and its gradient by all of them, and no weight is touched until they
are folded in.
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
class Dial:
    """Numbers to tune: a graph input of ``shape``, which broadcasts to what it moves, and the value
    at which it moves nothing."""

    name: str
    shape: Shape
    neutral: float


@dataclass(frozen=True)
class Site:
    """A linear operator whose outputs are scaled and shifted by channel, and its inputs by a gain
    where they have other readers: without those the scale of what computes them does the same."""

    linear: Linear
    scale: Dial
    shift: Dial
    gain: Dial | None

    @property
    def dials(self) -> tuple[Dial, ...]:
        return (
            (self.scale, self.shift) if self.gain is None else (self.scale, self.shift, self.gain)
        )


@dataclass(frozen=True)
class Tunable:
    """The model with scales, shifts and gains, and its shapes."""

    model: Model
    sites: tuple[Site, ...]
    shapes: Shapes

    @property
    def dials(self) -> tuple[Dial, ...]:
        return tuple(dial for site in self.sites for dial in site.dials)

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(dial.name for dial in self.dials)

    def neutral(self) -> list[Array]:
        """Scales and gains of one and shifts of zero, in the order of ``inputs``."""
        return [np.full(dial.shape, dial.neutral, np.float32) for dial in self.dials]


def tunable(model: Model, inputs: Mapping[str, Shape]) -> Tunable:
    """Dials at all linear operators of which the shape is known; only 32-bit floats, of which
    gradients can be trusted. ``inputs`` are the sizes that will be run."""
    shapes = infer(model, inputs)
    tape = tape_for(model)
    sites = []
    for linear in repairable(model):
        shape, read = shapes.shape.get(linear.y or ""), shapes.shape.get(linear.x)
        if linear.y is None or not linear.affine:
            continue
        if not shape or shapes.dtype[linear.y] != TensorProto.FLOAT:
            continue
        own = _by_channel(linear, shape)
        scale, shift = Dial(tape.name("scale"), own, 1.0), Dial(tape.name("shift"), own, 0.0)
        several = linear.x in model.producer and len(model.consumers[linear.x]) > 1
        gain = Dial(tape.name("gain"), _by_channel(linear, read), 1.0) if several and read else None
        sites.append(Site(linear, scale, shift, gain))
    skeleton = onnx.ModelProto()
    skeleton.CopyFrom(model.skeleton)
    for dial in (dial for site in sites for dial in site.dials):
        skeleton.graph.input.append(
            helper.make_tensor_value_info(dial.name, TensorProto.FLOAT, dial.shape)
        )
    grown = replace(model, skeleton=skeleton)
    nodes = _with_dials(model, tape, sites)
    made = grown.with_graph(nodes, model.initializers.values(), value_info=())
    return Tunable(made, tuple(sites), infer(made, inputs))


def _by_channel(linear: Linear, shape: Shape) -> Shape:
    """What broadcasts along the channels of the operator's input or output of that shape."""
    return (shape[1], *(1 for _ in shape[2:])) if linear.kind in CONVOLUTIONS else shape[-1:]


def _with_dials(model: Model, tape: Tape, sites: Sequence[Site]) -> list[onnx.NodeProto]:
    """The model's nodes, and those that apply the dials before and behind the sites."""
    nodes = [[node] for node in model.nodes]
    for site in sites:
        x, y = site.linear.x, site.linear.y
        assert y is not None
        if site.gain is not None:
            reader, gained = _copy(model.nodes[site.linear.node]), tape.name("gained")
            reader.input[list(reader.input).index(x)] = gained
            nodes[site.linear.node] = [
                helper.make_node("Mul", [x, site.gain.name], [gained]),
                reader,
            ]
        behind = nodes[model.producer[y]]  # the operator, or the Add that holds its bias
        writer, raw, scaled = _copy(behind[-1]), tape.name("raw"), tape.name("scaled")
        writer.output[list(writer.output).index(y)] = raw
        behind[-1:] = [
            writer,
            helper.make_node("Mul", [raw, site.scale.name], [scaled]),
            helper.make_node("Add", [scaled, site.shift.name], [y]),
        ]
    return [node for several in nodes for node in several]


def _copy(node: onnx.NodeProto) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    return copy


def spreads(made: Tunable, several: Sequence[Feeds]) -> Array:
    """The standard deviation of what each number of ``inputs`` tunes, all in a row: a channel's for
    a shift, 1 for a scale or a gain. Not tuned yet, on all these inputs together."""
    tape = tape_for(made.model)
    found = []
    for site in made.sites:
        assert site.linear.y is not None
        y = value_of(tape, made.shapes, site.linear.y)
        channel = y.rank - len(site.scale.shape)
        axes = [axis for axis in range(y.rank) if axis != channel]
        mean = y.mean(axes)
        square = y.sum_of_squares(axes) * (site.scale.shape[0] / int(np.prod(y.shape)))
        flat = (site.scale.shape[0],)
        found += [mean.reshape(flat), square.reshape(flat)]
    total = (sum(value.shape[0] for value in found),)
    joined = tape.write("Concat", found, total, axis=0)
    values = dict(zip(made.inputs, made.neutral(), strict=True))
    runner = session(extended(made.model, tape, [joined], []))
    runs = [run_session(runner, {**feeds, **values})[0].astype(np.float64) for feeds in several]
    moments = np.mean(runs, axis=0)
    parts, start = [], 0
    for site in made.sites:
        m, s = moments[start : (start := start + 2 * site.scale.shape[0])].reshape(2, -1)
        parts += [np.ones_like(m), np.sqrt(np.maximum(s - m**2, 0))]
        parts += [np.ones(int(np.prod(dial.shape))) for dial in site.dials[2:]]
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
