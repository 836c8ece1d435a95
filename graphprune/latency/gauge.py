"""Networks of usual shapes, from which a device is measured where no model is at hand."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import helper, parser

from graphprune.model import set_initializer

OPSET = 17
PICTURE = 224
STAGES = ((64, 56), (128, 28), (256, 14), (512, 7))  # channels, pixels
WIDTH, HIDDEN, HEADS, TOKENS = 768, 3072, 12, 128


def gauges() -> Iterator[tuple[str, onnx.ModelProto]]:
    """One convolutional network per stage of the usual four, and a transformer's block."""
    for channels, pixels in STAGES:
        yield f"convolutions of {channels} channels, {pixels} pixels", _stage(channels, pixels)
    yield f"transformer of width {WIDTH}, {TOKENS} tokens", _block()


def _stage(channels: int, pixels: int) -> onnx.ModelProto:
    """A residual block and an inverted bottleneck."""
    wide, stride = 4 * channels, PICTURE // pixels
    weights = {
        "stem": (channels, 3, stride, stride),
        "a": (channels, channels, 3, 3),
        "b": (channels, channels, 3, 3),
        "expand": (wide, channels, 1, 1),
        "depth": (wide, 1, 3, 3),
        "project": (channels, wide, 1, 1),
        "head": (channels, 1000),
    }
    text = f"""
    g (float[1,3,{PICTURE},{PICTURE}] x) => (float[1,1000] y) {{
      s = Conv<strides=[{stride},{stride}]>(x, stem)
      r = Relu(s)
      a1 = Conv<pads=[1,1,1,1]>(r, a)
      a2 = Relu(a1)
      b1 = Conv<pads=[1,1,1,1]>(a2, b)
      b2 = Add(b1, r)
      b3 = Relu(b2)
      e1 = Conv(b3, expand)
      e2 = Relu(e1)
      d1 = Conv<pads=[1,1,1,1], group={wide}>(e2, depth)
      d2 = Relu(d1)
      p1 = Conv(d2, project)
      p2 = Add(p1, b3)
      m = GlobalAveragePool(p2)
      f = Flatten(m)
      y = Gemm(f, head)
    }}"""
    return _model(text, weights)


def _block() -> onnx.ModelProto:
    """Attention and a feed-forward part around a residual stream."""
    size = WIDTH // HEADS
    weights = dict.fromkeys(("wq", "wk", "wv", "wo"), (WIDTH, WIDTH))
    weights |= {"up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
    heads = "\n".join(
        f"""{n}1 = MatMul(h, w{n})
        {n}2 = Reshape({n}1, split)
        {n}3 = Transpose<perm=[{"0,2,3,1" if n == "k" else "0,2,1,3"}]>({n}2)"""
        for n in "qkv"
    )
    text = f"""
    g (float[1,{TOKENS},{WIDTH}] x) => (float[1,{TOKENS},{WIDTH}] y)
      <int64[4] split = {{0, 0, {HEADS}, {size}}}, int64[3] join = {{0, 0, -1}}> {{
      h = LayerNormalization(x, one, zero)
      {heads}
      s = MatMul(q3, k3)
      p = Softmax<axis=-1>(s)
      o1 = MatMul(p, v3)
      o2 = Transpose<perm=[0,2,1,3]>(o1)
      o3 = Reshape(o2, join)
      o = MatMul(o3, wo)
      r = Add(o, x)
      n = LayerNormalization(r, one, zero)
      u1 = MatMul(n, up)
      u = Relu(u1)
      d = MatMul(u, down)
      y = Add(d, r)
    }}"""
    return _model(text, weights | {"one": (WIDTH,), "zero": (WIDTH,)})


def _model(text: str, weights: dict[str, tuple[int, ...]]) -> onnx.ModelProto:
    graph = parser.parse_graph(text)
    rng = np.random.default_rng(0)
    for name, shape in weights.items():
        scale = 1 / np.sqrt(np.prod(shape[1:]))
        values = (rng.standard_normal(shape) * scale).astype(np.float32)
        graph.initializer.append(set_initializer(name, values))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
