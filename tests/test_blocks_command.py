"""`graphprune blocks`: what it lists, and what it says where there is nothing to list."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from block_forms import no_blocks, pre_norm

Run = Callable[..., Any]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(pre_norm()[0], path)
    return path


def test_document(run: Run, path: Path) -> None:
    ran = run("blocks", path, "--samples", 16, "--no-measure", "--json")
    assert ran.code == 0, ran.err
    document = json.loads(ran.out)
    assert document["schema"] == "graphprune.blocks/1"
    rows = document["blocks"]
    assert [row["kind"] for row in rows] == ["attention", "mlp"] * 2
    assert sorted(row["place"] for row in rows) == [1, 2, 3, 4]
    assert [row["name"] for row in sorted(rows, key=lambda r: r["place"])] == document["greedy"]
    together = [row["together"] for row in sorted(rows, key=lambda r: r["place"])]
    assert together == sorted(together)
    first = next(row for row in rows if row["place"] == 1)
    assert first["together"] == first["alone"]
    for row in rows:
        assert 0 < row["macs"] < 1
        assert 0 < row["params"] < 1
        assert row["alone"] > 0
        assert 0 < row["turn"] < 2
        assert row["latency"] is None


def test_latency_is_a_share(run: Run, path: Path) -> None:
    ran = run("blocks", path, "--samples", 16, "--json")
    shares = [row["latency"] for row in json.loads(ran.out)["blocks"]]
    assert all(0 < share < 1 for share in shares)
    assert sum(shares) < 1


def test_table(run: Run, path: Path) -> None:
    kept = json.loads(run("blocks", path, "--samples", 8, "--no-measure", "--json").out)["greedy"]
    ran = run("blocks", path, "--samples", 8, "--no-measure", "--protect", kept[0])
    assert ran.code == 0, ran.err
    assert f"must stay: {kept[0]}" in ran.out
    assert ran.out.count("mlp") + ran.out.count("attention") == 3


def test_without_blocks(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "none.onnx"
    onnx.save(no_blocks()[0], path)
    ran = run("blocks", path)
    assert ran.code == 0
    assert "no residual block may leave" in ran.out
    assert json.loads(run("blocks", path, "--json").out)["blocks"] == []


@pytest.mark.parametrize("units", ["blocks", "channels,heads,blocks"])
def test_without_a_budget_nothing_is_weighed(run: Run, path: Path, units: str) -> None:
    """What nothing is lost for leaves as ever, and no inputs are made."""
    ran = run(path, "--units", units, "-o", path.with_name("out.onnx"), "--no-measure", "--json")
    assert ran.code == 0, ran.err
    document = json.loads(ran.out)
    notes = " ".join(document["notes"])
    assert "no budget was given" in notes
    assert document["calibration"] is None
    assert "0 of 4 residual blocks removed" in notes


def test_pruned_by_blocks_alone(run: Run, path: Path) -> None:
    out = path.with_name("out.onnx")
    plan = path.with_name("plan.json")
    asked = ["--units", "blocks", "--target-flops", 0.6, "--samples", 16, "--no-measure"]
    ran = run(path, *asked, "-o", out, "--plan-out", plan, "--json")
    assert ran.code == 0, ran.err
    gone = [block for block in json.loads(plan.read_text())["blocks"] if block["removed"]]
    assert gone
    assert f"{len(gone)} of 4 residual blocks removed" in " ".join(json.loads(ran.out)["notes"])
    again = path.with_name("again.onnx")
    assert run("apply", path, plan, "-o", again, "--no-measure").code == 0
    assert again.read_bytes() == out.read_bytes()


def test_blocks_and_channels_say_how_many_left(run: Run, path: Path) -> None:
    asked = ["--units", "channels,heads,blocks", "--target-flops", 0.4, "--samples", 64]
    ran = run(path, *asked, "-o", path.with_name("out.onnx"), "--no-measure", "--json")
    assert ran.code == 0, ran.err
    notes = " ".join(json.loads(ran.out)["notes"])
    left = re.search(r"(\d) of 4 residual blocks removed", notes)
    assert left is not None
    weighed = re.search(r"inputs held out: (.*) with (\d) of 4 blocks gone", notes)
    assert weighed is not None
    assert left[1] == weighed[2]
