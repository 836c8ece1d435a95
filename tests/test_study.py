"""Calibrated planning from end to end: evidence, its cache, the plan, the search, the repair."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import Builder
from onnx import numpy_helper

from graphprune import api, cache, search
from graphprune import study as under_test
from graphprune.cache import FOLDER, Cache, beside
from graphprune.calibrate import choose
from graphprune.criteria import Scoring
from graphprune.distortion import distortion, relative_error
from graphprune.errors import GraphPruneError, TargetError, UsageError
from graphprune.model import Array, Model
from graphprune.options import Options
from graphprune.plan import Plan
from graphprune.planning import decide, judge
from graphprune.result import Result
from graphprune.search import best_weights, smallest_within
from graphprune.storage import load
from graphprune.study import Study, study

QUICK: dict[str, Any] = {"flops": 0.5, "samples": 16, "measure": False, "verify": False}
QUICK |= {"round_to": 1}


def draw(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape, dtype=np.float32)


def network(norm: bool = False, side: int = 6) -> onnx.ModelProto:
    """Two convolutions, a residual, a classifier; batch free."""
    b = Builder(3)
    bridge: Callable[[str, int], str] = b.norm if norm else lambda x, _: x
    x = b.add("Relu", bridge(b.conv("x", 3, 8), 8))
    hidden = b.add("Relu", bridge(b.conv(x, 8, 12), 12))
    x = b.add("Relu", b.add("Add", x, bridge(b.conv(hidden, 12, 8), 8)))
    y = b.add("MatMul", b.add("Flatten", b.add("GlobalAveragePool", x)), b.weight(8, 5))
    return b.model({"x": ["n", 3, side, side]}, {y: ["n", 5]})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The network as a file, alone in its folder."""
    folder = tmp_path / "alone"
    folder.mkdir()
    onnx.save(network(), folder / "model.onnx")
    return folder / "model.onnx"


@pytest.fixture
def calib(tmp_path: Path) -> Path:
    """Thirty samples."""
    np.savez(tmp_path / "calib.npz", x=draw(30, 3, 6, 6))
    return tmp_path / "calib.npz"


def studied(model: Any, **options: Any) -> tuple[Study, Options]:
    given = {"flops": 0.5, "samples": 20, **options}
    chosen = Options.of(**given)
    chosen.check()
    return study(api.prepare(model), chosen), chosen


def content(result: Result) -> bytes:
    return result.model.SerializeToString(deterministic=True)


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


