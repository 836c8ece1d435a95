"""The command line: what it writes, what it says and where, and every exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from graphs import Builder
from onnx import numpy_helper

from graphprune import api, prepared
from graphprune.rules.elementwise import unary

Run = Callable[..., Any]
WEIGHTS = ("--criterion", "l1", "--repair", "none")  # what needs no calibration inputs
HALF = ("--target-flops", "0.5", *WEIGHTS)
FINE = ("--round-to", "1", "--min-channels", "1")
QUICK = ("--no-measure", "--quiet", *WEIGHTS)


def shapes(path: Path) -> dict[str, list[int]]:
    return {tensor.name: list(tensor.dims) for tensor in onnx.load(path).graph.initializer}


def read_json(text: str) -> Any:
    """Exactly one document, and strict: no NaN, no Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def program(*arguments: object, seed: str = "0") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "graphprune.cli", *map(str, arguments)]
    env = {**os.environ, "PYTHONHASHSEED": seed}
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False)


# --- the main job


def test_bare_model_means_prune(run: Run, small: Path) -> None:
    bare = run(small, *HALF, *QUICK)
    written = small.with_name("model.pruned.onnx")
    content = written.read_bytes()
    named = run("prune", *HALF, *QUICK, small, "-o", small.with_name("other.onnx"))
    options_first = run(*HALF, *QUICK, small)
    assert (bare.code, named.code, options_first.code) == (0, 0, 0)
    assert content == small.with_name("other.onnx").read_bytes() == written.read_bytes()
    ort.InferenceSession(written)


