"""Operators that move elements: the gradient moves them back.

Whatever picks, repeats or mixes positions along single axes (strided Slice, Gather, Pad by
reflection, Resize) is a constant matrix along each of them, and goes back by its transpose.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

from graphprune.errors import ModelError
from graphprune.gradient.rules import Step, StopError, one_hot, rule
from graphprune.model import Array, Model, set_initializer
from graphprune.runtime import run_session, session


@rule("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def reshape(node: Step) -> None:
    node.give(0, node.g.reshape(node.x().shape))


@rule("Transpose")
def transpose(node: Step) -> None:
    order = node.attribute("perm") or list(range(node.x().rank))[::-1]
    node.give(0, node.g.transpose([int(i) for i in np.argsort(order)]))


@rule("Expand")
def expand(node: Step) -> None:
    node.give(0, node.g.sum_to(node.x().shape))


@rule("Tile")
def tile(node: Step) -> None:
    """Each axis of length n, repeated r times, is (r, n): sum over r."""
    x, g = node.x(), node.g
    pairs = [(whole // n, n) for whole, n in zip(g.shape, x.shape, strict=True)]
    split = g.reshape([n for pair in pairs for n in pair])
    node.give(
        0, split.sum([2 * i for i, (times, _) in enumerate(pairs) if times > 1]).reshape(x.shape)
    )


@rule("Concat")
def concat(node: Step) -> None:
    axis = node.attribute("axis") % node.g.rank
    start = 0
    for index in range(len(node.node.input)):
        stop = start + node.x(index).shape[axis]
        if node.wants(index):
            node.give(index, node.g.slice(axis, start, stop))
        start = stop


@rule("Split")
def split(node: Step) -> None:
    """The pieces' cotangents side by side, zeros for those that nobody asked about."""
    x = node.x()
    axis = node.attribute("axis", 0) % x.rank
    pieces = []
    for name, g in zip(node.node.output, node.cotangents, strict=True):
        pieces.append(g if g is not None else x.constant(np.zeros(node.shape_of(name))))
    node.give(0, x.tape.write("Concat", pieces, x.shape, axis=axis))


@rule("Slice")
def slice_(node: Step) -> None:
    x, g = node.x(), node.g
    starts, ends = node.numbers("starts", 1), node.numbers("ends", 2)
    if starts is None or ends is None:
        raise StopError("no bounds")
    axes = node.numbers("axes", 3) or list(range(len(starts)))
    steps = node.numbers("steps", 4) or [1] * len(starts)
    before, after = [0] * x.rank, [0] * x.rank
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        size = x.shape[axis]
        picked = np.arange(size)[_bounded(start, end, step, size)]
        if not picked.size:
            return  # nothing was taken, so nothing flows back
        if step == 1:
            before[axis], after[axis] = int(picked[0]), size - 1 - int(picked[-1])
        else:
            g = g.along(axis % x.rank, one_hot(picked, size).T)
    node.give(0, g.pad(before, after))


def _bounded(start: int, end: int, step: int, size: int) -> slice:
    """ONNX's bounds in numpy's terms: below −size means before the first element."""
    before_first = step < 0 and end < -size
    return slice(start, None if before_first else end, step)


@rule("Gather")
def gather(node: Step) -> None:
    """Constant indices only; index axes of any number replace the axis."""
    x, indices = node.x(), node.constant(1)
    axis = node.attribute("axis", 0) % x.rank
    picked = indices.reshape(-1) % x.shape[axis]
    flat = node.g.reshape((*x.shape[:axis], picked.size, *x.shape[axis + 1 :]))
    node.give(0, flat.along(axis, one_hot(picked, x.shape[axis]).T))