# --- the cache


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for every time that evidence is gathered."""
    calls: list[str] = []
    gather = under_test.gather
    monkeypatch.setattr(cache, "WORTH_KEEPING", 0)

    def counting(*given: Any, **options: Any) -> Any:
        calls.append("gathered")
        return gather(*given, **options)

    monkeypatch.setattr(under_test, "gather", counting)
    return calls


def test_a_second_run_gathers_nothing(path: Path, counted: list[str]) -> None:
    first = api.prune(path, **QUICK)
    assert (path.parent / FOLDER).is_dir()
    assert len(counted) == 1
    again = api.prune(path, **QUICK)
    other = api.prune(path, **{**QUICK, "flops": 0.7})
    assert len(counted) == 1
    assert content(first) == content(again)
    assert first.plan.to_json() == again.plan.to_json()
    assert other.after.macs > first.after.macs


@pytest.mark.parametrize(
    "change",
    [
        {"samples": 17},
        {"scoring": Scoring(seed=1)},
        {"criterion": "l1"},
        {"input_shapes": {"x": (1, 3, 6, 6)}, "only": ("n2_Conv",)},
    ],
    ids=str,
)
def test_what_evidence_depends_on_is_gathered_anew(
    path: Path, counted: list[str], change: dict[str, Any]
) -> None:
    api.prune(path, **{**QUICK, "flops": 0.9})
    api.prune(path, **{**QUICK, "flops": 0.9, **change})
    assert len(counted) == 2


def test_other_weights_are_another_model(path: Path, counted: list[str]) -> None:
    api.prune(path, **QUICK)
    proto = onnx.load(path)
    array = numpy_helper.to_array(proto.graph.initializer[0])
    proto.graph.initializer[0].CopyFrom(
        numpy_helper.from_array(array * 2, proto.graph.initializer[0].name)
    )
    onnx.save(proto, path)
    api.prune(path, **QUICK)
    assert len(counted) == 2


def test_no_cache_leaves_no_folder(path: Path) -> None:
    api.prune(path, cache=False, **QUICK)
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    assert beside(network()) is None


@pytest.mark.parametrize("how", ["cut short", "empty", "garbage", "zip", "flipped"])
def test_a_damaged_entry_is_made_anew(path: Path, counted: list[str], how: str) -> None:
    first = api.prune(path, **QUICK)
    (entry,) = (path.parent / FOLDER).iterdir()
    whole = entry.read_bytes()
    flipped = bytes([*whole[:200], whole[200] ^ 0xFF, *whole[201:]])
    damaged = {
        "cut short": whole[:-30],
        "empty": b"",
        "garbage": b"\x93NUMPY",
        "zip": b"PK\x03\x04",
    }
    entry.write_bytes({**damaged, "flipped": flipped}[how])
    assert api.prune(path, **QUICK).plan.to_json() == first.plan.to_json()
    assert len(counted) == 2
    assert entry.stat().st_size == len(whole)


def test_a_folder_that_cannot_be_made_is_done_without(path: Path, counted: list[str]) -> None:
    (path.parent / FOLDER).write_text("a file where the folder should be")
    first, again = (api.prune(path, **QUICK) for _ in range(2))
    assert len(counted) == 2
    assert first.plan.to_json() == again.plan.to_json()


def test_a_read_only_folder_is_done_without(
    path: Path, counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (path.parent / FOLDER).mkdir()
    opened = Path.open

    def refusing(self: Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
        if "w" in mode and self.parent.name == FOLDER:
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, mode, *rest, **more)

    monkeypatch.setattr(Path, "open", refusing)
    for _ in range(2):
        api.prune(path, **QUICK)
    assert len(counted) == 2
    assert not list((path.parent / FOLDER).iterdir())


def test_what_is_quickly_made_is_not_kept(path: Path) -> None:
    api.prune(path, **QUICK)
    assert not (path.parent / FOLDER).exists()


def test_cache_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "WORTH_KEEPING", 0)
    made: list[int] = []

    def make() -> dict[str, Array]:
        made.append(1)
        return {"a": np.arange(3), "b": np.zeros((2, 0))}

    kept = Cache(tmp_path / FOLDER)
    for _ in range(2):
        found = kept(("x", 1), make)
        assert found["a"].tolist() == [0, 1, 2]
        assert found["b"].shape == (2, 0)
    assert len(made) == 1
    kept(("x", 2), make)
    Cache(None)(("x", 1), make)
    assert len(made) == 3
    assert {file.suffix for file in (tmp_path / FOLDER).iterdir()} == {".npz"}


# --- a plan carried out again


def applied(path: Path, plan: Plan, **options: Any) -> Result:
    return api.apply(path, plan, options=Options(measure=False, cache=False, **options))


@pytest.mark.parametrize("repair", ["obs", "bias", "none"])
def test_apply_gives_the_same_model(path: Path, calib: Path, repair: str) -> None:
    given = None if repair == "bias" else calib
    result = api.prune(path, calib=given, repair=repair, cache=False, **QUICK)
    assert content(applied(path, result.plan, calib=given)) == content(result)


def test_apply_of_a_plan_on_matched_inputs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer pictures are matched than would be made up: the plan must find them again."""
    monkeypatch.setattr(choose, "MATCHING_WORK", 1e6)
    monkeypatch.setattr(choose, "FEWEST_STEPS", 2)
    monkeypatch.setattr(choose, "LEAST", 12)
    monkeypatch.setattr(choose, "MOST", 20)
    onnx.save(network(norm=True, side=8), path)
    options = {**QUICK, "samples": None}
    result = api.prune(path, cache=False, **options)
    assert result.plan.options["calibration"]["samples"] == 20
    assert content(applied(path, result.plan)) == content(result)
    assert [
        note for note in result.notes if note.startswith("12 made-up inputs matched in 2 steps")
    ]


