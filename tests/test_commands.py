"""The commands that only look at models: what they say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from command_line import HALF, QUICK, Run, read_json


@pytest.mark.parametrize(
    "command", ["prune", "sweep", "apply", "inspect", "explain", "compare", "bench", "targets"]
)
def test_help_has_an_example(run: Run, command: str) -> None:
    ran = run(command, "--help")
    assert ran.code == 0
    example = "graphprune model.onnx" if command == "prune" else f"graphprune {command}"
    assert example in ran.out


def test_help_and_version(run: Run) -> None:
    ran = run("--help")
    assert ran.code == 0
    assert "graphprune model.onnx --target-flops 0.5" in ran.out
    assert "Exit codes" in ran.out
    assert run("--version").out.startswith("graphprune, version")


def test_inspect(run: Run, resnet: Path) -> None:
    ran = run("inspect", resnet)
    assert ran.code == 0
    assert "stem.weight:0" in ran.out
    assert "graph output 'logits'" in ran.out
    document = read_json(run("inspect", resnet, "--json").out)
    assert set(document) >= {"schema", "model", "macs", "params", "bytes", "groups", "pinned"}
    assert document["units"] == sum(group["units"] for group in document["groups"])


def test_inspected_bytes_are_the_files(run: Run, resnet: Path) -> None:
    assert read_json(run("inspect", resnet, "--json").out)["bytes"] == resnet.stat().st_size


def test_explain(run: Run, resnet: Path) -> None:
    free = run("explain", resnet, "stem.weight:0")
    assert free.code == 0
    assert "tied to" in free.out
    assert "through" in free.out
    held = run("explain", resnet, "logits:1")
    assert "pinned" in held.out
    assert run("explain", resnet, "stem.weight:0:3").code == 0
    for wrong in ("nowhere", "stem.weight:9", "stem.weight:0:999"):
        ran = run("explain", resnet, wrong)
        assert (ran.code, ran.out) == (2, "")
        assert ran.err.count("error") == 1


def test_explain_json(run: Run, resnet: Path) -> None:
    ran = run("explain", resnet, "stem.weight:0", "--json")
    assert ran.code == 0
    read_json(ran.out)


def test_compare(run: Run, resnet: Path, labelled: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    run(resnet, *HALF, *QUICK, "-o", out)
    same = read_json(run("compare", resnet, resnet, "--json").out)
    assert same["relative_difference"] == 0
    assert same["weights"] == []
    other = read_json(run("compare", resnet, out, "--json").out)
    assert other["same_interface"] is True
    assert other["relative_difference"] > 0
    assert other["b"]["macs"] <= 0.5 * other["a"]["macs"]
    assert other["b"]["bytes"] == out.stat().st_size
    pictures = tmp_path / "pictures.npz"
    np.savez(pictures, image=np.load(labelled)["image"][:4])
    ran = run("compare", resnet, out, "--inputs", pictures)
    assert ran.code == 0
    assert "MACs" in ran.out and "True" not in ran.out
    assert "4 rows of pictures.npz" in ran.out
    assert "random inputs (--seed 0)" in run("compare", resnet, out).out
    assert other["compared_on"] == "random inputs (--seed 0)"


def test_compare_of_strangers_is_refused(run: Run, resnet: Path, small: Path) -> None:
    ran = run("compare", resnet, small)
    assert ran.code == 2
    assert "inputs" in ran.err


def test_bench(run: Run, small: Path) -> None:
    out = small.with_name("model.pruned.onnx")
    run(small, *HALF, *QUICK)
    ran = run("bench", small, out, "--rounds", 5, "--threads", 1, "--json")
    document = read_json(ran.out)
    assert document["rounds"] == 5
    assert [row["model"] for row in document["models"]] == [str(small), str(out)]
    assert document["models"][0]["ratio"] == 1
    for row in document["models"]:
        low, high = row["ratio_quartiles"]
        assert low <= row["ratio"] <= high
    assert "ratio" in run("bench", small, "--rounds", 5).out


def test_targets(run: Run) -> None:
    document = read_json(run("targets", "--json").out)
    names = [target["name"] for target in document["targets"]]
    assert document["auto"] in names
    assert {"cpu-avx512", "cpu-avx2"} <= set(names)
    text = run("targets").out
    assert all(name in text for name in names)
