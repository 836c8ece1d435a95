"""Weights in files of their own: hostile ones, those that stay on disk, models too large to run."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import Builder
from onnx import numpy_helper
from refusals import MODEL, Run, contents, refused, store

from graphprune import api, external, memory, oracle, runtime, storage
from graphprune.errors import UsageError
from graphprune.memory import fitted
from graphprune.options import Options
from graphprune.storage import load, save

# --- external data


def beside(model: onnx.ModelProto, folder: Path) -> Path:
    """The model with all its weights in ``weights.bin``."""
    path = folder / "model.onnx"
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    onnx.save(copy, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


def entry(path: Path, key: str, value: str) -> Path:
    """One entry of every weight's external data is another."""
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for pair in tensor.external_data:
            if pair.key == key:
                pair.value = value
    return store(model, path)


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "in/../../secret", "", "C:\\x"])
def test_data_outside_the_folder(
    run: Run, chain: onnx.ModelProto, tmp_path: Path, location: str
) -> None:
    (tmp_path / "secret").write_bytes(bytes(100_000))
    folder = tmp_path / "inner"
    folder.mkdir()
    path = entry(beside(chain, folder), "location", location)
    refused(run, path, MODEL, "outside the model's folder")


def test_a_link_out_of_the_folder(run: Run, chain: onnx.ModelProto, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(100_000))
    folder = tmp_path / "inner"
    folder.mkdir()
    path = entry(beside(chain, folder), "location", "link")
    (folder / "link").symlink_to("../secret")
    refused(run, path, MODEL, "'link'", "outside the model's folder")


def test_a_model_that_is_itself_a_link(run: Run, chain: onnx.ModelProto, tmp_path: Path) -> None:
    """Download caches keep links to one folder of files."""
    store_folder, seen = tmp_path / "blobs", tmp_path / "seen"
    store_folder.mkdir()
    seen.mkdir()
    beside(chain, store_folder)
    for name in ("model.onnx", "weights.bin"):
        (seen / name).symlink_to(store_folder / name)
    assert run("inspect", seen / "model.onnx", "--quiet").code == 0


def test_data_that_is_no_file(run: Run, chain: onnx.ModelProto, tmp_path: Path) -> None:
    """A pipe would be waited on for ever."""
    path = entry(beside(chain, tmp_path), "location", "pipe")
    os.mkfifo(tmp_path / "pipe")
    refused(run, path, MODEL, "'pipe'")


@pytest.mark.parametrize(
    ("key", "value"),
    [("offset", "-4"), ("offset", "many"), ("offset", str(2**62)), ("length", "3")],
)
def test_data_beyond_the_file(
    run: Run, chain: onnx.ModelProto, tmp_path: Path, key: str, value: str
) -> None:
    refused(run, entry(beside(chain, tmp_path), key, value), MODEL, "weights.bin")


# --- weights that stay on disk


