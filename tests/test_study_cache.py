"""Evidence is gathered once: the cache beside the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from study_forms import QUICK, content, network

from graphprune import api, cache
from graphprune import study as under_test
from graphprune.cache import FOLDER, Cache, beside
from graphprune.criteria import Scoring
from graphprune.model import Array


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for every time that evidence is gathered."""
    calls: list[str] = []
    gather = under_test.gather
    monkeypatch.setattr(cache, "WORTH_KEEPING", 0)

    def counting(*given: Any, **options: Any) -> Any:
        calls.append("gathered")
        return gather(*given, **options)

    monkeypatch.setattr(under_test, "gather", counting)
    return calls


def test_a_second_run_gathers_nothing(path: Path, counted: list[str]) -> None:
    first = api.prune(path, **QUICK)
    assert (path.parent / FOLDER).is_dir()
    assert len(counted) == 1
    again = api.prune(path, **QUICK)
    other = api.prune(path, **{**QUICK, "flops": 0.7})
    assert len(counted) == 1
    assert content(first) == content(again)
    assert first.plan.to_json() == again.plan.to_json()
    assert other.after.macs > first.after.macs


@pytest.mark.parametrize(
    "change",
    [
        {"samples": 17},
        {"scoring": Scoring(seed=1)},
        {"criterion": "l1"},
        {"input_shapes": {"x": (1, 3, 6, 6)}, "only": ("n2_Conv",)},
    ],
    ids=str,
)
def test_what_evidence_depends_on_is_gathered_anew(
    path: Path, counted: list[str], change: dict[str, Any]
) -> None:
    api.prune(path, **{**QUICK, "flops": 0.9})
    api.prune(path, **{**QUICK, "flops": 0.9, **change})
    assert len(counted) == 2


def test_other_weights_are_another_model(path: Path, counted: list[str]) -> None:
    api.prune(path, **QUICK)
    proto = onnx.load(path)
    array = numpy_helper.to_array(proto.graph.initializer[0])
    proto.graph.initializer[0].CopyFrom(
        numpy_helper.from_array(array * 2, proto.graph.initializer[0].name)
    )
    onnx.save(proto, path)
    api.prune(path, **QUICK)
    assert len(counted) == 2


def test_no_cache_leaves_no_folder(path: Path) -> None:
    api.prune(path, cache=False, **QUICK)
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    assert beside(network()) is None


@pytest.mark.parametrize("how", ["cut short", "empty", "garbage", "zip", "flipped"])
def test_a_damaged_entry_is_made_anew(path: Path, counted: list[str], how: str) -> None:
    first = api.prune(path, **QUICK)
    (entry,) = (path.parent / FOLDER).iterdir()
    whole = entry.read_bytes()
    flipped = bytes([*whole[:200], whole[200] ^ 0xFF, *whole[201:]])
    damaged = {
        "cut short": whole[:-30],
        "empty": b"",
        "garbage": b"\x93NUMPY",
        "zip": b"PK\x03\x04",
    }
    entry.write_bytes({**damaged, "flipped": flipped}[how])
    assert api.prune(path, **QUICK).plan.to_json() == first.plan.to_json()
    assert len(counted) == 2
    assert entry.stat().st_size == len(whole)


def test_a_folder_that_cannot_be_made_is_done_without(path: Path, counted: list[str]) -> None:
    (path.parent / FOLDER).write_text("a file where the folder should be")
    first, again = (api.prune(path, **QUICK) for _ in range(2))
    assert len(counted) == 2
    assert first.plan.to_json() == again.plan.to_json()


def test_a_read_only_folder_is_done_without(
    path: Path, counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (path.parent / FOLDER).mkdir()
    opened = Path.open

    def refusing(self: Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
        if "w" in mode and self.parent.name == FOLDER:
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, mode, *rest, **more)

    monkeypatch.setattr(Path, "open", refusing)
    for _ in range(2):
        api.prune(path, **QUICK)
    assert len(counted) == 2
    assert not list((path.parent / FOLDER).iterdir())


def test_what_is_quickly_made_is_not_kept(path: Path) -> None:
    api.prune(path, **QUICK)
    assert not (path.parent / FOLDER).exists()


def test_cache_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "WORTH_KEEPING", 0)
    made: list[int] = []

    def make() -> dict[str, Array]:
        made.append(1)
        return {"a": np.arange(3), "b": np.zeros((2, 0))}

    kept = Cache(tmp_path / FOLDER)
    for _ in range(2):
        found = kept(("x", 1), make)
        assert found["a"].tolist() == [0, 1, 2]
        assert found["b"].shape == (2, 0)
    assert len(made) == 1
    kept(("x", 2), make)
    Cache(None)(("x", 1), make)
    assert len(made) == 3
    assert {file.suffix for file in (tmp_path / FOLDER).iterdir()} == {".npz"}
