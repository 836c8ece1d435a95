"""Outputs that all but vanish behind a Sigmoid are held to the proofs by what the Sigmoid reads."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from graphprune.analysis import Analysis, analyse
from graphprune.errors import VerificationError
from graphprune.model import Array, Model
from graphprune.oracle import Compared, relative_error
from graphprune.runtime import opened, random_inputs
from graphprune.storage import load
from graphprune.validate import TOLERANCE, verify_same

TEXT = """<ir_version: 8, opset_import: ["": 17]> g (float[1,8] x) => (float[1,3] y)
{ h = MatMul(x, W) r = Relu(h) s = MatMul(r, V) z = Add(s, B) y = Sigmoid(z) }"""
RNG = np.random.default_rng(0)
W = (RNG.standard_normal((8, 4096)) * 2).astype(np.float32)
V = RNG.standard_normal((4096, 3)).astype(np.float32)
ORDER = RNG.permutation(4096)
FAR_BELOW = 12  # exp(-12) is 6e-6


def model(w: Array, v: Array, bias: Array) -> Model:
    made = onnx.parser.parse_model(TEXT)
    for name, array in (("W", w), ("V", v), ("B", bias.astype(np.float32))):
        made.graph.initializer.append(numpy_helper.from_array(array, name))
    return load(made)


def analysed() -> tuple[Analysis, Array]:
    """A model whose outputs are about ``exp(-FAR_BELOW)`` on the inputs of the proof, and its bias.

    Its sums are large before the bias takes them there, and so is their noise.
    """
    plain = analyse(model(W, V, np.zeros(3)))
    x = random_inputs(plain.model, plain.shapes, 0)["x"].astype(np.float64)
    bias = -FAR_BELOW - (np.maximum(x @ W, 0) @ V)[0]
    return analyse(model(W, V, bias)), bias


def test_another_order_of_sums_is_no_other_model() -> None:
    analysis, bias = analysed()
    other = model(W[:, ORDER], V[ORDER], bias)
    feeds = random_inputs(analysis.model, analysis.shapes, 0)
    outputs = [opened(each)(feeds) for each in (analysis.model, other)]
    assert relative_error(*outputs) > TOLERANCE
    verify_same(analysis.model, other, analysis)


def test_another_model_is_one_however_small_its_outputs_are() -> None:
    analysis, bias = analysed()
    with pytest.raises(VerificationError):
        verify_same(analysis.model, model(W, V, bias + 0.1), analysis)


def test_a_softmax_of_large_numbers_has_their_noise() -> None:
    """Two scores of thousands that all but meet: their noise, of 1e-7, is much of the answer."""
    told = Compared(["y", "z"], {"y": "z"}, frozenset("y"))
    z = np.array([[5000.0, 5000.0]])
    moved = z + np.array([[2e-3, 0.0]])
    outputs = [np.exp(each - each.max()) / np.exp(each - each.max()).sum() for each in (z, moved)]
    assert relative_error(outputs[:1], outputs[1:]) > TOLERANCE
    assert told.error([outputs[0], z], [outputs[1], moved]) < TOLERANCE / 10
    assert told.error([outputs[0], z], [outputs[1], z * 1.001]) > TOLERANCE


def test_the_position_of_the_largest_hides_nothing() -> None:
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[2,8] x) => (int64[2,1] y)
    { h = MatMul(x, W) z = Add(h, B) y = ArgMax<axis=1>(z) }"""

    def made(scale: float) -> Model:
        proto = onnx.parser.parse_model(text)
        for name, array in (("W", W[:, :5] * scale), ("B", np.arange(5, dtype=np.float32) * 1e4)):
            proto.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
        return load(proto)

    analysis = analyse(made(1.0))
    verify_same(analysis.model, made(1.0), analysis)
    with pytest.raises(VerificationError):
        verify_same(analysis.model, made(-100.0), analysis)


def test_masked_logits_hide_no_other_model() -> None:
    """What is added to logits that are not to count leaves the others on their own scale."""
    text = TEXT.replace("y = Sigmoid(z)", "m = Add(z, M) y = Softmax<axis=-1>(m)")

    def made(factor: float) -> Model:
        proto = onnx.parser.parse_model(text)
        mask = np.array([0, 0, -1e9], np.float32)
        arrays = {"W": W, "V": V * factor, "B": np.zeros(3), "M": mask}
        for name, array in arrays.items():
            proto.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
        return load(proto)

    analysis = analyse(made(1e-3))
    verify_same(analysis.model, made(1e-3), analysis)
    with pytest.raises(VerificationError):
        verify_same(analysis.model, made(1.1e-3), analysis)


def test_what_an_activation_reads_may_stand_in_another_order() -> None:
    text = TEXT.replace("y = Sigmoid(z)", "g = Sigmoid(z) y = Gather<axis=1>(g, I)")

    def made(order: list[int]) -> Model:
        proto = onnx.parser.parse_model(text)
        back = np.argsort(order).astype(np.int64)
        arrays = {"W": W, "V": V[:, order] * 1e-3, "B": np.zeros(3), "I": back}
        for name, array in arrays.items():
            kept = array if name == "I" else array.astype(np.float32)
            proto.graph.initializer.append(numpy_helper.from_array(kept, name))
        return load(proto)

    analysis = analyse(made([0, 1, 2]))
    verify_same(analysis.model, made([2, 0, 1]), analysis)
