"""--unconstrained: channels in another order, selectors as plain nodes, plans compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import Builder, random_cnn
from stopwatch import board
from test_reads import NETWORKS, in_float64, opened, projections, residual, some

from graphprune import api
from graphprune.analysis import Analysis
from graphprune.cut import cut
from graphprune.errors import UsageError
from graphprune.latency.selectors import readers, unpaid
from graphprune.model import Model
from graphprune.options import Options
from graphprune.oracle import law_error
from graphprune.ordering import ordered, ranges
from graphprune.pipeline import Context, Pipeline
from graphprune.plan import read_plan
from graphprune.runtime import random_inputs
from graphprune.selectors import is_selector
from graphprune.shapes import infer
from graphprune.storage import load
from graphprune.targets import Target
from graphprune.unconstrained import removed_by_readers
from graphprune_passes.reorder_channels import ReorderChannels
from graphprune_passes.settle_reads import SettleReads

QUICK = {"criterion": "l1", "repair": "none", "samples": 64, "measure": False, "round_to": 1}


def masks(size: int, *sets: set[int]) -> list[np.ndarray[Any, Any]]:
    return [np.isin(np.arange(size), sorted(s)) for s in sets]


def settled(analysis: Analysis, removed: np.ndarray[Any, Any]) -> Model:
    alive = analysis.coupling.alive(removed)
    small = cut(analysis.model, analysis.shapes, analysis.coupling, alive)[0]
    return Pipeline((ReorderChannels(), SettleReads())).run(small, Context()).model


def by_reader(analysis: Analysis, kept: list[list[int]]) -> np.ndarray[Any, Any]:
    """Units that leave where each selector gives just these positions."""
    coupling, slots = analysis.coupling, analysis.relations.slots.tensors
    removed = analysis.nothing_removed
    readers = [n for n in analysis.model.nodes if is_selector(n)]
    for node, wanted in zip(readers, kept, strict=True):
        units = coupling.unit_of(slots[node.output[0]][1].slots)
        removed[np.delete(units, wanted)] = True
    return coupling.closed(removed)


def test_a_chain_of_sets_becomes_ranges() -> None:
    sets = masks(10, {0, 5, 7}, {5, 7, 3, 9}, {9, 3, 1})
    order = ordered(10, sets)
    assert sorted(order.tolist()) == list(range(10))
    assert ranges(order, sets) == 3
    assert ranges(np.arange(10), sets) == 0


def test_sets_inside_sets_are_ranges_inside_them() -> None:
    sets = masks(9, {8, 0, 4, 2}, {0, 2}, {5, 7}, {8})
    assert ranges(ordered(9, sets), sets) == 4


def test_many_overlapping_sets_take_bounded_steps() -> None:
    rng = np.random.default_rng(0)
    sets = [rng.random(512) < 0.5 for _ in range(64)]  # exponentially many paths
    assert sorted(ordered(512, sets).tolist()) == list(range(512))


def test_an_empty_list_of_sets_moves_nothing() -> None:
    assert ordered(4, []).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("name", [*NETWORKS, *range(8)])
def test_another_order_changes_no_output(name: str | int) -> None:
    source = NETWORKS[name]() if isinstance(name, str) else random_cnn(name)
    model = load(source)
    rng = np.random.default_rng(3)
    analysis = Context().analysis(model)
    axes = [axis for axis in analysis.coupling.parameters if axis.tensor in model.initializers]
    kept = {
        f"{a.tensor}:{a.index}": [np.flatnonzero(rng.random(len(a)) < 0.5).tolist()] for a in axes
    }
    result = ReorderChannels(kept).run(model, Context())
    assert [n.op_type for n in result.model.nodes] == [n.op_type for n in model.nodes]
    feeds = random_inputs(model, infer(model))
    for before, after in zip(
        in_float64(model)(feeds), in_float64(result.model)(feeds), strict=True
    ):
        assert np.abs(before - after).max() <= 1e-12 * max(1.0, np.abs(before).max())
    if isinstance(name, str):
        assert result.changes


def test_an_order_that_the_interface_knows_stays() -> None:
    analysis = opened(projections())
    small = cut(analysis.model, analysis.shapes, analysis.coupling,
                analysis.coupling.alive(some(analysis, 0)))[0]  # fmt: skip
    result = ReorderChannels().run(small, Context())
    assert any("something knows the order" in entry.reason for entry in result.skipped)


def test_selectors_become_what_they_must_be() -> None:
    analysis = opened(residual())
    removed = by_reader(analysis, [list(range(8)), [2, 3, 4], [2, 3, 4]])
    model = settled(analysis, removed)
    assert [n.op_type for n in model.nodes].count("Slice") == 2  # the first needs none
    assert not any(n.op_type == "Gather" for n in model.nodes)
    assert len(model.nodes) == len(load(residual()).nodes) + 2


def test_equal_selectors_of_one_tensor_are_one() -> None:
    analysis = opened(projections())
    coupling, slots = analysis.coupling, analysis.relations.slots.tensors
    removed = analysis.nothing_removed
    readers = [n for n in analysis.model.nodes if is_selector(n)]
    for node, gone in zip(readers, ([3, 7], [3, 7], [0, 1]), strict=True):
        removed[coupling.unit_of(slots[node.output[0]][2].slots)[gone]] = True
    kinds = [n.op_type for n in settled(analysis, removed).nodes]
    assert kinds.count("Gather") == 1
    assert kinds.count("Slice") == 1


def test_an_order_makes_slices_of_gathers() -> None:
    analysis = opened(residual())
    model = settled(analysis, by_reader(analysis, [[0, 3, 6], [3, 6, 1, 5], [1, 5, 7]]))
    assert [n.op_type for n in model.nodes].count("Slice") == 3
    assert not any(n.op_type == "Gather" for n in model.nodes)


@pytest.mark.parametrize("name", NETWORKS)
def test_settled_models_equal_the_masked_one_in_float64(name: str) -> None:
    analysis = opened(NETWORKS[name]())
    feeds = random_inputs(analysis.model, analysis.shapes)
    for seed in range(3):
        removed = some(analysis, seed)
        model = settled(analysis, removed)
        assert not any(is_selector(node) for node in model.nodes)
        alive = analysis.coupling.alive(removed)
        parts = analysis.model, model, analysis.shapes, analysis.coupling, alive, feeds
        assert law_error(*parts, open_model=in_float64) <= 1e-12


def test_kept_sets_by_reader() -> None:
    analysis = opened(residual())
    weights = [n.input[1] for n in analysis.model.nodes if n.op_type == "Conv"]
    mask = np.ones(8, dtype=bool)
    mask[[1, 4]] = False
    removed = removed_by_readers(analysis, {(weights[1], 1): mask})
    alive = analysis.coupling.alive(removed)
    slots = analysis.relations.slots.tensors
    assert (alive[slots[weights[1]][1].slots] == mask).all()
    assert alive[slots[weights[0]][0].slots].all()
    assert alive[slots[weights[3]][1].slots].all()
    with pytest.raises(UsageError, match="nothing is kept"):
        removed_by_readers(analysis, {(weights[1], 1): np.zeros(8, dtype=bool)})
    with pytest.raises(UsageError, match="must stay"):
        removed_by_readers(analysis, {(weights[0], 1): np.array([True, False, True])})
    with pytest.raises(UsageError, match="5 numbers for 8 channels"):
        removed_by_readers(analysis, {(weights[1], 1): np.ones(5, dtype=bool)})


def uneven() -> onnx.ModelProto:
    """A stream of 16 channels of which two readers need one half each, and the head all."""
    b = Builder(9)
    x = b.conv("x", 3, 16)
    for half in (slice(0, 8), slice(8, 16)):
        weight = b.rng.standard_normal((32, 16, 3, 3)) / 12
        weight[:, half] *= 1e-3
        inner = b.add("Conv", b.add("Relu", x), b.constant(np.float32(weight)), pads=[1] * 4)
        inner = b.add("Relu", inner)
        x = b.add("Add", x, b.conv(inner, 32, 16))
    y = b.add("MatMul", b.add("Flatten", b.add("GlobalAveragePool", x)), b.weight(16, 5))
    return b.model({"x": [1, 3, 8, 8]}, {y: [1, 5]})


def test_readers_that_need_other_halves_keep_them() -> None:
    result = api.prune(uneven(), flops=0.7, unconstrained=True, **QUICK)
    usual = api.prune(uneven(), flops=0.7, **QUICK)
    assert result.before == usual.before  # selectors are no part of what was given
    assert any(note.startswith("unconstrained: ") for note in result.notes)
    assert result.verdict.passed
    assert result.after.macs <= 0.7 * result.before.macs
    assert any(n.op_type in ("Slice", "Gather") for n in result.model.graph.node)
    assert len(result.model.graph.node) <= len(usual.model.graph.node) + 3
    assert result.plan.options["unconstrained"] is True


def test_where_nothing_is_shared_that_is_said(chain: onnx.ModelProto) -> None:
    result = api.prune(chain, flops=0.7, unconstrained=True, **QUICK)
    said = [note for note in result.notes if "--unconstrained refused" in note]
    assert "no channels have several readers" in said[0]
    assert result.plan.options["unconstrained"] is False
    assert result.model == api.prune(chain, flops=0.7, **QUICK).model


def test_a_plan_makes_the_same_model_again(run: Callable[..., Any], tmp_path: Path) -> None:
    source, plan = tmp_path / "m.onnx", tmp_path / "plan.json"
    first, again = tmp_path / "first.onnx", tmp_path / "again.onnx"
    onnx.save(uneven(), source)
    options = "--criterion l1 --repair none --target-flops 0.7 --round-to 1 --samples 64"
    options += " --no-measure --unconstrained"
    ran = run(source, *options.split(), "-o", first, "--plan-out", plan)
    assert ran.code == 0, ran.err
    assert "unconstrained: " in ran.out
    assert json.loads(plan.read_text())["options"]["unconstrained"] is True
    assert read_plan(plan).options["unconstrained"] is True
    assert run("apply", source, plan, "-o", again, "--no-measure").code == 0
    assert again.read_bytes() == first.read_bytes()


def test_a_plan_with_another_word_for_it_is_refused(run: Callable[..., Any], small: Path) -> None:
    from test_plan import seal

    plan = small.with_name("plan.json")
    quick = "--fast --repair none --target-flops 0.6 --no-measure --quiet"
    assert run(small, *quick.split(), "--plan-out", plan, "-o", small.with_name("o.onnx")).code == 0
    document = json.loads(plan.read_text())
    document["options"]["unconstrained"] = "yes"
    plan.write_text(json.dumps(seal(document)))
    ran = run("apply", small, plan, "-o", small.with_name("again.onnx"))
    assert ran.code == 2
    assert "malformed" in ran.err


def test_masks_and_their_plan_find_the_inputs_of_other_plans(tmp_path: Path) -> None:
    """Calibration inputs belong to the model as it is given, with selectors in it or not."""
    source = tmp_path / "m.onnx"
    b = Builder(2)
    x = b.add("Relu", b.conv("x", 3, 8))
    x = b.add("Relu", b.add("Add", b.conv(x, 8, 4), b.conv(x, 8, 4)))
    y = b.add("MatMul", b.add("Flatten", b.add("GlobalAveragePool", x)), b.weight(4, 5))
    onnx.save(b.model({"x": ["n", 3, 8, 8]}, {y: ["n", 5]}), source)
    masks = [np.ones((4, 8, 3, 3), np.int64) for _ in range(2)]
    masks[0][:, [1, 2]] = masks[1][:, 5] = 0
    np.savez(tmp_path / "masks.npz", c2=masks[0], c4=masks[1])
    options: dict[str, Any] = {"measure": False, "samples": 300}
    masked = api.prune(source, masks=tmp_path / "masks.npz", unconstrained=True, **options)
    plain = api.prune(source, flops=0.8, **options)
    assert "matched" in str(masked.calibration)
    assert masked.plan.options["calibration"]["key"] == plain.plan.options["calibration"]["key"]
    again = api.apply(source, masked.plan)
    assert again.model.SerializeToString() == masked.model.SerializeToString()


def test_masks_that_disagree_serve_each_reader(run: Callable[..., Any], tmp_path: Path) -> None:
    source, masks, out = tmp_path / "m.onnx", tmp_path / "masks.npz", tmp_path / "out.onnx"
    onnx.save(residual(), source)
    weights = [n.input[1] for n in load(residual()).nodes if n.op_type == "Conv"]
    kept = {weights[1]: [0, 1, 2], weights[3]: [2, 3, 5, 6]}
    arrays = {}
    for name, positions in kept.items():
        arrays[name] = np.zeros((6, 8, 3, 3), np.int64)
        arrays[name][:, positions] = 1
    np.savez(masks, **arrays)
    assert run(source, "--masks", masks, "-o", out, "--repair", "none").code == 2
    options = ["--repair", "none", "--no-measure", "--unconstrained"]
    ran = run(source, "--masks", masks, "-o", out, *options, "--plan-out", tmp_path / "p.json")
    assert ran.code == 0, ran.err
    made = {t.name: tuple(t.dims) for t in onnx.load(out).graph.initializer}
    assert made[weights[1]] == (6, 3, 3, 3)
    assert made[weights[3]] == (6, 4, 3, 3)
    again = tmp_path / "again.onnx"
    assert run("apply", source, tmp_path / "p.json", "-o", again, "--no-measure").code == 0
    assert again.read_bytes() == out.read_bytes()


def test_fast_looks_at_no_inputs_to_compare_plans_on(run: Callable[..., Any], small: Path) -> None:
    ran = run(small, "--fast", "--repair", "none", "--target-flops", 0.7, "--unconstrained")
    assert ran.code == 2
    assert "--unconstrained at inputs" in ran.err


def test_inputs_that_only_compare_do_not_change_the_plan() -> None:
    usual = api.prune(residual(), flops=0.7, **{**QUICK, "samples": None})
    refused = api.prune(residual(), flops=0.7, unconstrained=True, **QUICK)
    if any("refused" in note for note in refused.notes):
        assert refused.plan.kept == usual.plan.kept


class Stopwatch:
    """Times by a rule: copies cost what ``copy`` says, sums what they sum over."""

    key = "stopwatch"

    def __init__(self, copy: float) -> None:
        self.copy = copy

    def piece(self, micro: Any) -> float:
        weights = {t.name: np.prod(t.dims) for t in micro.model.graph.initializer}
        nodes = [n for n in micro.model.graph.node if "graphprune_near" not in n.name]
        sums = sum(weights.get(n.input[1], 0) for n in nodes if n.op_type in ("Conv", "MatMul"))
        return float(sums) + self.copy * sum(n.op_type == "Gather" for n in nodes)

    def pair(self, *models: Any) -> tuple[float, float]:
        raise NotImplementedError


@pytest.mark.parametrize(("copy", "worth"), [(0.0, True), (1e9, False)])
def test_a_selector_must_earn_its_copy(copy: float, worth: bool) -> None:
    analysis = opened(NETWORKS["residual"]())
    target = Target("any", {"default": 1})
    groups = {reader.group.index for reader in readers(analysis)}
    assert len(groups) == 3
    assert unpaid(analysis, target, Stopwatch(copy)) == (frozenset() if worth else groups)


def test_a_plan_alone_is_the_one_that_is_carried_out() -> None:
    result = api.prune(uneven(), flops=0.7, unconstrained=True, **QUICK)
    options = Options.of(flops=0.7, unconstrained=True, **QUICK)
    made, decision = api.plan(api.prepare(uneven()), options)
    assert made.options["unconstrained"] is True
    assert made.kept == result.plan.kept
    assert decision.removed.any()


def test_selectors_that_take_longer_are_refused_with_both_times(tmp_path: Path) -> None:
    timed = {
        **QUICK,
        "measure": True,
        "rounds": 0,
        "hardware": board(tmp_path, "Slice,Gather", 1.0),
    }
    result = api.prune(uneven(), flops=0.7, unconstrained=True, **timed)
    usual = api.prune(uneven(), flops=0.7, **timed)
    said = [note for note in result.notes if note.startswith("--unconstrained refused: slower: ")]
    assert len(said) == 1
    assert "ms against 8 ms" in said[0]
    assert result.model == usual.model
    assert result.plan.options["unconstrained"] is False


@pytest.mark.parametrize("cost", [0.0, 1e-4])
def test_what_is_no_slower_than_noise_explains_is_taken(tmp_path: Path, cost: float) -> None:
    timed = {
        **QUICK,
        "measure": True,
        "rounds": 0,
        "hardware": board(tmp_path, "Slice,Gather", cost),
    }
    result = api.prune(uneven(), flops=0.7, unconstrained=True, **timed)
    said = [note for note in result.notes if note.startswith("unconstrained: ")]
    assert "ms against 8 ms" in said[0]
    assert result.plan.options["unconstrained"] is True
    again = api.apply(uneven(), result.plan, options=Options(measure=False, cache=False))
    assert again.model == result.model


def test_what_takes_longer_may_do_so_with_fewer_macs(tmp_path: Path) -> None:
    clock = board(tmp_path, "Slice,Gather", 0.05, base=0.0, each=1e-3)
    timed = {**QUICK, "measure": True, "rounds": 0, "hardware": clock}
    result = api.prune(uneven(), flops=0.7, unconstrained=True, **timed)
    said = [note for note in result.notes if note.startswith("unconstrained: ")]
    assert "of the MACs" in said[0]
    assert result.after.macs < 0.69 * result.before.macs
    again = api.apply(uneven(), result.plan, options=Options(measure=False, cache=False))
    assert again.model == result.model


def test_without_measuring_the_note_says_so() -> None:
    result = api.prune(uneven(), flops=0.7, unconstrained=True, **QUICK)
    assert any(note.endswith("latency not compared: --no-measure") for note in result.notes)
