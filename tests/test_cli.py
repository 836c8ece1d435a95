"""The command line: what it writes, what it says and where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest
from command_line import FINE, HALF, QUICK, WEIGHTS, Run, program, read_json, shapes
from graphs import Builder

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