def test_matching_that_is_not_cut_short_says_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "STEPS", 2)
    onnx.save(network(norm=True, side=8), path)
    result = api.prune(path, cache=False, **QUICK)
    assert "matched" in (result.calibration or "")
    assert not [note for note in result.notes if "matched" in note]


def test_a_plan_that_needs_no_inputs_asks_for_none(path: Path, calib: Path) -> None:
    """The cut alone: what decided it need not be given again."""
    made = api.prune(path, calib=calib, repair="none", cache=False, **QUICK)
    assert content(applied(path, made.plan)) == content(made)


def test_a_plan_for_other_inputs_is_refused(path: Path, calib: Path, tmp_path: Path) -> None:
    mine = api.prune(path, calib=calib, cache=False, **QUICK).plan
    made_up = api.prune(path, cache=False, **QUICK).plan
    np.savez(tmp_path / "other.npz", x=draw(30, 3, 6, 6, seed=1))
    with pytest.raises(UsageError, match=r"calib\.npz"):
        applied(path, mine)
    with pytest.raises(UsageError, match="not those of the plan"):
        applied(path, mine, calib=tmp_path / "other.npz")
    with pytest.raises(UsageError, match="not those of the plan"):
        applied(path, made_up, calib=calib)


def test_a_plan_with_a_spoilt_calibration_is_refused_in_words(path: Path, calib: Path) -> None:
    made = api.prune(path, calib=calib, cache=False, **QUICK).plan
    for spoilt in ({}, {"samples": "many"}, [1], "x"):
        options = {**made.options, "calibration": spoilt}
        try:
            applied(path, replace(made, options=options), calib=calib)
        except GraphPruneError:
            continue


def test_the_plan_says_what_it_was_made_with(path: Path, calib: Path) -> None:
    options = api.prune(path, calib=calib, cache=False, **QUICK).plan.options
    assert options["repair"] == "obs"
    assert options["criterion"] == "obspa"
    assert options["calibration"]["synthesised"] is False
    assert options["calibration"]["samples"] == 16
    assert "calib.npz" in options["calibration"]["source"]
    json.dumps(dict(options))


# --- the search


def held_out_distortion(part: Study, held: list[Any], model: Model) -> float:
    expected, found = search._outputs(part.original, held), search._outputs(model, held)
    return float(np.mean([distortion(a, b) for a, b in zip(expected, found, strict=True)]))


def test_the_search_is_never_worse_than_the_optimum_it_starts_from() -> None:
    done, options = studied(network(), search=3, samples=30, round_to=1)
    judged = judge(done, options)
    weights = best_weights(done, judged, options, None)
    assert set(weights) == set(judged.evidence)
    part, held = search._split(done)
    found, plain = (
        held_out_distortion(part, held, search._candidate(part, judged, options, None, w))
        for w in (weights, dict.fromkeys(weights, 1.0))
    )
    assert found <= plain


def test_no_search_is_the_plain_plan() -> None:
    done, options = studied(network(), search=0)
    judged = judge(done, options)
    assert set(best_weights(done, judged, options, None).values()) == {1.0}


def test_search_from_the_front_door(path: Path) -> None:
    first, again = (api.prune(path, search=2, cache=False, **QUICK) for _ in range(2))
    assert first.plan.to_json() == again.plan.to_json()
    assert first.after.macs <= 0.5 * first.before.macs