@pytest.fixture
def lazy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every weight in a data file stays there, however small, and comes in parts."""
    monkeypatch.setattr(storage, "LAZY", 1)
    monkeypatch.setattr(external, "CHUNK", 100)


@pytest.mark.usefixtures("lazy")
def test_weights_on_disk_give_the_same_model(
    monkeypatch: pytest.MonkeyPatch, chain: onnx.ModelProto, tmp_path: Path
) -> None:
    path = beside(chain, tmp_path)
    options: dict[str, Any] = {"flops": 0.5, "round_to": 1, "criterion": "l1", "repair": "none"}
    options |= {"measure": False, "cache": False}
    eager = api.prune(chain, **options)
    mapped = api.prune(path, output=tmp_path / "out.onnx", **options)
    assert mapped.plan.model_sha256 == eager.plan.model_sha256
    assert mapped.plan.kept == eager.plan.kept
    arrays = [{t.name: numpy_helper.to_array(t) for t in r.graph.initializer}
              for r in (eager.model, mapped.model, onnx.load(tmp_path / "out.onnx"))]  # fmt: skip
    for name, wanted in arrays[0].items():
        assert all(np.array_equal(other[name], wanted) for other in arrays[1:])
    first = contents(tmp_path)
    api.prune(path, output=tmp_path / "out.onnx", **options)
    assert contents(tmp_path) == first


@pytest.mark.usefixtures("lazy")
def test_a_cut_of_a_cut_reads_its_file_once_more(chain: onnx.ModelProto, tmp_path: Path) -> None:
    model = load(beside(chain, tmp_path))
    tensor = next(t for t in model.initializers.values() if len(t.dims) == 4)
    whole = external.array(tensor)
    first = np.arange(whole.shape[0]) % 3 > 0
    second = np.arange(first.sum()) % 2 > 0
    columns = np.arange(whole.shape[1]) > 0
    cut = external.sliced(external.sliced(tensor, {0: first}), {0: second, 1: columns})
    wanted = whole[first][second][:, columns]
    assert np.array_equal(external.array(cut), wanted)
    assert np.array_equal(np.concatenate(list(external.chunks(cut))), wanted)
    assert list(cut.dims) == list(wanted.shape)


@pytest.mark.usefixtures("lazy")
def test_mapped_weights_run_as_others_do(
    monkeypatch: pytest.MonkeyPatch, chain: onnx.ModelProto, tmp_path: Path
) -> None:
    path = beside(chain, tmp_path)
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 8), dtype=np.float32)
    wanted = runtime.opened(load(chain))({"x": x})[0]
    monkeypatch.setattr(runtime, "LARGE", 1)
    model = load(path)
    tensors = dict(model.initializers)
    name = next(n for n, t in tensors.items() if len(t.dims) == 4)
    every = np.ones(tensors[name].dims[0], bool)
    tensors[name] = external.sliced(tensors[name], {0: every})
    for each in (model, model.with_graph(model.nodes, tensors.values())):
        assert np.allclose(runtime.opened(each)({"x": x})[0], wanted, atol=1e-5)


@pytest.mark.usefixtures("lazy")
@pytest.mark.parametrize(("operator", "axis"), [("MatMul", 0), ("Gemm", 0), ("Einsum", 0)])
def test_zeros_spare_weights_on_disk(operator: str, axis: int, tmp_path: Path) -> None:
    """What a weight is multiplied with is masked in its place, and the law holds as it did."""
    b = Builder(7)
    given = {"equation": "ij,jk->ik"} if operator == "Einsum" else {}
    hidden = b.add("Relu", b.add(operator, "x", b.weight(6, 8), **given))
    last = b.weight(8, 5)
    y = b.add(operator, hidden, last, **given)
    path = beside(b.model({"x": [2, 6]}, {y: [2, 5]}), tmp_path)
    prepared = api.prepare(path)
    model, analysis = prepared.original, prepared.analysis
    alive = np.ones(analysis.relations.total, bool)
    alive[analysis.relations.slots.tensors[last][axis].slots[:3]] = False
    masked = oracle.zeroed(model, analysis.shapes, analysis.coupling, alive)
    reads = next(node for node in masked.nodes if y in node.output).input
    assert reads[1] == last and reads[0] != hidden
    result = api.prune(path, flops=0.5, round_to=1, criterion="l1", repair="none", measure=False,
                       cache=False)  # fmt: skip
    assert result.verdict.passed


def test_no_room_is_said_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch, chain: onnx.ModelProto, tmp_path: Path
) -> None:
    model = load(beside(chain, tmp_path))
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(UsageError, match="No space left"):
        save(model, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx.data").exists()


# --- models too large to run


def test_a_giant_is_planned_from_weights(
    monkeypatch: pytest.MonkeyPatch, run: Run, small: Path
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 100)
    ran = run(small, "--target-flops", "0.5", "--round-to", "1", "--no-cache")
    assert ran.code == 0, ran.err
    said = " ".join(ran.out.split())
    assert "too large to be run here" in said
    assert "planned by l1 (weights alone)" in said


def test_a_giant_and_what_would_run_it(
    monkeypatch: pytest.MonkeyPatch, chain: onnx.ModelProto
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 100)
    model = load(chain)
    with pytest.raises(UsageError, match="--search"):
        fitted(Options(flops=0.5, search=3), model)
    monkeypatch.setattr(memory, "free_memory", lambda: 1 << 40)
    assert fitted(Options(flops=0.5, search=3), model) == (Options(flops=0.5, search=3), ())


def test_a_giant_is_not_run_by_a_criterion_asked_for(
    monkeypatch: pytest.MonkeyPatch, run: Run, small: Path
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 100)
    ran = run(small, "--target-flops", "0.5", "--criterion", "obspa", "--repair", "none")
    assert ran.code == 2 and "too large to be run here" in ran.err
