"""Linear operators held against what ONNX Runtime computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from graphs import Builder
from onnx import numpy_helper

from graphprune.linear import Linear, linears
from graphprune.model import Array, Model
from graphprune.oracle import with_outputs
from graphprune.rewriting import rewritten
from graphprune.runtime import run_session, session
from graphprune.shapes import infer
from graphprune.storage import load
from graphprune.unfold import inputs_at, outputs_at, positions

HEAD = '<ir_version: 8, opset_import: ["" : 17]> g '


def parsed(text: str, **weights: Array) -> Model:
    """A model from ONNX text, ``weights`` beside it."""
    proto = onnx.parser.parse_model(HEAD + text)
    proto.graph.initializer.extend(numpy_helper.from_array(w, n) for n, w in weights.items())
    return load(proto)


def draw(*shape: int, seed: int = 0, dtype: Any = np.float32) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def outputs(model: Model, feeds: Mapping[str, Array], *taps: str) -> list[Array]:
    """The graph's outputs, then ``taps``."""
    return run_session(session(with_outputs(model, taps, infer(model)), threads=1), feeds)


def only(model: Model) -> Linear:
    (linear,) = linears(model)
    return linear


def agree(model: Model, linear: Linear, x: Array, y: Array, most: int = 10**6) -> None:
    """X W + b at ``most`` sampled positions is what the runtime gave there."""
    where = positions(linear, y.shape, most, (1, 2))
    rows, wanted = inputs_at(linear, x, y.shape, where), outputs_at(linear, y, where)
    matrix = linear.matrix(model)
    assert rows.shape == (linear.groups, wanted.shape[1], linear.columns(x))
    assert matrix.shape == (linear.groups, wanted.shape[2], rows.shape[2])
    bias = linear.offset(model, matrix.shape[0] * matrix.shape[1])
    found = rows @ matrix.transpose(0, 2, 1) + bias[:, None]
    assert np.abs(found - wanted).max() < 1e-5 * max(1, np.abs(wanted).max())


def same_when_rewritten(model: Model, linear: Linear, feeds: Mapping[str, Array]) -> Model:
    """Rewriting a node with what it has already leaves the outputs as they are."""
    matrix = linear.matrix(model)
    bias = linear.offset(model, matrix.shape[0] * matrix.shape[1])
    again = rewritten(model, [(linear, matrix, bias)])
    for a, b in zip(outputs(model, feeds), outputs(again, feeds), strict=True):
        assert a.shape == b.shape
        assert np.allclose(a, b, rtol=1e-5, atol=1e-5)
    assert again.array(linear.weight).tobytes() == model.array(linear.weight).tobytes()
    assert (
        again.initializers[linear.weight].data_type == model.initializers[linear.weight].data_type
    )
    onnx.checker.check_model(again.assemble(), full_check=True)
    return again


@dataclass(frozen=True)
class Case:
    """One convolution: sizes of the input, of the weight, and attributes."""

    x: tuple[int, ...]
    w: tuple[int, ...]
    attributes: dict[str, Any]
    bias: bool = True
    op: str = "Conv"

    def model(self) -> Model:
        b = Builder(5)
        outs = self.w[0] if self.op == "Conv" else self.w[1] * self.attributes.get("group", 1)
        more = [b.weight(outs)] if self.bias else []
        y = b.add(self.op, "x", b.constant(draw(*self.w), "w"), *more, **self.attributes)
        sizes = [None] * len(self.x)
        return load(b.model({"x": list(self.x)}, {y: [self.x[0], outs, *sizes[2:]]}))


