"""The plan: complete, consistent, tied to one model, refused where it was changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import attention, random_cnn
from onnx import numpy_helper

from graphprune import api
from graphprune.errors import UsageError
from graphprune.plan import Plan, read_plan

Change = Callable[[dict[str, Any]], object]
Run = Callable[..., Any]
WEIGHTS: dict[str, Any] = {"criterion": "l1", "repair": "none"}
FINE = {"round_to": 1, "min_channels": 1, "measure": False, **WEIGHTS}


@pytest.fixture
def plan(run: Run, small: Path) -> Path:
    """A plan for ``small``, alone in a folder of its own."""
    folder = small.parent.parent / "plans"
    folder.mkdir()
    path = folder / "plan.json"
    out = folder / "out.onnx"
    ran = run(
        small,
        "--fast",
        "--repair",
        "none",
        "--target-flops",
        0.5,
        "--quiet",
        "--plan-out",
        path,
        "-o",
        out,
    )
    assert ran.code == 0
    return path


def seal(document: dict[str, Any]) -> dict[str, Any]:
    """A plan with a hash that fits, as a tool other than this one would write it."""
    body = {key: value for key, value in document.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return {**body, "sha256": digest}


def refused(run: Run, model: Path, plan: Path, *words: str) -> None:
    out = model.with_name("applied.onnx")
    ran = run("apply", model, plan, "-o", out)
    assert (ran.code, ran.out) == (2, ""), ran.err
    assert "\ngraphprune: error:" in f"\n{ran.err}"
    assert all(word in ran.err for word in words), ran.err
    assert not out.exists()


def test_names_everything(plan: Path) -> None:
    document = json.loads(plan.read_text())
    assert set(document) >= {"schema", "model_sha256", "sha256", "groups", "kept", "options"}
    assert seal(document) == document
    for group in document["groups"]:
        assert set(group) >= {"name", "axes", "units", "scores", "removed", "reason"}
        assert len(group["scores"]) == group["units"]
        assert all(np.isfinite(group["scores"]))
        assert group["reason"]


@pytest.mark.parametrize("seed", range(6))
def test_kept_indices_are_the_result(seed: int) -> None:
    """Every initialiser of the result is the original's, taken at the kept indices."""
    model = random_cnn(seed) if seed else attention()
    result = api.prune(model, flops=0.7, allow_miss=True, **FINE)
    prepared = api.prepare(model).analysis.model
    after = {t.name: numpy_helper.to_array(t) for t in result.model.graph.initializer}
    assert result.plan.kept
    compared = 0
    for name, axes in result.plan.kept.items():
        for indices in axes.values():
            assert indices == sorted(set(indices))
        if name not in after:
            continue
        array = prepared.array(name)
        for axis, indices in axes.items():
            array = np.take(array, indices, axis=int(axis))
        assert np.array_equal(array, after[name])
        compared += 1
    assert compared


def test_lowest_scores_leave_first() -> None:
    result = api.prune(random_cnn(1), flops=0.6, allow_miss=True, **FINE)
    for group in result.plan.groups:
        gone = [group.scores[i] for i in group.removed]
        stay = [s for i, s in enumerate(group.scores) if i not in group.removed]
        assert not gone or max(gone) <= min(stay)


def test_reads_back_as_it_was_written(plan: Path) -> None:
    made = read_plan(plan)
    assert made.to_json() == plan.read_text()
    assert isinstance(made, Plan)
    assert "units kept" in str(made)


def test_for_another_model(run: Run, chain: onnx.ModelProto, small: Path, plan: Path) -> None:
    tensor = chain.graph.initializer[0]
    array = numpy_helper.to_array(tensor).copy()
    array.flat[0] += 1  # the same structure, other weights
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(chain, small)
    refused(run, small, plan, "another model")


def test_the_hash_sees_contents_not_containers(chain: onnx.ModelProto, tmp_path: Path) -> None:
    """The same weights in a file of their own are the same model."""
    plain, outside = tmp_path / "plain.onnx", tmp_path / "outside.onnx"
    onnx.save(chain, plain)
    onnx.save(chain, outside, save_as_external_data=True, location="w.bin", size_threshold=0)
    made = api.prune(plain, flops=0.5, **FINE).plan
    assert api.apply(outside, made).plan == made


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["groups"][0]["removed"].pop(),
        lambda d: d["groups"][0].update(reason="I say so"),
        lambda d: d.update(model_sha256="0" * 64),
        lambda d: d.pop("sha256"),
        lambda d: d.update(extra=1),
    ],
    ids=["removed", "reason", "model", "no-hash", "more"],
)
def test_edited(run: Run, small: Path, plan: Path, change: Change) -> None:
    document = json.loads(plan.read_text())
    change(document)
    plan.write_text(json.dumps(document))
    refused(run, small, plan, "hash", str(plan))


