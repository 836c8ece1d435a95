"""The lossless clean-up from the command line: reports, plans, budgets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from idle_forms import HALF, NOISE, conv_chain, edit, finished, put

FAST = ("--fast", "--target-flops", "0.4")


def masked(path: Any) -> None:
    """A file of a chain of which half of the first layer's filters are zero."""
    b = conv_chain(norm=False)
    edit(b, "c0", put(HALF, 0))
    edit(b, "c1", put(HALF, 0))
    onnx.save(finished(b), path)


def test_without_a_budget_the_clean_up_is_all(run: Any, tmp_path: Path) -> None:
    model, out = tmp_path / "m.onnx", tmp_path / "o.onnx"
    masked(model)
    ran = run(model, "-o", out, "--json")
    document = json.loads(ran.out)
    assert ran.code == 0
    assert document["lossless"]["dead"] == 16
    assert document["lossless"]["groups"] == [
        {"name": "c0:0", "why": "dead", "before": 32, "after": 16}
    ]
    assert document["ratio"]["macs"] < 0.6
    assert document["repairs"] == []
    assert document["output_difference"] < NOISE
    assert "lossless: 16 dead units of 1 group removed" in document["notes"]
    assert tuple(onnx.load(out).graph.initializer[0].dims) == (16, 3, 3, 3)


def test_what_left_without_loss_counts_towards_the_budget(run: Any, tmp_path: Path) -> None:
    model, out = tmp_path / "m.onnx", tmp_path / "o.onnx"
    masked(model)
    met = json.loads(run(model, "-o", out, "--json", "--fast", "--target-flops", "0.7").out)
    assert tuple(onnx.load(out).graph.initializer[0].dims) == (16, 3, 3, 3)
    assert met["ratio"]["macs"] < 0.6
    half = json.loads(run(model, "-o", out, "--json", "--round-to", "4", *FAST).out)
    assert 0.3 < half["ratio"]["macs"] <= 0.4


@pytest.mark.parametrize("budget", [(), FAST], ids=str)
def test_a_plan_makes_the_same_model_again(run: Any, tmp_path: Path, budget: Any) -> None:
    model, out, again = (tmp_path / name for name in ("m.onnx", "o.onnx", "a.onnx"))
    masked(model)
    plan = tmp_path / "plan.json"
    assert run(model, *budget, "-o", out, "--plan-out", plan, "--no-measure").code == 0
    assert json.loads(plan.read_text())["options"]["lossless"] is True
    assert run("apply", model, plan, "-o", again, "--no-measure").code == 0
    assert out.read_bytes() == again.read_bytes()


def test_nothing_to_do_gives_the_model_back(run: Any, small: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.onnx"
    ran = run(small, "-o", out, "--json")
    assert ran.code == 0
    assert "lossless: nothing here is dead" in str(json.loads(ran.out)["notes"])
    assert onnx.load(out) == onnx.load(small)
    assert run(small, "-o", out, "--no-lossless").code == 2


def test_batch_normalisation_is_folded_where_something_left(run: Any, tmp_path: Path) -> None:
    b = conv_chain(norm=True)
    edit(b, "c4", put(HALF, 0))
    edit(b, "c3", put(HALF, -0.5))
    model, out = tmp_path / "m.onnx", tmp_path / "o.onnx"
    onnx.save(finished(b), model)
    document = json.loads(run(model, "-o", out, "--json", "--no-measure").out)
    assert "BatchNormalization" not in {node.op_type for node in onnx.load(out).graph.node}
    assert "lossless: 1 BatchNormalization folded" in document["notes"]
    stored = sum(np.prod(t.dims) for t in onnx.load(out).graph.initializer)
    assert document["after"]["params"] == stored


def test_inspect_and_compare(run: Any, tmp_path: Path) -> None:
    model, out = tmp_path / "m.onnx", tmp_path / "o.onnx"
    masked(model)
    shown = json.loads(run("inspect", model, "--json").out)
    assert shown["lossless"]["dead"] == 16
    assert shown["groups"][0]["units"] == 16
    assert "lossless: 16 dead units" in run("inspect", model).out
    as_given = json.loads(run("inspect", model, "--json", "--no-lossless").out)
    assert as_given["lossless"] is None
    assert as_given["groups"][0]["units"] == 32
    assert run(model, "-o", out).code == 0
    compared = json.loads(run("compare", model, out, "--json").out)
    assert compared["b"]["macs"] < 0.6 * compared["a"]["macs"]
