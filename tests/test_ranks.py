"""--units ranks: layers become two of a lower rank where that does less damage than channels."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import Ran
from graphs import Builder
from onnx import TensorProto, helper, numpy_helper
from stopwatch import board

from graphprune import api
from graphprune.cost import count_params
from graphprune.cut import cut
from graphprune.errors import TargetError, UsageError
from graphprune.factoring import shaped
from graphprune.latency.micro import Micro
from graphprune.latency.predict import Latency
from graphprune.model import Model
from graphprune.options import Options
from graphprune.plan import Plan
from graphprune.planning import decide, judge, settled
from graphprune.result import Result
from graphprune.study import study
from graphprune.tables import Table
from graphprune.targets import Target

Run = Callable[..., Ran]
WIDTH, INNER, RANK = 48, 64, 6
ALL = ("channels", "heads", "ranks")
USUAL: Mapping[str, Any] = {"samples": 128, "round_to": 2, "measure": False, "cache": False}


def low_rank(b: Builder, shape: tuple[int, ...], rank: int = RANK, noise: float = 1e-3) -> str:
    """A weight whose matrix [shape[0], the rest] is of that rank but for a little noise."""
    rows, columns = shape[0], int(np.prod(shape[1:]))
    left = b.rng.standard_normal((rows, rank)) / np.sqrt(rows)
    right = b.rng.standard_normal((rank, columns)) / np.sqrt(rank)
    weight = left @ right + noise * b.rng.standard_normal((rows, columns))
    return b.constant(weight.reshape(shape).astype(np.float32))


def mlp(weight: Callable[[Builder, int, int], str], layers: int = 2) -> onnx.ModelProto:
    """x + W2 silu(W1 x + b1), a few times."""
    b = Builder(1)
    x = "x"
    for _ in range(layers):
        h = b.add("Add", b.add("MatMul", x, weight(b, WIDTH, INNER)), b.weight(INNER))
        h = b.add("Mul", h, b.add("Sigmoid", h))
        x = b.add("Add", x, b.add("MatMul", h, weight(b, INNER, WIDTH)))
    y = b.add("MatMul", x, b.weight(WIDTH, 10))
    return b.model({"x": ["n", WIDTH]}, {y: ["n", 10]})


def low(b: Builder, rows: int, columns: int) -> str:
    return low_rank(b, (rows, columns))


def full(b: Builder, rows: int, columns: int) -> str:
    return b.weight(rows, columns)


def ranks_of(plan: Plan) -> dict[str, int]:
    return dict(plan.options["ranks"])


def pruned(source: onnx.ModelProto, **given: Any) -> Result:
    return api.prune(source, **{**USUAL, "flops": 0.5, "units": ALL, **given})


def error_of(result: Result, source: onnx.ModelProto, seed: int = 5) -> float:
    """Relative squared error of the outputs on inputs of a normal distribution."""
    first = source.graph.input[0]
    sizes = [d.dim_value or 64 for d in first.type.tensor_type.shape.dim]
    dtype = helper.tensor_dtype_to_np_dtype(first.type.tensor_type.elem_type)
    x = np.random.default_rng(seed).standard_normal(sizes).astype(dtype)
    a, b = (
        ort.InferenceSession(m.SerializeToString()).run(None, {first.name: x})[0].astype(np.float64)
        for m in (source, result.model)
    )
    return float(np.square(a - b).sum() / np.square(a).sum())


def weights(model: onnx.ModelProto) -> dict[str, bytes]:
    return {t.name: t.SerializeToString() for t in model.graph.initializer}


# --- where it wins, and where it does not ---


def test_layers_of_low_rank_become_two_and_do_better() -> None:
    source = mlp(low)
    alone, both = pruned(source, units=("channels", "heads")), pruned(source)
    assert len(ranks_of(both.plan)) >= 2
    assert both.verdict.passed
    assert both.after.macs <= 0.5 * both.before.macs == 0.5 * alone.before.macs
    assert error_of(both, source) < 0.5 * error_of(alone, source)
    assert any("two of a lower rank" in note for note in both.notes)


def test_random_layers_stay_one() -> None:
    source = mlp(full)
    alone, both = pruned(source, units=("channels", "heads")), pruned(source)
    assert not ranks_of(both.plan)
    assert both.model == alone.model
    assert any("no layer becomes two" in note for note in both.notes)


@pytest.mark.parametrize("cost", [0.0, 1.0])
def test_two_layers_must_not_take_longer_than_channels_alone(tmp_path: Path, cost: float) -> None:
    timed = {"measure": True, "rounds": 0, "round_to": None}
    timed["hardware"] = board(tmp_path, "MatMul", cost)
    source = mlp(low)
    alone, both = pruned(source, units=("channels", "heads"), **timed), pruned(source, **timed)
    said = [note for note in both.notes if "ms against" in note]
    assert len(said) == 1
    if cost:
        assert said[0].startswith("--units ranks refused: slower: ")
        assert "ms, with distortion of the outputs " in said[0]
        assert said[0].endswith(" by channels and heads alone")
        assert both.model == alone.model
        assert not ranks_of(both.plan)
    else:
        assert said[0].startswith("ranks: distortion of the outputs ")
        assert ranks_of(both.plan)


def test_what_is_nearer_only_by_promise_is_refused() -> None:
    given = {"flops": 0.2, "min_channels": 8}
    source = mlp(low)
    both = pruned(source, **given)
    assert any(n.startswith("--units ranks refused: not clearly better: ") for n in both.notes)
    assert both.model == pruned(source, units=("channels", "heads"), **given).model
    assert not ranks_of(both.plan)


def test_a_plan_alone_is_the_one_that_is_carried_out() -> None:
    for weight in (low, full):
        source = mlp(weight)
        options = Options.of(**{**USUAL, "flops": 0.5, "units": ALL})
        made, decision = api.plan(api.prepare(source, options.scope), options)
        result = pruned(source)
        assert made.to_json() == result.plan.to_json()
        assert dict(decision.ranks) == ranks_of(result.plan)


def test_within_a_drop_the_fewer_macs_win() -> None:
    drop = {"flops": None, "max_drop": 0.05}
    alone = pruned(mlp(low), units=("channels", "heads"), **drop)
    both = pruned(mlp(low), **drop)
    assert ranks_of(both.plan)
    assert both.after.macs < alone.after.macs
    assert any("of the MACs against" in note for note in both.notes)


@pytest.mark.parametrize("allow_miss", [False, True])
def test_what_channels_alone_cannot_reach_is_left_to_ranks(allow_miss: bool) -> None:
    b = Builder(6)
    x = b.add("MatMul", b.add("MatMul", "x", b.weight(WIDTH, INNER)), b.weight(INNER, WIDTH))
    for _ in range(2):  # positions of a softmax stay
        h = b.add("Softmax", b.add("MatMul", x, low_rank(b, (WIDTH, INNER))))
        x = b.add("Add", x, b.add("MatMul", h, low_rank(b, (INNER, WIDTH))))
    source = b.model({"x": ["n", WIDTH]}, {x: ["n", WIDTH]})
    with pytest.raises(TargetError):
        pruned(source, units=("channels", "heads"))
    both = pruned(source, allow_miss=allow_miss)
    assert ranks_of(both.plan)
    assert both.after.macs <= 0.5 * both.before.macs
    assert any(note.startswith("ranks: channels and heads alone ") for note in both.notes)
    assert not any("missed" in note for note in both.notes)


def test_where_nothing_else_may_leave_that_is_said() -> None:
    both = pruned(mlp(low), units=("ranks",))
    assert ranks_of(both.plan)
    assert "ranks: nothing else may leave" in both.notes


def test_too_few_inputs_to_compare_on_are_no_reason_for_two_layers() -> None:
    result = pruned(mlp(low), samples=4)
    assert any("too few calibration inputs" in note for note in result.notes)
    assert not ranks_of(result.plan)


def test_what_stays_whole_is_as_it_was() -> None:
    source = mlp(low)
    result = pruned(source, flops=0.8, repair="none")
    chosen = ranks_of(result.plan)
    before, after = weights(source), weights(result.model)
    touched = {group.signature[0][0] for group in ()} | set(chosen)
    kept = set(before) - touched - set(result.plan.kept)
    assert kept & {f"c{i}" for i in range(7)}
    assert all(before[name] == after[name] for name in kept)
    assert 0 < len(chosen) < 5
    more = len(result.model.graph.node) - len(source.graph.node)
    assert more == len(chosen)


@pytest.mark.parametrize("kind", ["Gemm", "Gemm transposed", "Conv", "strided Conv", "Conv1d"])
def test_every_kind_of_layer(kind: str) -> None:
    b = Builder(2)
    x, shape = "x", ["n", 32]
    for _ in range(2):
        if kind == "Gemm":
            x = b.add("Gemm", x, low_rank(b, (32, 32)), b.weight(32), alpha=0.5, beta=2.0)
        elif kind == "Gemm transposed":
            x = b.add("Gemm", x, low_rank(b, (32, 32)), b.weight(32), transB=1)
        elif kind == "Conv1d":
            x, shape = b.add("Conv", x, low_rank(b, (32, 32, 3)), pads=[1, 1]), ["n", 32, 9]
        else:
            stride = 2 if kind == "strided Conv" else 1
            given = {"pads": [1, 1, 1, 1], "strides": [stride] * 2}
            x = b.add("Conv", x, low_rank(b, (32, 32, 3, 3)), b.weight(32), **given)
            shape = ["n", 32, 9, 9]
        x = b.add("Relu", x)
    source = b.model({"x": shape}, {x: ["n", *[None] * (len(shape) - 1)]})
    result = pruned(source, protect=(x,))
    assert ranks_of(result.plan)
    assert result.verdict.passed
    assert error_of(result, source) < 0.02


def test_a_normalisation_after_the_layer() -> None:
    b = Builder(3)
    x = b.add("Relu", b.norm(b.add("Conv", "x", low_rank(b, (32, 16, 3, 3))), 32))
    y = b.add("Relu", b.norm(b.add("Conv", x, low_rank(b, (16, 32, 3, 3))), 16))
    source = b.model({"x": ["n", 16, 12, 12]}, {y: ["n", 16, 8, 8]})
    result = pruned(source)
    assert ranks_of(result.plan)
    assert error_of(result, source) < 0.02


def test_half_precision() -> None:
    source = mlp(low)
    for tensor in source.graph.initializer:
        tensor.CopyFrom(
            numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name)
        )
    for value in (*source.graph.input, *source.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    result = pruned(source)
    assert ranks_of(result.plan)
    assert {t.data_type for t in result.model.graph.initializer} == {TensorProto.FLOAT16}
    assert error_of(result, source) < 1e-3


def test_shared_weights_stay_one() -> None:
    b = Builder(4)
    shared = low_rank(b, (WIDTH, WIDTH))
    x = b.add("Relu", b.add("MatMul", "x", shared))
    y = b.add("MatMul", b.add("Relu", b.add("MatMul", x, shared)), low_rank(b, (WIDTH, WIDTH)))
    source = b.model({"x": ["n", WIDTH]}, {y: ["n", WIDTH]})
    result = pruned(source, flops=0.8)
    assert shared not in ranks_of(result.plan)
    assert ranks_of(result.plan)


def test_ranks_alone() -> None:
    source = mlp(low)
    result = pruned(source, units=("ranks",))
    assert ranks_of(result.plan)
    assert result.verdict.passed
    changed = {name for name in result.plan.kept if "graphprune_rank" not in name}
    assert changed == set(ranks_of(result.plan))


@pytest.mark.parametrize("option", ["protect", "only"])
def test_protected_layers_stay_one(option: str) -> None:
    source = mlp(low)
    free = ranks_of(pruned(source, units=("ranks",), flops=0.8).plan)
    first = min(free)
    given = {option: (first,), "units": ("ranks",), "flops": 0.95}
    found = ranks_of(pruned(source, **given).plan)
    assert found
    assert (set(found) == {first}) == (option == "only")
    assert (first in found) == (option == "only")


# --- what it costs ---


@pytest.mark.parametrize("kind", ["flops", "params", "size"])
def test_budgets_hold(kind: str) -> None:
    given = {"flops": None, kind: 0.6}
    result = pruned(mlp(low), **given)
    before, after = result.before, result.after
    pair = {
        "flops": (before.macs, after.macs),
        "params": (before.params, after.params),
        "size": (before.bytes, after.bytes),
    }[kind]
    assert 0.5 * pair[0] < pair[1] <= 0.6 * pair[0]
    assert ranks_of(result.plan)


def test_costs_of_the_choice_are_those_of_the_result() -> None:
    options = Options.of(**{**USUAL, "flops": 0.4, "units": ALL})
    prepared = api.prepare(mlp(low), options.scope)
    studied = study(prepared, options)
    judged = judge(studied, options)
    decision = decide(prepared, judged, options)
    assert decision.costs is not None
    after, _, there = settled(studied, judged, decision)
    found = after.prepared.analysis.cost.of(there.removed)
    assert (decision.costs.macs, decision.costs.params) == (found.macs, found.params)
    assert abs(decision.costs.bytes - found.bytes) < 100 * len(decision.ranks)
    assert decision.costs.memory > 0.999 * found.memory


class ByWeights:
    """A device on which a piece takes a microsecond for every number it holds."""

    key = "by weights"

    def piece(self, micro: Micro) -> float:
        return float(sum(np.prod(t.dims) for t in micro.model.graph.initializer))

    def pair(self, first: Model, second: Model, feeds: Any) -> tuple[float, float]:
        raise AssertionError("nothing is timed as a whole here")


def test_latency_of_two_layers_is_that_of_their_pieces() -> None:
    options = Options.of(**{**USUAL, "flops": 0.5, "units": ALL})
    prepared = api.prepare(mlp(low), options.scope)
    latency = Latency(prepared.analysis, Target("free"), Table({}), ByWeights())
    prepared = replace(prepared, latency=latency)
    judged = judge(study(prepared, options), options)
    decision = decide(prepared, judged, options)
    assert decision.ranks
    assert decision.costs is not None
    after, removed = shaped(prepared, judged.ranks, decision.ranks, decision.removed)
    found = after.analysis
    made, _ = cut(found.model, found.shapes, found.coupling, found.coupling.alive(removed))
    assert decision.costs.latency == pytest.approx(count_params(made) / 1e3)


# --- plans ---


@pytest.mark.parametrize("repair", ["obs", "none"])
def test_a_plan_makes_the_same_model_again(run: Run, tmp_path: Path, repair: str) -> None:
    model, plan = tmp_path / "m.onnx", tmp_path / "plan.json"
    onnx.save(mlp(low), model)
    usual = ("--samples", 128, "--round-to", 2, "--no-measure", "--json")
    first = run(
        "prune", model, "--target-flops", 0.5, "--units", ",".join(ALL), "--repair", repair,
        "--plan-out", plan, "-o", tmp_path / "a.onnx", *usual,
    )  # fmt: skip
    assert first.code == 0, first.err
    assert json.loads(plan.read_text())["options"]["ranks"]
    again = run("apply", model, plan, "-o", tmp_path / "b.onnx", "--no-measure", "--json")
    assert again.code == 0, again.err
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    stated = json.loads(again.out)
    assert stated["before"] == json.loads(first.out)["before"]


def test_a_plan_for_another_model_is_refused() -> None:
    made = pruned(mlp(low)).plan
    with pytest.raises(UsageError, match="belongs to another model"):
        api.apply(mlp(full), made, options=Options(cache=False))


@pytest.mark.parametrize(
    "ranks", [{"c0": 0}, {"c0": 999}, {"c0": "8"}, {"nothing": 3}, [1], {"c0": -1}]
)
def test_ranks_that_cannot_be_are_refused(ranks: Any) -> None:
    source = mlp(low)
    made = pruned(source).plan
    wrong = replace(made, options={**made.options, "ranks": ranks})
    with pytest.raises(UsageError, match="plan"):
        api.apply(source, wrong, options=Options(cache=False))


def test_weights_alone_cannot_tell() -> None:
    with pytest.raises(UsageError, match="--units ranks"):
        pruned(mlp(low), fast=True)
    with pytest.raises(UsageError, match="--units ranks"):
        pruned(mlp(low), spread="uniform")


def test_another_way_is_refused_beside_this_one() -> None:
    with pytest.raises(UsageError, match="do not work together"):
        pruned(mlp(low), unconstrained=True)