def test_table_says_what_was_done(run: Run, resnet: Path, labelled: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    ran = run(resnet, *HALF, "--eval", labelled, "-o", out)
    assert ran.code == 0
    for word in ("MACs", "parameters", "file", "latency", "top-1", "verified", "stays", str(out)):
        assert word in ran.out
    assert "graph output 'logits'" in ran.out  # what is pinned, and why


@pytest.mark.parametrize("share", [0.75, 0.5, 0.3])
def test_flops_are_exact_on_the_shipped_model(
    run: Run, resnet: Path, tmp_path: Path, share: float
) -> None:
    ran = run(
        resnet, *WEIGHTS, "--target-flops", share, "--round-to", 1, "--no-measure", "--json",
        "-o", tmp_path / "out.onnx",
    )  # fmt: skip
    document = read_json(ran.out)
    assert share - 0.02 <= document["ratio"]["macs"] <= share
    assert document["before"]["macs"] * document["ratio"]["macs"] == document["after"]["macs"]


def test_several_budgets_all_hold(run: Run, resnet: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    ran = run(
        resnet, *WEIGHTS, "--target-flops", 0.7, "--target-params", 0.6, "--target-size", 0.65,
        "--no-measure", "--json", *FINE, "-o", out,
    )  # fmt: skip
    ratio = read_json(ran.out)["ratio"]
    assert ratio["macs"] <= 0.7
    assert ratio["params"] <= 0.6
    assert out.stat().st_size <= 0.65 * resnet.stat().st_size
    assert max(ratio["macs"] - 0.7, ratio["params"] - 0.6, ratio["bytes"] - 0.65) >= -0.02


@pytest.mark.parametrize("share", [0.8, 0.5])
def test_size_is_that_of_the_file(run: Run, resnet: Path, tmp_path: Path, share: float) -> None:
    out = tmp_path / "out.onnx"
    ran = run(resnet, *WEIGHTS, "--target-size", share, "--no-measure", "--json", *FINE, "-o", out)
    document = read_json(ran.out)
    assert share - 0.02 <= out.stat().st_size / resnet.stat().st_size <= share
    assert document["before"]["bytes"] == resnet.stat().st_size
    assert document["after"]["bytes"] == out.stat().st_size


def test_reported_bytes_are_the_files(run: Run, small: Path) -> None:
    """Also where the file is small and every byte of overhead shows."""
    out = small.with_name("out.onnx")
    document = read_json(run(small, *HALF, "--no-measure", "--json", "-o", out).out)
    assert document["before"]["bytes"] == small.stat().st_size
    assert document["after"]["bytes"] == out.stat().st_size


@pytest.mark.parametrize("budget", ["flops", "params", "size"])
def test_all_may_remain(run: Run, small: Path, budget: str) -> None:
    out = small.with_name("out.onnx")
    ran = run(small, f"--target-{budget}", 1, "--no-measure", "--quiet", *FINE, "-o", out)
    assert ran.code == 0
    assert shapes(out) == shapes(small)


# --- stdout, stderr


def test_json_is_one_document_on_stdout(resnet: Path, labelled: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    ran = program(resnet, *HALF, "--eval", labelled, "-o", out, "--json")
    document = read_json(ran.stdout)
    assert ran.returncode == 0
    assert "MACs" in ran.stderr
    assert set(document) >= {
        "schema", "graphprune", "model", "output", "before", "after", "ratio", "verified",
        "pinned", "seconds",
    }  # fmt: skip
    for side in ("before", "after"):
        assert set(document[side]) >= {"macs", "params", "bytes", "latency_ms", "accuracy"}
        assert all(value > 0 for value in document[side].values())
    assert set(document["ratio"]) >= {"macs", "params", "bytes", "latency"}
    assert document["verified"]["passed"] is True
    assert 0 <= document["verified"]["relative_error"] <= 1e-4
    assert document["model"] == str(resnet)
    assert document["output"] == str(out)
    assert document["before"]["accuracy"] >= 0.91  # what the issue promises of the shipped model
    assert document["pinned"][0]["reason"] == "graph output 'logits'"


def test_absent_values_are_null(run: Run, small: Path) -> None:
    document = read_json(run(small, *HALF, "--no-verify", "--no-measure", "--json").out)
    assert set(document["verified"].values()) == {None}
    assert document["ratio"]["latency"] is None
    for side in ("before", "after"):
        assert document[side]["accuracy"] is document[side]["latency_ms"] is None


def test_json_stays_json_where_outputs_are_infinite(run: Run, tmp_path: Path) -> None:
    b = Builder(3)
    x = b.conv(b.add("Relu", b.conv("x", 3, 16)), 16, 4)
    y = b.add("Log", b.add("Relu", x))  # log(0): infinite, at other places after pruning
    path = tmp_path / "log.onnx"
    onnx.save(b.model({"x": [1, 3, 8, 8]}, {y: [1, 4, 8, 8]}), path)
    ran = run(path, *HALF, "--json", "--quiet")
    assert ran.code == 0
    read_json(ran.out)


def test_quiet_says_nothing(run: Run, small: Path) -> None:
    ran = run(small, *HALF, "--quiet")
    assert (ran.code, ran.out, ran.err) == (0, "", "")
    ran = run(small, *HALF, "--quiet", "--json")
    assert ran.err == ""
    read_json(ran.out)


def test_no_progress_and_no_colour_off_a_terminal(small: Path) -> None:
    ran = program(small, *HALF)
    assert "\x1b" not in ran.stdout + ran.stderr
    assert "\r" not in ran.stdout + ran.stderr
    assert ran.stderr == ""


# --- plan and apply, determinism


def test_apply_makes_the_same_model(run: Run, resnet: Path, tmp_path: Path) -> None:
    plan, first, second = (tmp_path / name for name in ("plan.json", "a.onnx", "b.onnx"))
    run(resnet, *HALF, *QUICK, "--plan-out", plan, "-o", first)
    ran = run("apply", resnet, plan, "-o", second, "--no-measure", "--json")
    assert ran.code == 0
    assert first.read_bytes() == second.read_bytes()
    assert read_json(ran.out)["ratio"]["macs"] <= 0.5


@pytest.mark.parametrize("criterion", ["l1", "random"])
def test_two_processes_agree_byte_for_byte(resnet: Path, tmp_path: Path, criterion: str) -> None:
    for seed in ("1", "2"):
        ran = program(
            resnet, *HALF, *QUICK, "--criterion", criterion, "--seed", 7,
            "--plan-out", tmp_path / f"plan{seed}", "-o", tmp_path / f"model{seed}", seed=seed,
        )  # fmt: skip
        assert ran.returncode == 0
    assert (tmp_path / "plan1").read_bytes() == (tmp_path / "plan2").read_bytes()
    assert (tmp_path / "model1").read_bytes() == (tmp_path / "model2").read_bytes()


def test_seed_decides_random_scores(run: Run, small: Path) -> None:
    plans = []
    for seed in (1, 1, 2):
        plan = small.with_name("plan.json")
        run(small, *HALF, *QUICK, "--criterion", "random", "--seed", seed, "--plan-out", plan)
        plans.append(json.loads(plan.read_text())["kept"])
    assert plans[0] == plans[1] != plans[2]


def test_plan_and_model_in_one_file_is_refused(run: Run, small: Path) -> None:
    out = small.with_name("out.onnx")
    assert run(small, *HALF, *QUICK, "-o", out, "--plan-out", out).code == 2
    assert not out.exists()


def test_a_plan_that_cannot_be_written_leaves_no_model(
    run: Run, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_text

    def full(path: Path, *rest: Any, **named: Any) -> int:
        if "plan" in path.name:
            raise OSError(28, "No space left on device")
        return write(path, *rest, **named)

    monkeypatch.setattr(Path, "write_text", full)
    ran = run(small, *HALF, *QUICK, "--plan-out", small.with_name("plan.json"))
    assert ran.code == 2
    assert "No space left" in ran.err
    assert [path.name for path in small.parent.iterdir()] == ["model.onnx"]


# --- which layers


def test_pattern_that_matches_nothing_is_refused(run: Run, small: Path) -> None:
    for option in ("--protect", "--only"):
        ran = run(small, *HALF, *QUICK, option, "nowhere*")
        assert ran.code == 2
        assert "nowhere*" in ran.err
        assert option in ran.err
    assert not small.with_name("model.pruned.onnx").exists()


@pytest.mark.parametrize("pattern", ["stage2.0.conv1*", "*stage2.0.conv1.weight"])
def test_protected_layer_stays_whole(run: Run, resnet: Path, tmp_path: Path, pattern: str) -> None:
    out = tmp_path / "out.onnx"
    assert run(resnet, *HALF, *QUICK, "--protect", pattern, "-o", out).code == 0
    before, after = shapes(resnet), shapes(out)
    assert after["stage2.0.conv1.weight"] == before["stage2.0.conv1.weight"]
    assert after != before


@pytest.mark.parametrize("by", ["node", "tensor"])
def test_protecting_an_activation_keeps_its_channels(
    run: Run, chain: onnx.ModelProto, small: Path, by: str
) -> None:
    """The pattern matches the first Relu, so that must have an effect: its 16 channels stay."""
    relu = next(node for node in chain.graph.node if node.op_type == "Relu")
    pattern = relu.name if by == "node" else relu.output[0]
    out = small.with_name("out.onnx")
    ran = run(small, "--target-flops", 0.7, *FINE, *QUICK, "--protect", pattern, "-o", out)
    assert ran.code == 0
    rows = [dims[0] for dims in shapes(out).values() if len(dims) == 4]
    assert rows[0] == 16
    assert rows[1] < 16


def test_only_prunes_nothing_else(run: Run, resnet: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    names = ("stage3.0.conv1.weight", "stage3.0.conv2.weight")
    ran = run(
        resnet, "--target-params", 0.9, *QUICK, "--only", "stage3.0.*", "-o", out,
    )  # fmt: skip
    before, after = shapes(resnet), shapes(out)
    assert ran.code == 0
    assert any(after[name] != before[name] for name in names)
    assert after["stem.weight"] == before["stem.weight"]
    assert after["stage2.1.conv1.weight"] == before["stage2.1.conv1.weight"]


def test_min_channels(run: Run, resnet: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    run(resnet, "--target-flops", 0.3, "--round-to", 1, "--min-channels", 24, *QUICK, "-o", out)
    rows = {name: dims[0] for name, dims in shapes(out).items() if len(dims) == 4}
    assert min(rows.values()) >= 24
    assert min(rows.values()) < 32


@pytest.mark.parametrize("multiple", [8, 12])
def test_round_to(run: Run, resnet: Path, tmp_path: Path, multiple: int) -> None:
    out = tmp_path / "out.onnx"
    assert run(resnet, *HALF, "--round-to", multiple, *QUICK, "-o", out).code == 0
    before, after = shapes(resnet), shapes(out)
    rows = {name: dims[0] for name, dims in after.items() if len(dims) == 4}
    assert all(n % multiple == 0 or n == before[name][0] for name, n in rows.items())
    assert any(n != before[name][0] for name, n in rows.items())


# --- the other commands


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
    assert "MACs" in ran.out


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


# --- exit codes; nothing is written where one is not 0


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
    monkeypatch.setattr(prepared, "registry", lambda: lying)
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
