"""Inputs that match stored statistics or predictions, on small networks with known answers."""

from __future__ import annotations

import numpy as np
import onnx.parser
import pytest
from onnx import helper, numpy_helper

from graphprune.batch_norm import batch_norms
from graphprune.calibrate.match import (
    Matched,
    class_scores,
    match_predictions,
    match_statistics,
)
from graphprune.errors import ModelError, UsageError
from graphprune.model import Array, Model
from graphprune.runtime import run_session, session
from graphprune.shapes import infer
from graphprune.storage import load

BODY = """
  axis = Constant<value = int64 {{0}}>() i = {before} a = Conv<pads=[1,1,1,1]>(i, w1)
  b = BatchNormalization(a, s1, s1, m1, v1) c = Relu(b) h = {between}
  d = Conv<pads=[1,1,1,1], strides=[2,2]>(h, w2) e = BatchNormalization(d, s2, s2, m2, v2)
  f = Relu(e) p = GlobalAveragePool(f) q = Flatten(p) z = MatMul(q, w3) y = {last}
"""
SHAPES = {"w1": (6, 3, 3, 3), "w2": (8, 6, 3, 3), "w3": (8, 4), "s1": (6,), "s2": (8,)}


def network(
    batch: str = "N",
    before: str = "Identity(x)",
    between: str = "Identity(c)",
    last: str = "Identity(z)",
) -> Model:
    """Two convolutions whose BatchNormalization holds the moments of smooth pictures."""
    head = f'<ir_version: 8, opset_import: ["": 17]> g (float[{batch},3,12,12] x) => (float y) '
    body = BODY.format(before=before, between=between, last=last)
    proto = onnx.parser.parse_model(head + "{" + body + "}")
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(shape) * 0.4 for name, shape in SHAPES.items()}
    arrays["w3"] = 4 * (arrays["w3"] - arrays["w3"].mean(0))  # no class wins by itself
    arrays |= {"m1": np.zeros(6), "v1": np.ones(6), "m2": np.zeros(8), "v2": np.ones(8)}
    for tensor in "a", "d":  # the moments of the first layer decide what the second one sees
        arrays |= _moments(proto, arrays, tensor)
    return _filled(proto, arrays)


def _filled(proto: onnx.ModelProto, arrays: dict[str, Array]) -> Model:
    whole = onnx.ModelProto()
    whole.CopyFrom(proto)
    for name, array in arrays.items():
        value = np.asarray(array, np.float32)
        whole.graph.initializer.append(numpy_helper.from_array(value, name))
    return load(whole)


def _moments(proto: onnx.ModelProto, arrays: dict[str, Array], tensor: str) -> dict[str, Array]:
    """What a BatchNormalization would have stored after training on smooth pictures."""
    tapped = onnx.ModelProto()
    tapped.CopyFrom(proto)
    tapped.graph.output[0].name = tensor
    tapped.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "N"
    runner = session(_filled(tapped, arrays), 1)
    answer = run_session(runner, {"x": pictures(64, seed=9, smooth=True)})[0]
    number = "1" if tensor == "a" else "2"
    return {"m" + number: answer.mean((0, 2, 3)), "v" + number: answer.var((0, 2, 3))}


def pictures(count: int, seed: int = 1, smooth: bool = False) -> Array:
    rng = np.random.default_rng(seed)
    noise = rng.uniform(-1, 1, (count, 3, 12, 12))
    if smooth:
        noise = (noise + np.roll(noise, 1, 2) + np.roll(noise, 1, 3)) / 2 + 0.3
    return np.clip(noise, -1, 1).astype(np.float32)


def matched(model: Model, **options: int) -> Matched:
    start = pictures(options.pop("count", 24))
    return match_statistics(model, infer(model), "x", start, -1.0, 1.0, threads=1, **options)


def test_matching_lowers_the_loss_more_than_fivefold() -> None:
    result = matched(network())
    assert result.loss_after < result.loss_before / 5
    assert result.pictures.shape == (24, 3, 12, 12)
    assert result.pictures.dtype == np.float32
    assert np.abs(result.pictures).max() <= 1
    assert result.stopped == ()