@rule("Pad")
def pad(node: Step) -> None:
    x, g = node.x(), node.g
    pads = node.numbers("pads", 1)
    axes = node.numbers("axes", 3) or list(range(x.rank))
    if pads is None:
        raise StopError("no pads")
    mode = node.attribute("mode", "constant")
    before, after = [0] * x.rank, [0] * x.rank
    for position, axis in enumerate(axes):
        before[axis], after[axis] = pads[position], pads[position + len(axes)]
    if mode != "constant":
        for axis in range(x.rank):
            b, a = before[axis], after[axis]
            if min(b, a) < 0:
                raise StopError(f"negative pads in mode {mode}")
            if b or a:
                size = x.shape[axis]
                copied = np.pad(np.arange(size), (b, a), mode=mode)
                g = g.along(axis, one_hot(copied, size).T)
        node.give(0, g)
        return
    node.give(0, g.pad([-n for n in before], [-n for n in after]))


@rule("DepthToSpace")
def depth_to_space(node: Step) -> None:
    x, b = node.x(), node.attribute("blocksize")
    n, c, h, w = x.shape
    cells = node.g.reshape((n, c // b**2, h, b, w, b))
    crd = node.attribute("mode", "DCR") == "CRD"
    order = [0, 1, 3, 5, 2, 4] if crd else [0, 3, 5, 1, 2, 4]
    node.give(0, cells.transpose(order).reshape(x.shape))


@rule("SpaceToDepth")
def space_to_depth(node: Step) -> None:
    x, b = node.x(), node.attribute("blocksize")
    n, c, h, w = x.shape
    cells = node.g.reshape((n, b, b, c, h // b, w // b))
    node.give(0, cells.transpose([0, 3, 4, 1, 5, 2]).reshape(x.shape))


@rule("Resize", "Upsample")
def resize(node: Step) -> None:
    """Interpolation is separable: its matrix along one axis is what it makes of the identity."""
    x, g = node.x(), node.g
    if node.attribute("coordinate_transformation_mode", "") == "tf_crop_and_resize":
        raise StopError("a crop while resizing")
    for axis in range(x.rank):
        if x.shape[axis] != g.shape[axis]:
            scale = _scale(node, axis, x.shape[axis], g.shape[axis])
            g = g.along(axis, _interpolation(node, x.shape[axis], g.shape[axis], scale).T)
    node.give(0, g)


def _scale(node: Step, axis: int, size: int, wanted: int) -> float:
    """The scale as the model gives it (it decides the grid), else the ratio of the sizes."""
    index = 2 if node.node.op_type == "Resize" and node.tape.opset >= 11 else 1
    scales = node.attribute("scales")
    if scales is None and node.has(index):
        scales = node.constant(index)
    axes = node.attribute("axes") or list(range(node.x().rank))
    axes = [a % node.x().rank for a in axes]
    if scales is None or not len(scales) or axis not in axes:
        return wanted / size
    return float(scales[axes.index(axis)])


def _interpolation(node: Step, size: int, wanted: int, scale: float) -> Array:
    """[wanted, size]: run the node over the rows of an identity."""
    if node.node.op_type == "Upsample" and node.attribute("scales") is not None:
        raise StopError("Upsample of opset 7")
    lone = onnx.NodeProto()
    lone.CopyFrom(node.node)
    del lone.attribute[:]
    left_out = ("axes", "scales", "keep_aspect_ratio_policy")
    lone.attribute.extend(a for a in node.node.attribute if a.name not in left_out)
    constants = {
        "x": np.eye(size, dtype=np.float32)[None, None],
        "roi": np.zeros(0, np.float32),  # not optional before opset 13
        "scales": np.array([1, 1, 1, scale], np.float32),
    }
    with_roi = lone.op_type == "Resize" and node.tape.opset >= 11
    lone.input[:] = list(constants) if with_roi else ["x", "scales"]
    lone.output[:] = ["y"]
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    skeleton = helper.make_model(
        helper.make_graph([lone], "interpolation", [], [result]),
        opset_imports=node.model.skeleton.opset_import,
        ir_version=node.model.skeleton.ir_version,
    )
    tensors = {name: set_initializer(name, constants[name]) for name in lone.input}
    try:
        matrix = run_session(session(Model(skeleton, tensors), threads=1), {})[0][0, 0].T
    except ModelError as error:
        raise StopError(f"resized along one axis alone: {error.what}") from error
    if len(matrix) != wanted:
        raise StopError("sizes do not follow the scale")
    return np.asarray(matrix)
