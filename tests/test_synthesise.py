"""Calibration inputs that are made up, and the range of pixels."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from calibrate_forms import Opened, classifier, normalised, opened, rows, transformer, typed
from graphs import Builder
from onnx import TensorProto

from graphprune.batch_norm import BatchNorm
from graphprune.calibrate import Preprocess, ranges, synthesise
from graphprune.calibrate.pictures import KINDS
from graphprune.calibrate.preprocess import picture_inputs
from graphprune.calibrate.ranges import COLOUR, INK, candidates
from graphprune.calibrate.synthesise import opened_sizes
from graphprune.errors import UsageError
from graphprune.model import Array
from graphprune.pipeline import Context
from graphprune.shapes import infer
from graphprune.storage import load
from graphprune_passes.fold_batch_norm import FoldBatchNorm

# synthesised


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pictures_are_pictures(kind: str, channels: int) -> None:
    made = KINDS[kind](6, channels, 20, 28, np.random.default_rng(0))
    assert (made.shape, made.dtype) == ((6, channels, 20, 28), np.float32)
    assert 0 <= made.min() < made.max() <= 1
    assert made[:, :1].std() > 0.1
    assert np.array_equal(made, KINDS[kind](6, channels, 20, 28, np.random.default_rng(0)))


def test_leaves_and_crops_are_smooth_and_fast() -> None:
    def roughness(made: Array) -> float:
        return float(np.abs(np.diff(made, axis=3)).mean() / made.std())

    start = time.process_time()
    rough = {
        kind: roughness(KINDS[kind](64, 3, 32, 32, np.random.default_rng(0))) for kind in KINDS
    }
    assert time.process_time() - start < 2
    assert max(rough["dead-leaves"], rough["crops"]) < 0.5 < rough["white"]


def test_synthesised_rows_do_not_depend_on_how_they_are_read(colour: Opened) -> None:
    samples = synthesise(*colour, 70, seed=4, preprocess=Preprocess())
    whole = rows(samples)
    assert whole.shape == (70, 3, 16, 16)
    pieces = [samples.read(i, i + 9)["x"] for i in range(0, 70, 9)]
    assert np.array_equal(whole, np.concatenate(pieces))
    again = synthesise(*colour, 70, seed=4, preprocess=Preprocess())
    other = synthesise(*colour, 70, seed=5, preprocess=Preprocess())
    assert np.array_equal(whole, rows(again))
    assert not np.array_equal(whole, rows(other))
    assert samples.key == again.key != other.key


def test_layouts_and_bytes() -> None:
    model, shapes = classifier("n", 24, 16, 3)
    (found,) = picture_inputs(model, shapes)
    assert (found.layout, found.channels, found.height, found.width) == ("nhwc", 3, 24, 16)
    assert rows(synthesise(model, shapes, 2, seed=0)).shape == (2, 24, 16, 3)
    small = classifier("n", 3, 4, 4, axes=(0, 1, 2, 3))
    assert picture_inputs(*small) == []
    b = Builder()
    y = b.add("Cast", "x", to=TensorProto.FLOAT)
    proto = typed(b, TensorProto.UINT8, {"x": ["n", 16, 16, 3]}, y)
    made = rows(synthesise(*opened(proto), 4, seed=0))
    assert made.dtype == np.uint8
    assert made.max() > 150


def test_open_sizes_are_opened_where_the_model_allows() -> None:
    free = classifier("n", 3, "h", "w", axes=(0, 1, 2, 3))
    assert opened_sizes(*free).inputs["x"] == (1, 3, 224, 224)
    assert opened_sizes(*transformer()).inputs["ids"] == (1, 32)
    b = Builder()
    y = b.add("MatMul", b.add("Reshape", "x", b.ints(-1, 1)), b.weight(1, 2))
    z = b.add("Add", y, b.add("Reshape", "x", b.ints(1, 1)))
    single = opened(b.model({"x": ["n", "t"]}, {z: [1, 2]}))
    assert opened_sizes(*single).inputs == single[1].inputs == {"x": (1, 1)}


def test_tokens_types_and_masks() -> None:
    model, shapes = transformer(vocabulary=50)
    made = synthesise(model, shapes, 40, seed=0).read(0, 40)
    assert all(array.shape == (40, 32) and array.dtype == np.int64 for array in made.values())
    assert (made["ids"].min(), made["ids"].max()) == (0, 49)
    assert not made["types"].any()
    assert (made["mask"] == 1).all()


def test_signals_are_half_white_half_pink() -> None:
    b = Builder()
    y = b.add("MatMul", "x", b.weight(256, 3))
    made = rows(synthesise(*opened(b.model({"x": ["n", 256]}, {y: ["n", 3]})), 32, seed=0))
    neighbours = [np.corrcoef(row[1:], row[:-1])[0, 1] for row in made]
    assert max(neighbours[0::2]) < 0.3 < min(neighbours[1::2])
    assert np.allclose(made.std(axis=1), 1, atol=0.3)


def test_kinds_and_types_that_are_none(colour: Opened) -> None:
    with pytest.raises(UsageError, match="no kind"):
        synthesise(*colour, 4, seed=0, kind="fractal")
    b = Builder()
    y = b.add("Cast", "x", to=TensorProto.FLOAT)
    proto = typed(b, TensorProto.STRING, {"x": ["n", 3]}, y)
    with pytest.raises(UsageError, match="type"):
        synthesise(*opened(proto), 4, seed=0)


# ranges


@pytest.mark.parametrize(
    ("channels", "factor", "shift", "least", "most"),
    [(3, 255.0, 0.0, 0, 255), (3, 1.0, 0.0, 0, 1), (3, 2.0, -1.0, -1, 1), (1, 255.0, 0.0, 0, 255)],
)
def test_range_is_read_off_the_stored_statistics(
    channels: int, factor: float, shift: float, least: float, most: float
) -> None:
    model, shapes = normalised("x", channels, factor, shift)
    made = rows(synthesise(model, shapes, 32, seed=0))
    assert made.min() == pytest.approx(least, abs=0.02 * most)
    assert made.max() == pytest.approx(most, abs=0.02 * most)


def test_evidence_is_perfect_where_it_should_be() -> None:
    rng = np.random.default_rng(0)
    mean, variance = rng.standard_normal(6), rng.random(6) + 0.5
    layer = BatchNorm("x", "y", mean, mean, mean, variance, 0.0)
    assert ranges.mismatch([layer], [(mean, variance)]) == pytest.approx(0, abs=1e-9)
    assert ranges.mismatch([layer], [(mean + 1, variance)]) > 0.2
    assert ranges.imbalance([(0 * mean, variance)]) == 0
    assert ranges.imbalance([(mean, 1e-4 * variance)]) > ranges.imbalance([(mean, variance)]) > 0


def test_biases_tell_the_range(resnet: Path) -> None:
    folded = FoldBatchNorm().run(load(resnet), Context()).model
    assert not ranges.first_layers(folded)
    made = rows(synthesise(folded, infer(folded), 16, seed=0), "image")
    assert made.max() > 200


def test_range_without_evidence_is_the_usual(colour: Opened) -> None:
    source = synthesise(*colour, 4, seed=0).source
    assert source == f"synthesised: dead leaves + photographs, 4, as {COLOUR}"
    assert candidates(3)[0] == COLOUR
    assert INK in candidates(1)


def test_range_of_the_shipped_model(resnet: Path) -> None:
    model = load(resnet)
    made = rows(synthesise(model, infer(model), 16, seed=0), "image")
    assert made.max() > 200


SHARED = Path(__file__).parents[2] / "shared" / "models"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared models are not here")


@pytest.mark.shared
@needs_shared
@pytest.mark.parametrize("name", ["resnet56_cifar10_bn", "resnet56_cifar10", "resnet20_cifar10"])
def test_range_of_real_models(name: str) -> None:
    model = load(SHARED / f"{name}.onnx")
    assert str(COLOUR) in synthesise(model, infer(model), 4, seed=0).source
