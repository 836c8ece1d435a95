"""Calibration inputs: arrays, pictures, synthesised ones, and the range of pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calibrate_forms import (
    Opened,
    classifier,
    normalised,
    opened,
    picture,
    rows,
    stored,
    transformer,
)
from graphs import Builder
from PIL import Image

from graphprune.calibrate import Preprocess, batches, files, open_samples, synthesise
from graphprune.calibrate.preprocess import PictureInput
from graphprune.calibrate.ranges import BYTES, COLOUR
from graphprune.calibrate.samples import rows_per_run
from graphprune.errors import UsageError
from graphprune.model import Array
from graphprune.runtime import run_session, session

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
    path = stored(tmp_path / "c.npz", x=data)
    with pytest.raises(UsageError, match="NaN"):
        open_samples(path, *colour, count=4, seed=0)


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
