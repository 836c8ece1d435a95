"""Calibration inputs: arrays, pictures, synthesised ones, and the range of pixels."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import Builder
from onnx import TensorProto, helper
from PIL import Image

from graphprune.batch_norm import BatchNorm
from graphprune.calibrate import Preprocess, batches, files, open_samples, ranges, synthesise
from graphprune.calibrate.pictures import KINDS
from graphprune.calibrate.preprocess import PictureInput, picture_inputs
from graphprune.calibrate.ranges import BYTES, COLOUR, INK, candidates
from graphprune.calibrate.samples import Samples, rows_per_run
from graphprune.calibrate.synthesise import opened_sizes
from graphprune.errors import UsageError
from graphprune.model import Array, Model
from graphprune.pipeline import Context
from graphprune.runtime import run_session, session
from graphprune.shapes import Shapes, infer
from graphprune.storage import load
from graphprune_passes.fold_batch_norm import FoldBatchNorm

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


@pytest.fixture
def colour() -> Opened:
    """A classifier of pictures [n, 3, 16, 16]."""
    return classifier("n", 3, 16, 16, axes=(0, 1, 2, 3))


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


# npz


def test_npz_gives_rows_of_the_whole_file_in_the_inputs_type(
    tmp_path: Path, colour: Opened
) -> None:
    data = np.random.default_rng(0).integers(0, 256, (9, 3, 16, 16), np.uint8)
    path = stored(tmp_path / "c.npz", x=data, labels=np.array(["a"] * 9))
    samples = open_samples(path, *colour, count=7, seed=0)
    assert (samples.count, samples.source) == (7, "7 rows of c.npz")
    assert rows(samples).dtype == np.float32
    taken = rows(samples)
    assert {row.tobytes() for row in taken.astype(np.uint8)} == {
        data[i].tobytes() for i in (0, 1, 2, 3, 5, 6, 7)
    }  # a file may be sorted by class
    assert np.array_equal(samples.read(5, 99)["x"], taken[5:])
    assert open_samples(path, *colour, count=99, seed=0).count == 9


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_is_mapped_and_not_loaded(
    tmp_path: Path, colour: Opened, monkeypatch: pytest.MonkeyPatch, save: Any
) -> None:
    path = tmp_path / "c.npz"
    save(path, x=np.zeros((50, 3, 16, 16), np.float32))
    mapped: list[Array] = []
    original = files._mapped
    monkeypatch.setattr(files, "_mapped", lambda *a: mapped.append(original(*a)) or mapped[-1])
    samples = open_samples(path, *colour, count=50, seed=0)
    assert [type(array) for array in mapped] == [np.memmap]
    path.unlink()  # the copy is its own
    assert rows(samples).shape == (50, 3, 16, 16)


def test_npz_in_column_order(tmp_path: Path, colour: Opened) -> None:
    data = np.asfortranarray(np.random.default_rng(0).random((4, 3, 16, 16)))
    samples = open_samples(stored(tmp_path / "c.npz", x=data), *colour, count=4, seed=0)
    found = {row.tobytes() for row in rows(samples)}
    assert found == {row.tobytes() for row in np.ascontiguousarray(data.astype(np.float32))}


def test_key_follows_the_content(tmp_path: Path, colour: Opened) -> None:
    data = np.zeros((4, 3, 16, 16))
    first = open_samples(stored(tmp_path / "a.npz", x=data), *colour, count=4, seed=0)
    again = open_samples(stored(tmp_path / "b.npz", x=data), *colour, count=4, seed=1)
    other = open_samples(stored(tmp_path / "c.npz", x=data + 1), *colour, count=4, seed=0)
    assert len(first.key) == 64
    assert first.key == again.key != other.key


@pytest.mark.parametrize(
    ("arrays", "word"),
    [
        ({"y": np.zeros(3)}, "one array for each"),
        ({"x": np.zeros((4, 3, 16, 17))}, "does not fit"),
        ({"x": np.zeros((4, 3, 16))}, "does not fit"),
        ({"x": np.full((4, 3, 16, 16), "a")}, "not numbers"),
        ({"x": np.array([{}])}, "not numbers"),
        ({"x": np.zeros((0, 3, 16, 16))}, "empty"),
    ],
)
def test_npz_that_does_not_fit(
    tmp_path: Path, colour: Opened, arrays: dict[str, Array], word: str
) -> None:
    path = stored(tmp_path / "c.npz", **arrays)
    with pytest.raises(UsageError, match=word):
        open_samples(path, *colour, count=4, seed=0)


def test_npz_with_numbers_that_are_none(tmp_path: Path, colour: Opened) -> None:
    data = np.zeros((4, 3, 16, 16), np.float32)
    data[2, 0, 0, 0] = np.nan
    samples = open_samples(stored(tmp_path / "c.npz", x=data), *colour, count=4, seed=0)
    with pytest.raises(UsageError, match="NaN"):
        rows(samples)


def test_npz_of_different_lengths(tmp_path: Path) -> None:
    ids = np.ones((4, 6), np.int64)
    path = stored(tmp_path / "c.npz", ids=ids, types=ids, mask=ids[:3])
    with pytest.raises(UsageError, match="different lengths"):
        open_samples(path, *transformer(), count=4, seed=0)


def test_files_that_are_none(tmp_path: Path, colour: Opened) -> None:
    whole = stored(tmp_path / "whole.npz", x=np.random.default_rng(0).random((4, 3, 16, 16)))
    (tmp_path / "torn.npz").write_bytes(whole.read_bytes()[:5000])
    bent = bytearray(whole.read_bytes())
    bent[3000] ^= 255
    (tmp_path / "bent.npz").write_bytes(bent)
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "c.csv").write_text("1,2")
    for name in ("torn.npz", "bent.npz", "text.npz", "missing.npz", "c.csv", "missing"):
        with pytest.raises(UsageError, match=name):
            open_samples(tmp_path / name, *colour, count=4, seed=0)


# folders


def test_folder_in_order_and_drawn(tmp_path: Path, colour: Opened) -> None:
    for name in ("b.png", "a.jpg", "in/c.PPM", "in/d.bmp", "e.webp"):
        picture(tmp_path / name)
    picture(tmp_path / "grey.png", mode="L")
    (tmp_path / "notes.txt").write_text("no picture")
    named = [p.name for p in files.pictures_of(tmp_path, None, 0)]
    assert named == ["a.jpg", "b.png", "e.webp", "grey.png", "c.PPM", "d.bmp"]
    samples = open_samples(tmp_path, *colour, count=9, seed=0, preprocess=Preprocess())
    assert rows(samples).shape == (6, 3, 16, 16)
    assert 0 <= rows(samples).min() < 0.5 < rows(samples).max() <= 1
    draws = {tuple(files.pictures_of(tmp_path, 3, seed)) for seed in range(5)}
    assert len(draws) > 1
    assert files.pictures_of(tmp_path, 3, 1) == files.pictures_of(tmp_path, 3, 1)


def test_folder_without_preprocess_asks_the_model(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    model, shapes = normalised("x", 3, 255.0)
    samples = open_samples(tmp_path, model, shapes, count=4, seed=0)
    assert rows(samples).max() > 100


@pytest.mark.parametrize(("named", "word"), [("", "no pictures"), ("bad.jpg", "bad.jpg")])
def test_folder_that_is_none(tmp_path: Path, colour: Opened, named: str, word: str) -> None:
    if named:
        (tmp_path / named).write_bytes(b"\xff\xd8\xff\xe0 no picture")
    with pytest.raises(UsageError, match=word):
        samples = open_samples(tmp_path, *colour, count=4, seed=0, preprocess=Preprocess())
        rows(samples)


def test_folder_for_a_model_without_pictures(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    with pytest.raises(UsageError, match="one input"):
        open_samples(tmp_path, *transformer(), count=4, seed=0)
    with pytest.raises(UsageError, match="size=224"):
        open_samples(tmp_path, *classifier("n", 3, "h", "w", axes=(0, 1, 2, 3)), count=4, seed=0)
    with pytest.raises(UsageError, match="does not fit"):
        fixed = classifier("n", 3, 16, 16, axes=(0, 1, 2, 3))
        open_samples(tmp_path, *fixed, 4, 0, Preprocess.parse("size=20"))
    given = Preprocess.parse("size=24x20")
    free = classifier("n", 3, "h", "w", axes=(0, 1, 2, 3))
    assert rows(open_samples(tmp_path, *free, 4, 0, given)).shape == (1, 3, 24, 20)


# preprocessing


def test_preprocess_reads_and_documents() -> None:
    text = "mean=0.485,0.456,0.406; std=0.229,0.224,0.225; scale=1/255; layout=NCHW; size=224x192"
    given = Preprocess.parse(text + ";order=bgr;resize=256")
    assert given.mean == COLOUR.mean
    assert given.size == (224, 192)
    assert given.scale == pytest.approx(1 / 255)
    assert Preprocess.from_document(given.document()) == given
    assert Preprocess.from_document(Preprocess().document()) == Preprocess()
    assert Preprocess.parse("") == Preprocess()


@pytest.mark.parametrize(
    "text",
    "mean=a std=0 scale=1/0 scale=0 layout=chw order=grb size=0 size=1x2x3 resize=-1 "
    "colour=red mean size=8;size=8 scale=nan".split(),
)
def test_preprocess_errors_name_the_key(text: str) -> None:
    key = text.partition("=")[0]
    with pytest.raises(UsageError, match=f"--preprocess {key}:"):
        Preprocess.parse(text)


def test_preprocess_computes_what_it_says() -> None:
    to = PictureInput("x", "nhwc", 3, 2, 2, np.dtype(np.float32))
    pixels = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90], [100, 110, 120]], np.uint8)
    given = Preprocess.parse("mean=1,2,3;std=2,4,5;scale=0.5;order=bgr")
    found = given.encode(given.decode(Image.fromarray(pixels.reshape(2, 2, 3)), to)[None], to)
    wanted = (pixels[:, ::-1] * 0.5 - [1, 2, 3]) / [2, 4, 5]
    assert np.allclose(found.reshape(4, 3), wanted, atol=1e-5)


def test_preprocess_crops_the_centre() -> None:
    to = PictureInput("x", "nchw", 1, 8, 8, np.dtype(np.uint8))
    wide = np.zeros((16, 64), np.uint8)
    wide[:, 24:40] = 200
    cut = BYTES.encode(BYTES.decode(Image.fromarray(wide), to)[None], to)
    assert cut.dtype == np.uint8
    assert (cut[0, 0, :, 1:7] == 200).all()
    closer = Preprocess.parse("resize=16")
    assert (closer.decode(Image.fromarray(wide), to) == np.float32(200) / np.float32(255)).all()


# batches


def test_batches_are_what_the_model_takes(tmp_path: Path) -> None:
    def sizes(shape: tuple[Any, ...], count: int) -> list[int]:
        model, shapes = classifier(*shape, axes=(0, 1, 2, 3))
        path = stored(tmp_path / "c.npz", x=np.random.default_rng(0).random((count, 3, 16, 16)))
        samples = open_samples(path, model, shapes, count, 0)
        runner = session(model)
        feeds = list(batches(samples, model, 4))
        return [len(run_session(runner, feed)[0]) for feed in feeds]

    assert sizes(("n", 3, 16, 16), 10) == [4, 4, 2]
    assert sizes((4, 3, 16, 16), 10) == [4, 4]
    assert sizes((6, 3, 16, 16), 5) == [6]
    assert sizes((1, 3, 16, 16), 3) == [1, 1, 1]


def test_inputs_without_a_batch_are_fed_whole() -> None:
    b = Builder()
    y = b.add("Add", b.add("Mul", "x", "gain"), "offset")
    model, shapes = opened(b.model({"gain": [], "x": ["n", 6], "offset": [6]}, {y: ["n", 6]}))
    samples = synthesise(model, shapes, 10, seed=0)
    feeds = list(batches(samples, model, 4))
    assert [{k: v.shape for k, v in f.items()} for f in feeds[::2]] == [
        {"x": (4, 6), "gain": (), "offset": (6,)},
        {"x": (2, 6), "gain": (), "offset": (6,)},
    ]
    assert np.array_equal(feeds[0]["offset"], feeds[1]["offset"])


def test_an_open_size_elsewhere_means_single_rows() -> None:
    b = Builder()
    y = b.add("Add", "x", b.add("ReduceSum", "state", b.ints(0), keepdims=0))
    model, shapes = opened(b.model({"x": ["n", 6], "state": [2, "n", 6]}, {y: ["n", 6]}))
    assert rows_per_run(model) == 1
    feed = next(batches(synthesise(model, shapes, 3, seed=0), model, 8))
    assert (feed["x"].shape, feed["state"].shape) == ((1, 6), (2, 1, 6))


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
