"""Plans near the optimum, and the smallest within a drop."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import numpy_helper
from study_forms import QUICK, draw, network, studied

from graphprune import api, search
from graphprune.distortion import distortion, relative_error
from graphprune.errors import GraphPruneError, TargetError, UsageError
from graphprune.model import Model
from graphprune.planning import decide, judge
from graphprune.search import best_weights, smallest_within
from graphprune.storage import load
from graphprune.study import Study

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
    alone = {"flops": None, "round_to": 1, "refine": 0}
    for allowed in (0.004, 0.05):
        done, options = studied(network(), calib=calib, max_drop=allowed, **alone)
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


@pytest.mark.parametrize("spoilt", [False, True])
def test_what_will_be_tuned_is_tried_tuned(
    path: Path, calib: Path, tmp_path: Path, spoilt: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where tuning spoils a model that held without it, less leaves."""
    data, tuned = labelled_by_itself(path, tmp_path), []

    def tune(part: Study, model: Model, removed: Any, steps: int) -> tuple[Model, None]:
        tuned.append(removed.sum())
        if not (spoilt and len(tuned) == 1):
            return model, None
        zeros = {n: numpy_helper.to_array(t) * 0 for n, t in model.initializers.items()}
        silent = {n: numpy_helper.from_array(a, n) for n, a in zeros.items() if a.dtype.kind == "f"}
        return replace(model, initializers={**model.initializers, **silent}), None

    monkeypatch.setattr(search, "refined", tune)
    done, options = studied(
        path, calib=calib, flops=None, max_drop=0.2, eval_data=data, round_to=1, refine=2
    )
    share = smallest_within(done, judge(done, options), options)
    assert tuned
    gone = decide(done.prepared, judge(done, options), options, None, share).removed.sum()
    assert gone < tuned[0] if spoilt else gone >= tuned[0]


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
