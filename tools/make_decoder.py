"""Write a decoder of any size with random weights: grouped queries, rotary embeddings, SwiGLU.

    python tools/make_decoder.py /tmp/decoder --parameters 7e9 --dtype float16

Weights go to shards beside the model, one at a time; memory stays that of one weight.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

HEAD = 128
VOCABULARY = 32000
SHARD = 2 << 30  # bytes at most, unless one weight is larger
KINDS = {"float16": (np.float16, TensorProto.FLOAT16), "float32": (np.float32, TensorProto.FLOAT)}


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    inner: int

    @property
    def parameters(self) -> int:
        attention = self.width * HEAD * (2 * self.heads + 2 * self.kv_heads)
        layer = attention + 3 * self.width * self.inner + 2 * self.width
        return self.layers * layer + 2 * VOCABULARY * self.width + self.width


def shape_of(parameters: float) -> Shape:
    """Sizes near a number of parameters; 7e9 gives 38 layers of width 4096."""
    best: Shape | None = None
    for heads in (4, 8, 12, 16, 20, 24, 32, 40, 48, 64):
        width = heads * HEAD
        inner = round(width * 2.6875 / 256) * 256
        for layers in range(1, 100):
            shape = Shape(width, layers, heads, max(1, heads // 4), inner)
            depth = abs(np.log(layers / (width / 128)))  # deep and narrow is as odd as the reverse
            miss = abs(shape.parameters / parameters - 1) + 0.05 * depth
            if best is None or miss < abs(best.parameters / parameters - 1) + 0.05 * abs(
                np.log(best.layers / (best.width / 128))
            ):
                best = shape
    assert best is not None
    return best


@dataclass
class Writer:
    """Nodes and weights of one model; weights are written as they come."""

    folder: Path
    dtype: str
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[onnx.TensorProto] = field(default_factory=list)
    shard: int = 0
    at: int = 0

    def add(self, op: str, *inputs: str, outputs: int = 1, name: str, **attributes: object) -> str:
        names = [name] if outputs == 1 else [f"{name}.{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, inputs, names, name=name, **attributes))
        return names[0]

    def small(self, name: str, value: np.ndarray) -> str:
        self.weights.append(numpy_helper.from_array(value, name))
        return name

    def weight(self, name: str, *dims: int, scale: float) -> str:
        kind, number = KINDS[self.dtype]
        size = int(np.prod(dims)) * np.dtype(kind).itemsize
        if self.at and self.at + size > SHARD:
            self.shard, self.at = self.shard + 1, 0
        location = f"model-{self.shard:05d}.data"
        offset = -(-self.at // 4096) * 4096
        rng = np.random.default_rng([len(self.weights), *dims])
        with (self.folder / location).open("r+b" if self.at else "wb") as file:
            file.seek(offset)
            rows = max(1, (1 << 24) // int(np.prod(dims[1:])))
            for start in range(0, dims[0], rows):
                part = (min(rows, dims[0] - start), *dims[1:])
                values = rng.random(part, dtype=np.float32) * 2 - 1
                file.write((values * np.float32(scale * 3**0.5)).astype(kind).tobytes())
        self.at = offset + size
        tensor = TensorProto(name=name, data_type=number, dims=dims)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", offset), ("length", size)):
            tensor.external_data.add(key=key, value=str(value))
        self.weights.append(tensor)
        return name

    def matmul(self, x: str, name: str, rows: int, columns: int) -> str:
        weight = self.weight(f"{name}.weight", rows, columns, scale=rows**-0.5)
        return self.add("MatMul", x, weight, name=name)

    def norm(self, x: str, name: str, width: int) -> str:
        """Root mean square, spelled out in float32 as exporters do."""
        kind, number = KINDS[self.dtype]
        wide = self.add("Cast", x, name=f"{name}.wide", to=TensorProto.FLOAT)
        square = self.add("Mul", wide, wide, name=f"{name}.square")
        mean = self.add("ReduceMean", square, "last", name=f"{name}.mean", keepdims=1)
        root = self.add("Sqrt", self.add("Add", mean, "epsilon", name=f"{name}.plus"),
                        name=f"{name}.root")  # fmt: skip
        ratio = self.add("Div", wide, root, name=f"{name}.ratio")
        narrow = self.add("Cast", ratio, name=f"{name}.narrow", to=number)
        scale = self.small(f"{name}.weight", np.ones(width, kind))
        return self.add("Mul", narrow, scale, name=name)


def decoder(folder: Path, shape: Shape, dtype: str, length: int) -> Path:
    """Write ``model.onnx`` and its shards to ``folder``. Input: tokens [1, length]."""
    folder.mkdir(parents=True, exist_ok=True)
    w = Writer(folder, dtype)
    kind, number = KINDS[dtype]
    w.small("last", np.array([-1], np.int64))
    w.small("epsilon", np.array(1e-5, np.float32))
    angle = np.outer(np.arange(length), 10000.0 ** -(np.arange(0, HEAD, 2) / HEAD))
    angle = np.concatenate([angle, angle], axis=1)[None, None]
    w.small("cos", np.cos(angle).astype(kind))
    w.small("sin", np.sin(angle).astype(kind))
    w.small("halves", np.array([HEAD // 2, HEAD // 2], np.int64))
    mask = np.triu(np.full((length, length), -10000.0), 1).astype(kind)
    w.small("mask", mask[None, None])
    w.small("root", np.array(HEAD**-0.5, kind))
    table = w.weight("embed.weight", VOCABULARY, shape.width, scale=1.0)
    x = w.add("Gather", table, "tokens", name="embed")
    for i in range(shape.layers):
        x = layer(w, x, f"layers.{i}", shape, length)
    logits = w.matmul(w.norm(x, "norm", shape.width), "logits", shape.width, VOCABULARY)
    graph = helper.make_graph(
        w.nodes,
        "decoder",
        [helper.make_tensor_value_info("tokens", TensorProto.INT64, [1, length])],
        [helper.make_tensor_value_info(logits, number, [1, length, VOCABULARY])],
        w.weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def layer(w: Writer, x: str, name: str, shape: Shape, length: int) -> str:
    h = w.norm(x, f"{name}.norm1", shape.width)
    groups = shape.heads // shape.kv_heads

    def heads(kind: str, count: int) -> str:
        flat = w.matmul(h, f"{name}.{kind}", shape.width, count * HEAD)
        sizes = w.small(f"{name}.{kind}.sizes", np.array([1, length, count, HEAD], np.int64))
        split = w.add("Reshape", flat, sizes, name=f"{name}.{kind}.split")
        return w.add("Transpose", split, name=f"{name}.{kind}.heads", perm=[0, 2, 1, 3])

    def rotated(x: str, name: str) -> str:
        w.add("Split", x, "halves", outputs=2, name=f"{name}.half", axis=3)
        minus = w.add("Neg", f"{name}.half.1", name=f"{name}.minus")
        turned = w.add("Concat", minus, f"{name}.half.0", name=f"{name}.turned", axis=3)
        a = w.add("Mul", x, "cos", name=f"{name}.cos")
        return w.add("Add", a, w.add("Mul", turned, "sin", name=f"{name}.sin"), name=f"{name}.pos")

    def repeated(x: str, name: str) -> str:
        """Each key and value head serves a group of query heads."""
        five = [1, shape.kv_heads, groups, length, HEAD]
        one = w.small(f"{name}.one", np.array([2], np.int64))
        wide = w.add("Unsqueeze", x, one, name=f"{name}.unsqueezed")
        sizes = w.small(f"{name}.five", np.array(five, np.int64))
        wide = w.add("Expand", wide, sizes, name=f"{name}.expanded")
        back = w.small(f"{name}.four", np.array([1, shape.heads, length, HEAD], np.int64))
        return w.add("Reshape", wide, back, name=f"{name}.repeated")

    q = rotated(heads("q", shape.heads), f"{name}.q")
    k = repeated(rotated(heads("k", shape.kv_heads), f"{name}.k"), f"{name}.k")
    v = repeated(heads("v", shape.kv_heads), f"{name}.v")
    kt = w.add("Transpose", k, name=f"{name}.kt", perm=[0, 1, 3, 2])
    scores = w.add("Mul", w.add("MatMul", q, kt, name=f"{name}.qk"), "root", name=f"{name}.scaled")
    masked = w.add("Add", scores, "mask", name=f"{name}.masked")
    weights = w.add("Softmax", masked, name=f"{name}.softmax", axis=-1)
    mixed = w.add("MatMul", weights, v, name=f"{name}.mixed")
    joined = w.add("Transpose", mixed, name=f"{name}.joined", perm=[0, 2, 1, 3])
    sizes = w.small(f"{name}.flat", np.array([1, length, shape.heads * HEAD], np.int64))
    flat = w.add("Reshape", joined, sizes, name=f"{name}.merged")
    o = w.matmul(flat, f"{name}.o", shape.heads * HEAD, shape.width)
    x = w.add("Add", x, o, name=f"{name}.mid")
    h = w.norm(x, f"{name}.norm2", shape.width)
    gate = w.matmul(h, f"{name}.gate", shape.width, shape.inner)
    up = w.matmul(h, f"{name}.up", shape.width, shape.inner)
    swish = w.add("Mul", gate, w.add("Sigmoid", gate, name=f"{name}.act"), name=f"{name}.swish")
    both = w.add("Mul", swish, up, name=f"{name}.gated")
    down = w.matmul(both, f"{name}.down", shape.inner, shape.width)
    return w.add("Add", x, down, name=f"{name}.out")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parameters", type=float, default=7e9)
    parser.add_argument("--dtype", choices=KINDS, default="float16")
    parser.add_argument("--length", type=int, default=16)
    given = parser.parse_args()
    shape = shape_of(given.parameters)
    path = decoder(given.folder, shape, given.dtype, given.length)
    print(f"{path}: {shape.parameters / 1e9:.2f} G parameters, {shape}")


if __name__ == "__main__":
    main()
