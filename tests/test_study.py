"""Calibrated planning from end to end: evidence, the plan, the repair."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from study_forms import QUICK, content, draw, network, studied

from graphprune import api, search
from graphprune.criteria import Scoring
from graphprune.distortion import relative_error
from graphprune.errors import UsageError
from graphprune.planning import decide, judge
from graphprune.storage import load

# --- the same again


@pytest.mark.parametrize("criterion", ["obspa", "wanda", "flap", "variance", "l1"])
def test_criteria_meet_the_budget_and_give_one_plan(path: Path, criterion: str) -> None:
    first, again = (api.prune(path, criterion=criterion, cache=False, **QUICK) for _ in range(2))
    assert first.plan.to_json() == again.plan.to_json()
    assert content(first) == content(again)
    assert first.after.macs <= 0.5 * first.before.macs
    assert first.plan.options["criterion"] == criterion
    assert first.repairs
    onnx.checker.check_model(first.model, full_check=True)


def test_a_seed_decides_what_is_made_up(path: Path) -> None:
    keys = {
        api.prune(path, cache=False, scoring=Scoring(seed=seed), **QUICK).plan.options[
            "calibration"
        ]["key"]
        for seed in (0, 1)
    }
    assert len(keys) == 2


def test_scores_rise_in_the_order_in_which_units_leave(path: Path) -> None:
    """Obspa's scores in the plan are the distortion once a unit has left."""
    made = api.prune(path, cache=False, **QUICK).plan
    for group in made.groups:
        gone = [group.scores[i] for i in group.removed]
        kept = [s for i, s in enumerate(group.scores) if i not in group.removed]
        assert not gone or max(gone) <= min(kept)


def test_repair_and_evidence_help(path: Path, calib: Path) -> None:
    """The default is nearer to the original than magnitudes without a repair."""
    original = load(path)
    feeds = [{"x": draw(64, 3, 6, 6, seed=9)}]
    expected = search._outputs(original, feeds)

    def off(**options: Any) -> float:
        given = {**QUICK, "calib": calib, "samples": 30, **options}
        result = api.prune(path, cache=False, **given)
        return relative_error(expected[0], search._outputs(load(result.model), feeds)[0])

    assert off() < 0.5 * off(criterion="l1", repair="none", calib=None)


# --- what contradicts what


@pytest.mark.parametrize(
    "options",
    [
        {"calib": "calib.npz"},
        {"search": 2},
        {"spread": "solved"},
        {"criterion": "obspa"},
        {"repair": "obs"},
    ],
    ids=str,
)
def test_fast_looks_at_weights_alone(path: Path, calib: Path, options: dict[str, Any]) -> None:
    given = {**options, "calib": calib} if "calib" in options else options
    with pytest.raises(UsageError, match="fast"):
        api.prune(path, fast=True, measure=False, flops=0.5, **given)


def test_fast_and_calib_on_the_command_line(path: Path, calib: Path, run: Any) -> None:
    done = run(path, "--target-flops", "0.5", "--fast", "--calib", calib)
    assert done.code == 2
    assert "--fast" in done.err
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]


def test_solved_means_solved(path: Path) -> None:
    """Asked for by name, it is done or refused; not quietly ranked instead."""
    with pytest.raises(UsageError, match="solved"):
        api.prune(path, criterion="l1", repair="none", spread="solved", flops=0.5, measure=False)


def test_a_search_among_equals_is_refused(path: Path) -> None:
    """Ranked by score, weights on curves change nothing: all candidates would be one."""
    with pytest.raises(UsageError, match="search"):
        api.prune(path, search=2, spread="global", **QUICK)


@pytest.mark.parametrize("spread", ["global", "uniform", "balanced"])
def test_every_spread_works_on_evidence(path: Path, spread: str) -> None:
    result = api.prune(path, spread=spread, cache=False, **QUICK)
    assert result.after.macs <= 0.5 * result.before.macs


def test_a_decision_uses_its_margins(path: Path) -> None:
    done, options = studied(path)
    judged = judge(done, options)
    cost = done.prepared.analysis.cost
    assert options.flops is not None
    budget = options.flops * cost.of(done.prepared.analysis.nothing_removed).macs
    margin = 0.3 * budget
    assert budget - margin < cost.of(decide(done.prepared, judged, options).removed).macs <= budget
    spared = decide(done.prepared, judged, options, {"macs": margin}).removed
    assert cost.of(spared).macs <= budget - margin


# --- models that are no plain pictures


def test_an_operator_without_a_schema_in_the_middle() -> None:
    """ONNX Runtime's own operators: models that it optimised are full of them."""
    proto = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
    g (float[n, 8] x) => (float[n, 4] y) {
        a = MatMul(x, u)
        r = Relu(a)
        b = MatMul(r, v)
        z = com.microsoft.Gelu(b)
        c = MatMul(z, w)
        d = Relu(c)
        y = MatMul(d, t)
    }""")
    weights = {"u": draw(8, 32), "v": draw(32, 16), "w": draw(16, 32), "t": draw(32, 4)}
    proto.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in weights.items())
    result = api.prune(proto, flops=0.6, samples=16, measure=False)
    assert result.after.macs <= 0.6 * result.before.macs


def test_a_scalar_input_and_control_flow() -> None:
    proto = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
    g (float[n, 8] x, bool k) => (float[n, 4] y) {
        a = MatMul(x, u)
        r = Relu(a)
        b = MatMul(r, v)
        z = If (k) <then_branch = p () => (float[n, 16] q) { q = Relu(b) },
                    else_branch = e () => (float[n, 16] q) { q = Neg(b) }>
        c = MatMul(z, w)
        d = Relu(c)
        y = MatMul(d, t)
    }""")
    weights = {"u": draw(8, 32), "v": draw(32, 16), "w": draw(16, 32), "t": draw(32, 4)}
    proto.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in weights.items())
    result = api.prune(proto, flops=0.6, samples=16, measure=False)
    assert result.after.macs <= 0.6 * result.before.macs


def test_a_fixed_batch(tmp_path: Path) -> None:
    """As many chunks as samples, and still the same plan for the same samples."""
    proto = network()
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    np.savez(tmp_path / "calib.npz", x=draw(20, 3, 6, 6))
    result = api.prune(proto, calib=tmp_path / "calib.npz", **{**QUICK, "samples": 20})
    assert result.after.macs <= 0.5 * result.before.macs
    assert result.plan.options["calibration"]["samples"] == 20
