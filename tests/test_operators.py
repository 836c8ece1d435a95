"""Latency by type of operator: the profiler's events added up, and what is said of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from command_line import read_json
from graphs import Builder

from graphprune.operators import Operator, by_type, profiled_sessions
from graphprune.report.operators import ROWS, held_back, operators_table
from graphprune.report.terminal import to_text
from graphprune.storage import load

Run = Callable[..., Any]


def kernel(name: str, ts: int, dur: int) -> dict[str, Any]:
    args = {"op_name": name}
    return {"cat": "Node", "name": f"n_{ts}_kernel_time", "ts": ts, "dur": dur, "args": args}


def run_of(ts: int, dur: int) -> dict[str, Any]:
    return {"cat": "Session", "name": "model_run", "ts": ts, "dur": dur}


def test_medians_over_runs_after_the_warm_up() -> None:
    """Two Convs a run: 2, 4 and 12 µs together in the runs that count; the first two do not."""
    events: list[dict[str, Any]] = [{"cat": "Session", "name": "model_loading", "ts": 0, "dur": 9}]
    for run, (first, second) in enumerate([(90, 9), (80, 8), (1, 1), (2, 2), (6, 6)]):
        start = 100 + 1000 * run
        events += [kernel("Conv", start + 1, first), kernel("Conv", start + 200, second)]
        events += [kernel("Gemm", start + 400, 3), run_of(start, 500)]
        events.append({"cat": "Node", "name": "n_fence_before", "ts": start, "dur": 9, "args": {}})
    assert by_type(events) == {"Conv": 0.004, "Gemm": 0.003}


def test_a_body_does_not_count_twice() -> None:
    """A Loop of 100 µs with three Adds of 20 inside, and a Relu after it."""
    events = []
    for run in range(3):
        start = 1000 * run
        events += [kernel("Add", start + 10 + 30 * k, 20) for k in range(3)]
        events += [kernel("Loop", start + 1, 100), kernel("Relu", start + 101, 7)]
        events.append(run_of(start, 200))
    assert by_type(events) == {"Add": 0.06, "Loop": 0.04, "Relu": 0.007}


def test_a_type_that_some_runs_lack() -> None:
    """One branch of an If, say: half of the runs without it have nothing of it."""
    events = [run_of(1000 * run, 100) for run in range(7)]
    events += [kernel("Exp", 1000 * run + 5, 10) for run in (4, 5, 6)]
    assert by_type(events) == {"Exp": 0.01}


def test_sessions_are_profiled_and_leave_nothing_behind(
    chain: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    import numpy as np

    feeds = {"x": np.zeros((1, 3, 8, 8), np.float32)}
    runners, operators = profiled_sessions([load(chain), load(chain)], feeds, 1, "cpu")
    assert list(tmp_path.iterdir()) == []
    names = {operator.name for operator in operators}
    assert {"Conv"} <= names  # with its Relu inside
    assert "Relu" not in names
    assert sum(operator.share for operator in operators) == pytest.approx(1)
    assert all(operator.before_ms >= 0 and operator.after_ms >= 0 for operator in operators)
    assert len(runners[0].run(None, feeds)) == 1  # usable after the profile ended
    assert list(tmp_path.iterdir()) == []


def test_operators_run_in_bodies_are_named(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["": 17]>
    g (float[4] x) => (float[4] y) <int64 n = {3}> {
        c = Equal(n, n)
        y = Loop (n, c, x) <body = b (int64 i, bool c_in, float[4] s) => (bool c_out, float[4] t) {
            c_out = Identity(c_in)
            t = Cos(s)
        }>
    }"""
    import numpy as np

    model = load(onnx.parser.parse_model(text))
    feeds = {"x": np.zeros(4, np.float32)}
    _, operators = profiled_sessions([model, model], feeds, 1, "cpu")
    assert {"Loop", "Cos"} <= {operator.name for operator in operators}


# --- what holds the latency back

FALLEN = Operator("MatMul", 8.0, 4.0, 0.8)


def test_nothing_is_said_where_latency_followed() -> None:
    stayed = Operator("Softmax", 2.0, 2.0, 0.2)
    assert held_back(0.5, 0.54, [FALLEN, stayed]) is None
    assert held_back(0.5, None, [FALLEN, stayed]) is None
    assert held_back(0.5, 0.6, []) is None


def test_the_operators_that_stayed_are_named() -> None:
    stayed = [Operator("Softmax", 1.0, 1.0, 0.1), Operator("LayerNormalization", 1.0, 0.9, 0.1)]
    said = held_back(0.5, 0.6, [FALLEN, *stayed])
    assert said == (
        "latency is 0.60 of the original's, MACs are 0.50 of theirs; what takes longer than its "
        "share of the MACs, by type of operator: Softmax 56 % (1.000 -> 1.000 ms), "
        "LayerNormalization 44 % (1.000 -> 0.900 ms)"
    )


def test_the_worst_is_enough_where_it_is_most_of_it() -> None:
    others = [Operator("Softmax", 2.0, 2.0, 0.18), Operator("Add", 0.2, 0.2, 0.02)]
    said = held_back(0.5, 0.6, [FALLEN, *others])
    assert said is not None
    assert said.endswith("Softmax 91 % (2.000 -> 2.000 ms), all others 9 %")


def test_a_new_operator_is_called_new() -> None:
    said = held_back(0.5, 0.7, [FALLEN, Operator("ReorderInput", 0.0, 1.5, 0.0)])
    assert said is not None
    assert said.endswith("ReorderInput 100 % (new, 1.500 ms)")


def test_a_profile_that_does_not_show_it_says_nothing() -> None:
    assert held_back(0.5, 0.7, [Operator("MatMul", 8.0, 3.0, 1.0)]) is None


def test_the_table_is_short() -> None:
    many = [Operator(f"Op{i}", 1.0 + i, 1.0, 0.01) for i in range(ROWS + 3)]
    text = to_text(operators_table([*many, Operator("ReorderInput", 0.0, 99.0, 0.0)]), 120)
    assert "4 others" in text
    assert "new" in text
    assert len([line for line in text.splitlines() if " ms " in line]) == ROWS + 1


# --- on the command line


def test_report_and_document(run: Run, small: Path) -> None:
    given = (small, "--target-flops", 0.5, "--fast", "--round-to", 1)
    document = read_json(run(*given, "--json").out)
    names = {operator["name"] for operator in document["operators"]}
    assert "Conv" in names
    assert set(document["operators"][0]) == {"name", "before_ms", "after_ms", "share"}
    assert document["held_back"] is None or "takes longer than its share" in document["held_back"]
    assert "time by operator" not in run(*given).out
    assert "time by operator" in run(*given, "--per-operator").out


def test_nothing_measured(run: Run, small: Path) -> None:
    given = (small, "--target-flops", 0.5, "--fast", "--round-to", 1, "--no-measure")
    document = read_json(run(*given, "--json").out)
    assert (document["operators"], document["held_back"]) == ([], None)
    refused = run(*given, "--per-operator")
    assert refused.code == 2
    assert "--per-operator" in refused.err


def test_names_are_those_that_run() -> None:
    """A builder's two Convs and a Relu between run as two fused Convs."""
    import numpy as np

    b = Builder()
    y = b.conv(b.add("Relu", b.conv("x", 3, 32)), 32, 32)
    model = load(b.model({"x": [1, 3, 8, 8]}, {y: [1, 32, 8, 8]}))
    feeds = {"x": np.zeros((1, 3, 8, 8), np.float32)}
    _, operators = profiled_sessions([model, model], feeds, 1, "cpu")
    assert "Relu" not in {operator.name for operator in operators}
