"""Every exit code, and that nothing is written where it is not 0."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from command_line import FINE, HALF, QUICK, WEIGHTS, Run
from graphs import Builder
from onnx import numpy_helper

from graphprune import api
from graphprune.rules.elementwise import unary


def untouched(small: Path, before: bytes) -> bool:
    alone = [path.name for path in small.parent.iterdir()] == ["model.onnx"]
    return alone and small.read_bytes() == before


def test_exit_0(run: Run, small: Path) -> None:
    assert run(small, *HALF, *QUICK).code == 0


@pytest.mark.parametrize(
    "wrong",
    [
        ("--no-lossless",),
        ("--target-flops", "0"),
        ("--target-flops", "1.5"),
        ("--target-flops", "nan"),
        (*HALF, "--criterion", "magic"),
        (*HALF, "--reduce", "magic"),
        (*HALF, "--normalise", "magic"),
        (*HALF, "--spread", "magic"),
        (*HALF, "--target-hardware", "magic"),
        (*HALF, "--provider", "magic"),
        (*HALF, "--round-to", "0"),
        (*HALF, "--seed", "-1"),
        (*HALF, "--threads", "-3"),
        (*HALF, "--max-accuracy-drop", "1"),
        (*HALF, "--min-speedup", "1", "--no-measure"),
        (*HALF, "--magic"),
        (*HALF, "one-too-many.onnx"),
    ],
    ids=" ".join,
)
def test_exit_2(run: Run, small: Path, wrong: tuple[str, ...]) -> None:
    before = small.read_bytes()
    ran = run(small, *wrong)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.strip()
    assert untouched(small, before)


def test_exit_3(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"hello")
    assert run(path, *HALF).code == 3


def test_exit_4(run: Run, small: Path) -> None:
    before = small.read_bytes()
    ran = run(small, *WEIGHTS, "--target-flops", 0.0001)
    assert (ran.code, ran.out) == (4, "")
    assert "reachable" in ran.err
    assert untouched(small, before)


def test_a_missed_budget_says_what_stays_and_what_it_is_worth(run: Run, small: Path) -> None:
    ran = run(small, *WEIGHTS, "--target-flops", 0.0001)
    assert ran.code == 4 and not small.with_name("model.pruned.onnx").exists()
    assert "% of the MACs: graph input 'x'" in ran.err


def test_allow_miss_comes_near_and_says_so(run: Run, small: Path) -> None:
    ran = run(small, *WEIGHTS, "--target-flops", 0.0001, "--allow-miss", "--no-measure")
    assert ran.code == 0
    assert "missed" in ran.out


def test_exit_5(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that lies: Softmax as if every element stood alone."""
    b = Builder()
    h = b.add("Softmax", b.add("MatMul", "x", b.weight(6, 16)), axis=-1)
    y = b.add("MatMul", h, b.weight(16, 5))
    path = tmp_path / "model.onnx"
    onnx.save(b.model({"x": [1, 6]}, {y: [1, 5]}), path)
    honest = api.registry()
    lying = replace(honest, rules={**honest.rules, ("", "Softmax"): unary})
    monkeypatch.setattr(api, "registry", lambda: lying)
    ran = run(path, *HALF)
    assert (ran.code, ran.out) == (5, "")
    assert "Nothing was written" in ran.err
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    assert run(path, *HALF, "--no-verify", *QUICK).code == 0  # the lie itself is no crash


def test_exit_6(run: Run, resnet: Path, labelled: Path, tmp_path: Path) -> None:
    out, plan = tmp_path / "out.onnx", tmp_path / "plan.json"
    out.write_bytes(b"an earlier result")
    gate = ("--eval", labelled, "--max-accuracy-drop", 1)
    ran = run(resnet, *WEIGHTS, "--target-flops", 0.2, *FINE, *gate, "-o", out, "--plan-out", plan)
    assert (ran.code, ran.out) == (6, "")
    assert "points" in ran.err
    assert out.read_bytes() == b"an earlier result"
    assert not plan.exists()
    assert run(resnet, *WEIGHTS, "--target-flops", 1, *gate, "-o", out).code == 0


def test_exit_7(run: Run, small: Path) -> None:
    before = small.read_bytes()
    ran = run(small, *HALF, "--min-speedup", 1000)
    assert (ran.code, ran.out) == (7, "")
    assert "1000x" in ran.err
    assert untouched(small, before)


def test_exit_8(run: Run, pinned: Path) -> None:
    ran = run(pinned, *HALF)
    assert (ran.code, ran.out) == (8, "")
    assert "pinned" in ran.err
    assert [path.name for path in pinned.parent.iterdir()] == [pinned.name]


def test_gates_of_apply(run: Run, small: Path) -> None:
    plan, out = small.with_name("plan.json"), small.with_name("out.onnx")
    run(small, *HALF, *QUICK, "--plan-out", plan)
    assert run("apply", small, plan, "-o", out, "--min-speedup", 1000).code == 7
    assert not out.exists()


def test_python_door(resnet: Path) -> None:
    import graphprune

    result = graphprune.prune(resnet, flops=0.5, measure=False, samples=64, cache=False)
    assert "MACs" in str(result)
    assert result.changes
    assert result.verdict.passed
    again = graphprune.prune(onnx.load(resnet), flops=0.5, measure=False, samples=64)
    assert again.plan == result.plan
    kept = {name: axes["0"] for name, axes in result.plan.kept.items() if "0" in axes}
    before = {t.name: numpy_helper.to_array(t) for t in onnx.load(resnet).graph.initializer}
    for tensor in result.model.graph.initializer:
        if tensor.name in kept:
            assert tensor.dims[0] == len(kept[tensor.name])
            assert len(before[tensor.name]) >= tensor.dims[0]


def test_the_users_minimum_is_never_lowered(run: Run, resnet: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    ran = run(resnet, *HALF, *QUICK, "--min-channels", 1000, "-o", out)
    assert ran.code == 4
    assert not out.exists()
    assert run(resnet, "--target-flops", 0.9, *QUICK, "--min-channels", 30, "-o", out).code == 0
    model = onnx.load(out)
    assert min(t.dims[0] for t in model.graph.initializer if len(t.dims) == 4) >= 30


def test_a_full_stdout_is_one_message(resnet: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "graphprune.cli", "inspect", str(resnet), "--json"]
    with open("/dev/full", "w") as full:
        ran = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ran.returncode == 2
    assert "cannot write the report" in ran.stderr
    assert "Traceback" not in ran.stderr
