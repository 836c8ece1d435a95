"""Outputs whose sizes the data decides, and what is said where plans have nothing to be compared
by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import Builder
from refusals import HALF, USAGE, Run, refused, store

from graphprune import api, carry_out, validate
from graphprune.analysis import Scope
from graphprune.distortion import agreement, distortion, divergence, relative_error, row_errors
from graphprune.errors import ModelError, TargetError, UsageError
from graphprune.prepared import analyse
from graphprune.storage import load

QUICK: dict[str, Any] = {"samples": 16, "cache": False, "round_to": 1}


def detector() -> onnx.ModelProto:
    """The pixels above a threshold and their scores: as many as there are."""
    b = Builder(3)
    x = b.add("Relu", b.conv("x", 3, 8))
    x = b.add("Relu", b.conv(x, 8, 8))
    scores = b.conv(x, 8, 1)
    flat = b.add("Reshape", scores, b.ints(-1))
    found = b.add("NonZero", b.add("Greater", flat, b.constant(np.float32(0))))
    y = b.add("GatherND", flat, b.add("Transpose", found, perm=[1, 0]))
    return b.model({"x": ["n", 3, 24, 24]}, {y: ["m"]})


def test_detections_are_compared_though_their_number_changes() -> None:
    result = api.prune(detector(), 0.4, repair="none", **QUICK)
    assert result.verdict.passed and result.after.macs <= 0.4 * result.before.macs
    assert result.verdict.output_difference == np.inf
    assert any("another size than the original's" in note for note in result.notes)


def test_an_answer_of_another_shape_says_nothing() -> None:
    rng = np.random.default_rng(0)
    for shape in ((6,), (6, 4), (2, 6, 4)):
        expected = rng.standard_normal(shape, dtype=np.float32)
        shorter = expected[..., :-1] if len(shape) == 1 else expected[:, :-1]
        nothing = np.zeros_like(expected)
        for measure in (distortion, relative_error, agreement, divergence, row_errors):
            found: Any = measure([expected], [shorter])
            wanted: Any = measure([expected], [nothing])
            assert np.array_equal(found, wanted), measure.__name__
        assert relative_error([expected], [shorter]) == 1


# --- what cannot be compared is said by the options that are why


def test_a_search_without_a_budget(run: Run, small: Path) -> None:
    refused(run, small, USAGE, "--search", "--target-flops", extra=("--search", "3"))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"repair": "moments", "criterion": "l2"}, "--criterion l2 and --repair moments"),
        ({"criterion": "l2", "repair": "none"}, "--criterion l2 and --repair none"),
    ],
)
@pytest.mark.parametrize("wanted", [{"flops": 0.5, "search": 2}, {"max_drop": 0.3}])
def test_nothing_looks_at_inputs(
    chain: onnx.ModelProto, options: dict[str, Any], named: str, wanted: dict[str, Any]
) -> None:
    with pytest.raises(UsageError, match="nothing here looks at any") as caught:
        api.prune(chain, **wanted, **options, **QUICK)
    assert named in caught.value.hint


def test_a_search_with_nothing_to_vary_says_so(chain: onnx.ModelProto) -> None:
    """Ranks of layers have no groups whose curves could be weighed otherwise."""
    options: dict[str, Any] = {"units": ("ranks",), "allow_miss": True, "repair": "obs"}
    result = api.prune(chain, 0.5, search=2, **options, **QUICK)
    assert any("--search had nothing to vary" in note for note in result.notes)


# --- what is reachable is a share of the user's model


def padded(path: Path) -> Path:
    """Half of the hidden channels are dead, and leave before anything else."""
    b = Builder(3)
    weight = np.zeros((16, 3, 3, 3), np.float32)
    weight[:8] = b.rng.standard_normal((8, 3, 3, 3))
    x = b.add("Relu", b.add("Conv", "x", b.constant(weight)))
    y = b.conv(x, 16, 4)
    return store(b.model({"x": [1, 3, 8, 8]}, {y: [1, 4, 6, 6]}), path)


@pytest.mark.parametrize("kind", ["flops", "size", "params"])
def test_a_missed_budget_is_said_in_shares_of_the_given_model(tmp_path: Path, kind: str) -> None:
    path = padded(tmp_path / "model.onnx")
    asked: dict[str, Any] = {kind: 0.05, "fast": True, "min_channels": 4, **QUICK}
    with pytest.raises(TargetError) as caught:
        api.prune(path, **asked)
    assert f"--target-{kind} 0.05 (reachable " in caught.value.what
    share = float(caught.value.what.split("reachable ")[1].split(")")[0])
    if kind != "size":  # of which the counts are a part, the rest is known after the cut
        assert api.prune(path, **{**asked, kind: share}).after.macs > 0
    with pytest.raises(TargetError):
        api.prune(path, **{**asked, kind: share * 0.9})


def test_a_result_that_holds_more_than_was_counted_is_never_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = padded(tmp_path / "model.onnx")
    monkeypatch.setattr(carry_out, "RETRIES", 0)
    asked: dict[str, Any] = {"size": 0.33, "fast": True, "min_channels": 1, **QUICK}
    with pytest.raises(TargetError, match=r"--target-size 0\.33 \(the result has 0\.[0-9]+\)"):
        api.prune(path, **asked)
    result = api.prune(path, allow_miss=True, **asked)
    assert result.after.bytes > 0.33 * result.before.bytes
    assert any("budget missed: --target-size" in note for note in result.notes)


# --- what a repair adds is in the counts


def test_a_bias_at_an_output_counts_in_memory(tmp_path: Path) -> None:
    """ONNX Runtime adds nothing into an output in place."""
    b = Builder(3)
    hidden = b.add("Relu", b.add("MatMul", "x", b.weight(16, 32)))
    y = b.add("MatMul", hidden, b.weight(32, 200))
    path = store(b.model({"x": [4, 6, 16]}, {y: [4, 6, 200]}), tmp_path / "model.onnx")
    out = tmp_path / "out.onnx"
    result = api.prune(path, 0.5, output=out, **QUICK)
    assert any(node.op_type == "Add" for node in result.model.graph.node)
    again = analyse(load(out), 0, Scope(lossless=False)).analysis
    assert result.after.memory == again.cost.of(again.nothing_removed).memory
    with pytest.raises(TargetError, match="--target-memory"):
        api.prune(path, 0.5, peak_memory=0.99, **QUICK)


def test_too_few_made_up_inputs_to_compare_plans_on(run: Run, small: Path) -> None:
    """Eight made-up inputs may be one chunk: more are asked for by the option that makes them."""
    extra = ("--target-flops", "0.5", "--search", "2", "--samples", "1", "--no-cache")
    refused(run, small, USAGE, "too few calibration inputs", "--samples", extra=extra)


@pytest.mark.parametrize("measure", [(), ("--no-measure",)])
def test_a_result_that_onnx_runtime_refuses_is_not_written(
    run: Run, small: Path, monkeypatch: pytest.MonkeyPatch, measure: tuple[str, ...]
) -> None:
    """Its optimisations may fail on what is left, though the cut is proved."""

    def refusing(*_: object, **__: object) -> None:
        raise ModelError("Node (q) [TypeInferenceError]")

    monkeypatch.setattr(validate, "session", refusing)
    monkeypatch.setattr(validate, "profiled_sessions", refusing)
    extra = (*HALF, "--fast", *measure)
    refused(run, small, 5, "refuses the result", "TypeInferenceError", extra=extra)