CONVOLUTIONS = {
    "1-D": Case((2, 3, 9), (4, 3, 3), {}),
    "1-D, strided": Case((2, 3, 9), (4, 3, 3), {"strides": [2], "pads": [1, 0]}),
    "2-D": Case((2, 3, 5, 6), (4, 3, 3, 3), {"pads": [1, 1, 1, 1]}),
    "2-D, no bias": Case((2, 3, 5, 6), (4, 3, 3, 3), {"pads": [1, 1, 1, 1]}, bias=False),
    "pointwise": Case((2, 3, 5, 6), (4, 3, 1, 1), {}),
    "3-D": Case((1, 2, 4, 3, 5), (3, 2, 2, 1, 3), {"pads": [0, 0, 1, 1, 0, 1]}),
    "oblong kernel": Case((1, 2, 6, 7), (3, 2, 1, 5), {"pads": [0, 2, 0, 2]}),
    "groups": Case((2, 6, 5, 5), (4, 3, 3, 3), {"group": 2, "pads": [1, 1, 1, 1]}),
    "depthwise": Case((2, 4, 5, 5), (4, 1, 3, 3), {"group": 4, "pads": [1, 1, 1, 1]}),
    "depthwise times two": Case((2, 3, 5, 5), (6, 1, 3, 3), {"group": 3}),
    "strides": Case((2, 3, 9, 8), (4, 3, 3, 2), {"strides": [2, 3], "pads": [1, 1, 1, 1]}),
    "asymmetric pads": Case((1, 3, 5, 6), (4, 3, 3, 3), {"pads": [2, 0, 1, 3]}),
    "dilations": Case((1, 3, 9, 9), (4, 3, 3, 3), {"dilations": [2, 3], "pads": [2, 3, 2, 3]}),
    "SAME_UPPER": Case((1, 3, 8, 7), (4, 3, 4, 2), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    "SAME_LOWER": Case((1, 3, 8, 7), (4, 3, 4, 2), {"auto_pad": "SAME_LOWER", "strides": [2, 2]}),
    "SAME, unpadded": Case(
        (1, 3, 9, 9), (4, 3, 1, 1), {"auto_pad": "SAME_UPPER", "strides": [4, 4]}
    ),
    "VALID": Case((1, 3, 8, 7), (4, 3, 4, 2), {"auto_pad": "VALID", "strides": [3, 2]}),
    "all at once": Case(
        (2, 4, 11, 9),
        (6, 2, 3, 2),
        {"group": 2, "strides": [2, 1], "dilations": [2, 3], "pads": [0, 2, 3, 1]},
    ),
}
TRANSPOSED = {
    "plain": Case((2, 3, 4, 5), (3, 4, 3, 3), {}),
    "1-D": Case((2, 3, 5), (3, 4, 3), {"strides": [2]}),
    "no bias": Case((2, 3, 4, 5), (3, 4, 3, 3), {}, bias=False),
    "groups": Case((2, 4, 4, 5), (4, 3, 3, 3), {"group": 2}),
    "depthwise": Case((2, 4, 4, 4), (4, 1, 2, 2), {"group": 4, "strides": [2, 2]}),
    "strides": Case((1, 3, 4, 5), (3, 4, 3, 3), {"strides": [2, 3]}),
    "wider than the kernel": Case((1, 3, 4, 4), (3, 4, 2, 2), {"strides": [3, 3]}),
    "asymmetric pads": Case((1, 3, 4, 5), (3, 4, 3, 3), {"strides": [2, 2], "pads": [2, 0, 1, 1]}),
    "dilations": Case((1, 3, 4, 5), (3, 4, 3, 2), {"dilations": [2, 3], "strides": [2, 1]}),
    "output padding": Case(
        (1, 3, 4, 5), (3, 4, 3, 3), {"strides": [2, 2], "pads": [1] * 4, "output_padding": [1, 1]}
    ),
    "all at once": Case(
        (2, 4, 4, 3),
        (4, 3, 3, 2),
        {"group": 2, "strides": [3, 2], "dilations": [1, 2], "pads": [1, 0, 2, 1]}
        | {"output_padding": [2, 1]},
    ),
}
CASES = {f"Conv {name}": case for name, case in CONVOLUTIONS.items()}
CASES |= {
    f"ConvTranspose {name}": Case(c.x, c.w, c.attributes, c.bias, "ConvTranspose")
    for name, c in TRANSPOSED.items()
}