@pytest.mark.parametrize("schema", ["graphprune.plan/0", "graphprune.plan/99", "other", None])
def test_unknown_schema(run: Run, small: Path, plan: Path, schema: str | None) -> None:
    document = seal({**json.loads(plan.read_text()), "schema": schema})
    plan.write_text(json.dumps(document))
    refused(run, small, plan, "schema", str(plan))


@pytest.mark.parametrize(
    "content", ["", "hello", "[]", "3", "{}", '{"schema": 1}', "\xff"], ids=range(7)
)
def test_no_plan(run: Run, small: Path, plan: Path, content: str) -> None:
    plan.write_bytes(content.encode("latin-1"))
    refused(run, small, plan, str(plan))


def test_missing(run: Run, small: Path, plan: Path) -> None:
    refused(run, small, plan.with_name("nowhere.json"), "nowhere.json")


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("groups"),
        lambda d: d.pop("kept"),
        lambda d: d.pop("options"),
        lambda d: d.update(groups=3),
        lambda d: d.update(options=[]),
        lambda d: d["groups"][0].pop("scores"),
        lambda d: d["groups"][0].update(removed=[999]),
        lambda d: d["groups"][0].update(removed=[-1]),
        lambda d: d["groups"][0].update(removed=["a"]),
        lambda d: d["groups"][0].update(axes=[["nowhere", 0]]),
        lambda d: d["groups"][0].update(axes=[3]),
        lambda d: d["groups"][0].update(removed=list(range(d["groups"][0]["units"]))),
        lambda d: d["kept"].clear(),
        lambda d: d["options"].update(protect=["nowhere"]),
        lambda d: d["options"].update(input_shapes={"nowhere": [1]}),
    ],
    ids=range(15),
)
def test_sealed_nonsense(run: Run, small: Path, plan: Path, change: Change) -> None:
    """The hash fits (a tool wrote it so), the contents do not: a message, not a traceback."""
    document = json.loads(plan.read_text())
    change(document)
    plan.write_text(json.dumps(seal(document)))
    refused(run, small, plan)


def test_everything_removed_is_refused() -> None:
    """Consistent in itself, but it would empty a layer."""
    model = random_cnn(1)
    made = api.prune(model, flops=0.9, allow_miss=True, **FINE).plan
    first = made.groups[0]
    emptied = replace(first, removed=tuple(range(len(first.scores))))
    kept = {name: dict(axes) for name, axes in made.kept.items()}
    for tensor, axis in first.axes:
        kept.setdefault(tensor, {})[str(axis)] = []
    with pytest.raises(UsageError):
        api.apply(model, replace(made, groups=(emptied, *made.groups[1:]), kept=kept))


def test_scope_travels_with_the_plan(run: Run, small: Path, plan: Path) -> None:
    """A plan made under --protect applies without saying so again."""
    name = json.loads(plan.read_text())["groups"][0]["axes"][0][0]
    made, out = plan.with_name("made.onnx"), plan.with_name("applied.onnx")
    options = (
        "--fast",
        "--repair",
        "none",
        "--target-flops",
        0.8,
        "--round-to",
        1,
        "--protect",
        name,
        "--quiet",
    )
    assert run(small, *options, "--plan-out", plan, "-o", made).code == 0
    assert run("apply", small, plan, "-o", out, "--quiet").code == 0
    assert made.read_bytes() == out.read_bytes()


def test_a_plan_of_brackets(run: Run, small: Path, tmp_path: Path) -> None:
    plan = tmp_path / "deep.json"
    plan.write_text("[" * 100_000)
    refused(run, small, plan, "not JSON")


@pytest.mark.parametrize(
    "wrong",
    [
        {"input_shapes": 1.5},
        {"input_shapes": {"x": "13"}},
        {"input_shapes": {"x": [1, 3.5]}},
        {"units": 3},
        {"protect": [None]},
        {"only": "x"},
        {"seed": float("inf")},
        {"seed": -1},
    ],
    ids=str,
)
def test_options_of_wrong_types(run: Run, small: Path, plan: Path, wrong: dict[str, Any]) -> None:
    document = json.loads(plan.read_text())
    document["options"] |= wrong
    plan.write_text(json.dumps(seal(document)))
    refused(run, small, plan, "malformed")


def test_a_plan_of_another_model_is_refused_as_that(chain: onnx.ModelProto) -> None:
    """Its calibration inputs differ too, but that is not what to say."""
    options = {"flops": 0.5, "samples": 32, "measure": False, "cache": False, "round_to": 1}
    made = api.prune(random_cnn(5), **options).plan
    with pytest.raises(UsageError, match="another model"):
        api.apply(chain, made)


def test_a_plan_carried_out_asks_for_no_budget(chain: onnx.ModelProto) -> None:
    options = {"criterion": "l1", "repair": "none", "measure": False, "round_to": 1}
    result = api.prune(chain, flops=0.5, **options)
    assert not any("no budget" in note for note in api.apply(chain, result.plan).notes)
