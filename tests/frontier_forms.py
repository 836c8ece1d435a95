"""Frontiers held against runs of the whole model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from graphprune.frontier import Frontier
from graphprune.model import Array, Model
from graphprune.oracle import with_outputs
from graphprune.runtime import run_session, session
from graphprune.shapes import infer
from graphprune.storage import load

HEAD = '<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]> g '
Given = Sequence[Mapping[str, Array]]


def parsed(text: str, **weights: Array) -> Model:
    """A model from ONNX text, ``weights`` beside it."""
    proto = onnx.parser.parse_model(HEAD + text)
    proto.graph.initializer.extend(numpy_helper.from_array(w, n) for n, w in weights.items())
    return load(proto)


def draw(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape, dtype=np.float32)


def opened(model: Model, feeds: Given, **options: Any) -> Frontier:
    return Frontier(model, feeds, **options, threads=1)


def whole(model: Model, feeds: Given, names: Sequence[str]) -> dict[str, list[Array]]:
    """The same tensors from runs of the whole model, with taps."""
    taps = [name for name in names if name not in model.output_names]
    shapes = infer(model)
    known = {name: kind or onnx.TensorProto.FLOAT for name, kind in shapes.dtype.items()}
    runner = session(with_outputs(model, taps, replace(shapes, dtype=known)), threads=1)
    table = [run_session(runner, feed) for feed in feeds]
    given = [value.name for value in model.outputs] + taps
    return {name: [row[given.index(name)] for row in table] for name in names}


def same(found: Sequence[Array], wanted: Sequence[Array]) -> bool:
    """Equal up to the rounding of other fusions."""
    return len(found) == len(wanted) and all(
        a.shape == b.shape and a.dtype == b.dtype and np.allclose(a, b, rtol=1e-4, atol=1e-5)
        for a, b in zip(found, wanted, strict=True)
    )


def walk(model: Model, feeds: Given, names: Sequence[str], **options: Any) -> Frontier:
    """Every name in turn, as wanted alone, against a whole run."""
    expected = whole(model, feeds, names)
    moving = opened(model, feeds, **options)
    for name in names:
        moving.advance([name])
        assert same(moving[name], expected[name]), name
    return moving


def names_of(model: Model) -> list[str]:
    return [name for node in model.nodes for name in node.output if name]