def test_the_loss_is_the_one_of_its_definition() -> None:
    model = network()
    x = pictures(24)
    proto = model.assemble()
    proto.graph.output[0].name = "a"
    proto.graph.output.append(helper.make_tensor_value_info("d", onnx.TensorProto.FLOAT, None))
    inner = run_session(session(load(proto), 1), {"x": x})
    terms = []
    for layer, answer in zip(batch_norms(model), inner, strict=True):
        spread = layer.variance + layer.epsilon
        mean = answer.mean((0, 2, 3), dtype=np.float64)
        variance = answer.var((0, 2, 3), dtype=np.float64) + layer.epsilon
        terms.append(((mean - layer.mean) ** 2 / spread).mean())
        terms[-1] += (np.log(variance / spread) ** 2).mean()
    assert matched(model, steps=0).loss_before == pytest.approx(np.mean(terms), rel=1e-4)


def test_batches_share_their_statistics() -> None:
    whole, parts = matched(network()), matched(network(), batch=8)
    assert parts.loss_before == pytest.approx(whole.loss_before, rel=1e-4)
    assert parts.loss_after < parts.loss_before / 5
    uneven = matched(network(), count=21, batch=8)
    assert len(uneven.pictures) == 21


def test_a_fixed_batch_of_one_is_enough() -> None:
    result = matched(network(batch="1"))
    assert result.loss_after < result.loss_before / 5


def test_matching_is_deterministic() -> None:
    first, second = (matched(network(), batch=8, steps=5) for _ in range(2))
    np.testing.assert_array_equal(first.pictures, second.pictures)


def test_a_stop_is_reported_and_the_layers_before_it_still_match() -> None:
    result = matched(network(between="CumSum(c, axis)"))
    assert result.stopped == ("CumSum (h: no rule)",)
    assert not np.array_equal(result.pictures, pictures(24))
    blind = network(before="CumSum(x, axis)")
    untouched = matched(blind)
    assert untouched.stopped == ("CumSum (i: no rule)",)
    assert untouched.loss_after == untouched.loss_before
    np.testing.assert_array_equal(untouched.pictures, pictures(24))


def test_progress_is_told() -> None:
    heard: list[float] = []
    model = network()
    match_statistics(
        model, infer(model), "x", pictures(4), -1.0, 1.0, steps=4, progress=heard.append
    )
    assert heard == [0.25, 0.5, 0.75, 1.0]


def test_bounds_may_differ_by_channel() -> None:
    model = network()
    low, high = np.array([-0.5, -1, 0]), np.array([0.5, 1, 1])
    result = match_statistics(model, infer(model), "x", pictures(8), low, high, steps=5)
    assert (result.pictures.min((0, 2, 3)) >= low).all()
    assert (result.pictures.max((0, 2, 3)) <= high).all()


@pytest.mark.parametrize("last", ["Identity(z)", "Softmax(z)"])
def test_predictions_become_confident_and_balanced(last: str) -> None:
    model = network(last=last)
    shapes = infer(model)
    assert class_scores(model, shapes) == ("z" if last == "Softmax(z)" else "y")
    result = match_predictions(
        model, shapes, "x", pictures(24), -1.0, 1.0, batch=12, rate=0.1, threads=1
    )
    assert result.loss_after < result.loss_before * 0.75
    runner = session(model, 1)
    answers = run_session(runner, {"x": result.pictures})[0].argmax(1)
    assert set(answers) == {0, 1, 2, 3}


def test_what_cannot_be_matched_is_said() -> None:
    model = network()
    shapes = infer(model)
    with pytest.raises(UsageError, match="finite"):
        match_statistics(model, shapes, "x", pictures(4), 1.0, 1.0)
    with pytest.raises(UsageError, match="float32 input"):
        match_statistics(model, shapes, "no such input", pictures(4), -1.0, 1.0)
    text = '<ir_version: 8, opset_import: ["": 17]> g (float[N,3,12,12] x) => (float y) {y=Relu(x)}'
    bare = load(onnx.parser.parse_model(text))
    with pytest.raises(ModelError, match="BatchNormalization"):
        match_statistics(bare, infer(bare), "x", pictures(4), -1.0, 1.0)
    with pytest.raises(ModelError, match="class scores"):
        match_predictions(bare, infer(bare), "x", pictures(4), -1.0, 1.0)