def test_held_out_inputs_are_not_repaired_on() -> None:
    done, _ = studied(network(), samples=30)
    part, held = search._split(done)
    assert done.inputs is not None and part.inputs is not None
    assert len(held) + len(part.inputs.feeds) == len(done.inputs.feeds)
    seen = {feed["x"].tobytes() for feed in part.inputs.feeds}
    assert not seen & {feed["x"].tobytes() for feed in held}


def test_too_few_inputs_to_hold_some_out(path: Path) -> None:
    with pytest.raises(UsageError, match="too few"):
        api.prune(path, search=1, cache=False, **{**QUICK, "samples": 1})


# --- the smallest within a drop


def test_the_smallest_within_a_drop_of_the_outputs(calib: Path) -> None:
    found = []
    for allowed in (0.004, 0.05):
        done, options = studied(network(), calib=calib, flops=None, max_drop=allowed, round_to=1)
        judged = judge(done, options)
        share = smallest_within(done, judged, options)
        part, held = search._split(done)
        model = search._candidate(part, judged, options, share, None)
        expected = search._outputs(done.original, held)
        pairs = zip(expected, search._outputs(model, held), strict=True)
        assert np.mean([relative_error(a, b) for a, b in pairs]) <= allowed
        found.append(share)
    assert sorted(found, reverse=True) == found
    assert found[0] > found[-1]


def labelled_by_itself(path: Path, folder: Path) -> Path:
    """Samples whose labels are what the network says: it is always right."""
    x = draw(200, 3, 6, 6, seed=5)
    ((scores,),) = search._outputs(load(path), [{"x": x}])
    np.savez(folder / "labelled.npz", x=x, labels=scores.argmax(axis=1))
    return folder / "labelled.npz"


def test_the_result_stays_within_the_drop(path: Path, tmp_path: Path) -> None:
    """What is written is held to the drop, not a model like it."""
    data = labelled_by_itself(path, tmp_path)
    for allowed in (0.05, 0.2):
        result = api.prune(
            path, max_drop=allowed, eval_data=data, samples=20, measure=False, round_to=1
        )
        before, after = result.before.accuracy, result.after.accuracy
        assert before == 1.0
        assert after is not None and before - after <= allowed
        assert result.after.macs < result.before.macs


def test_a_drop_that_nothing_stays_within(path: Path, calib: Path) -> None:
    with pytest.raises(TargetError, match="max-drop"):
        api.prune(path, max_drop=1e-9, calib=calib, cache=False, measure=False)


def test_a_drop_of_the_score_needs_no_inputs_held_out(path: Path, tmp_path: Path) -> None:
    """Labelled data judges: one calibration sample is enough."""
    data = labelled_by_itself(path, tmp_path)
    result = api.prune(path, max_drop=0.9, eval_data=data, samples=1, measure=False, cache=False)
    assert result.after.macs < result.before.macs


@pytest.mark.parametrize("value", [0.0, -0.1, float("nan")])
def test_a_drop_that_is_none_is_refused(path: Path, value: float) -> None:
    with pytest.raises(GraphPruneError, match="max-drop"):
        api.prune(path, max_drop=value, samples=16, measure=False, cache=False)


@pytest.mark.parametrize("kind", ["flops", "params", "size"])
def test_a_drop_and_a_budget_contradict_each_other(path: Path, kind: str) -> None:
    """Or both hold; a budget that is asked for is never passed over in silence."""
    try:
        result = api.prune(path, max_drop=0.9, samples=8, measure=False, cache=False, **{kind: 0.5})
    except UsageError:
        return
    before, after = result.before, result.after
    shares = {"flops": after.macs / before.macs, "params": after.params / before.params}
    assert {**shares, "size": after.bytes / before.bytes}[kind] <= 0.5
    kinds = {"flops": "macs", "params": "params", "size": "bytes"}
    assert kinds[kind] in result.plan.options["budgets"]


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
    plain = cost.of(decide(done.prepared, judged, options).removed).macs
    spared = cost.of(decide(done.prepared, judged, options, {"macs": 0.2 * plain}).removed).macs
    assert spared <= plain - 0.15 * plain


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
