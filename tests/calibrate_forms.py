"""Small models by what they take, files of samples, and samples read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from graphs import Builder
from onnx import TensorProto, helper
from PIL import Image

from graphprune.calibrate.pictures import KINDS
from graphprune.calibrate.samples import Samples
from graphprune.model import Array, Model
from graphprune.shapes import Shapes, infer
from graphprune.storage import load

Opened = tuple[Model, Shapes]


def opened(proto: onnx.ModelProto) -> Opened:
    model = load(proto)
    return model, infer(model)


def classifier(*shape: Any, channels: int = 3, axes: tuple[int, ...] = (0, 3, 1, 2)) -> Opened:
    """Transpose (where asked for) → Conv → Relu → pool → MatMul, on an input of ``shape``."""
    b = Builder(3)
    x = "x" if axes == (0, 1, 2, 3) else b.add("Transpose", "x", perm=list(axes))
    x = b.add("Relu", b.conv(x, channels, 8))
    y = b.add("MatMul", b.add("Flatten", b.add("GlobalAveragePool", x)), b.weight(8, 5))
    return opened(b.model({"x": list(shape)}, {y: [shape[0], 5]}))


def transformer(vocabulary: int = 50) -> Opened:
    """Ids, types and mask [n, t] → embeddings → masked mean → MatMul."""
    b = Builder(1)
    words = b.add("Gather", b.weight(vocabulary, 8), "ids")
    types = b.add("Gather", b.weight(2, 8), b.add("Cast", "types", to=TensorProto.INT64))
    mask = b.add("Unsqueeze", b.add("Cast", "mask", to=TensorProto.FLOAT), b.ints(2))
    kept = b.add("Mul", b.add("Add", words, types), mask)
    y = b.add("MatMul", b.add("ReduceSum", kept, b.ints(1), keepdims=0), b.weight(8, 3))
    return opened(
        typed(b, TensorProto.INT64, {name: ["n", "t"] for name in ("ids", "types", "mask")}, y)
    )


def typed(b: Builder, kind: int, inputs: dict[str, list[Any]], output: str) -> onnx.ModelProto:
    """A model whose inputs are all of one type; its output is float, of an open shape."""
    takes = [helper.make_tensor_value_info(name, kind, dims) for name, dims in inputs.items()]
    gives = [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)]
    graph = helper.make_graph(b.nodes, "g", takes, gives, b.initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def stored(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def picture(path: Path, size: tuple[int, int] = (20, 30), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(path.name)).integers(0, 256, (*size[::-1], 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def rows(samples: Samples, name: str = "x") -> Array:
    return samples.read(0, samples.count)[name]


def normalised(name: str, channels: int, factor: float, shift: float = 0.0) -> Opened:
    """Conv → BatchNormalization with the statistics of photographs · factor + shift."""
    b = Builder(7)
    pixels = KINDS["crops"](64, channels, 16, 16, np.random.default_rng(11)) * factor + shift
    weight = b.rng.standard_normal((12, channels, 1, 1)).astype(np.float32)
    response = np.einsum("oc,nchw->nohw", weight[:, :, 0, 0], pixels)
    mean, variance = response.mean((0, 2, 3)), response.var((0, 2, 3))
    ones, zeros = np.ones(12, np.float32), np.zeros(12, np.float32)
    stats = [b.constant(v.astype(np.float32)) for v in (ones, zeros, mean, variance)]
    x = b.add("BatchNormalization", b.add("Conv", name, b.constant(weight)), *stats)
    y = b.add("GlobalAveragePool", b.add("Relu", x))
    return opened(b.model({name: ["n", channels, 16, 16]}, {y: ["n", 12, 1, 1]}))
