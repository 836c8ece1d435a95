"""Tuning of a repaired model as a whole: scales and shifts towards the original's outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import pytest
from command_line import program, read_json
from study_forms import QUICK, content, draw

from graphprune import api
from graphprune.calibrate.mix import mixed
from graphprune.errors import UsageError
from graphprune.gradient import gradients
from graphprune.model import Model
from graphprune.options import Options
from graphprune.repair.reconstruct import with_biases
from graphprune.repair.refine import Lesson, folded, refine, rows_within
from graphprune.repair.tuned import tunable
from graphprune.runtime import run_session, session
from graphprune.shapes import infer
from graphprune.storage import load

HEAD = '<ir_version: 8, opset_import: ["": {opset}]> g (float[8,3,6,6] x) => ({y}) {{ {body} }}'
BRANCHING = (
    "a = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(a) d = Conv<pads=[1,1,1,1], group=2>(r, k) "
    "s = Add(r, d) g = GlobalAveragePool(s) f = Flatten(g) m = MatMul(f, v) n = Add(m, c) "
    "p = MatMul(f, o) q = Add(n, p) y = Gemm<transB=1>(q, u)"
)
CLASSIFIER = (
    "a = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(a) g = GlobalAveragePool(r) f = Flatten(g) "
    "m = MatMul(f, v) n = Add(m, c) y = Gemm<transB=1>(n, u)"
)
WEIGHTS = {"w": (6, 3, 3, 3), "b": (6,), "v": (6, 5), "c": (5,), "u": (4, 5), "e": (6, 6)}
WEIGHTS |= {"k": (6, 3, 3, 3), "o": (6, 5)}  # behind the others, which keep what they are


def built(body: str = CLASSIFIER, y: str = "float[8,4] y", opset: int = 17, seed: int = 0) -> Model:
    proto = onnx.parser.parse_model(HEAD.format(opset=opset, y=y, body=body))
    for number, (name, shape) in enumerate(WEIGHTS.items()):
        array = draw(*shape, seed=seed + number)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return load(proto)


def damaged(model: Model) -> Model:
    """Channels scaled and shifted: what tuning can undo."""
    proto = model.assemble()
    for tensor in proto.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        if tensor.name in ("w", "b"):
            factor = np.linspace(0.8, 1.2, len(array)).reshape(-1, *[1] * (array.ndim - 1))
            array = (array * factor).astype(np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    return load(proto)


def lesson(original: Model) -> Lesson:
    feeds = [{"x": draw(8, 3, 6, 6, seed=50 + i)} for i in range(6)]
    return Lesson(original, feeds, None, 0)


def outputs(model: Model) -> np.ndarray:
    return run_session(session(model), {"x": draw(8, 3, 6, 6, seed=99)})[0]


def silent(share: float) -> None:
    pass


def test_gradients_by_several_inputs_are_those_by_each() -> None:
    text = (
        '<ir_version: 8, opset_import: ["": 17]> g (float[3] a, float[3] b, float[3] c) '
        "=> (float[1] loss) { p = Mul(a, b) q = Mul(p, a) "
        "loss = ReduceSum<keepdims=1>(q) }"
    )
    model = load(onnx.parser.parse_model(text))
    found = gradients(model, infer(model), ("a", "b", "c"), "loss")
    assert found.names[2] is None  # nothing flows
    a, b = draw(3, seed=1), draw(3, seed=2)
    _, da, db = run_session(session(found.model), {"a": a, "b": b, "c": a})
    np.testing.assert_allclose(da, 2 * a * b, rtol=1e-6)
    np.testing.assert_allclose(db, a * a, rtol=1e-6)


def test_neutral_scales_and_shifts_change_nothing() -> None:
    model = built()
    made = tunable(model, {"x": (8, 3, 6, 6)})
    assert [site.linear.kind for site in made.sites] == ["Conv", "MatMul", "Gemm"]
    x = draw(8, 3, 6, 6, seed=99)
    values = dict(zip(made.inputs, made.neutral(), strict=True))
    np.testing.assert_array_equal(
        run_session(session(made.model), {"x": x, **values})[0], outputs(model)
    )


def test_what_is_tuned_is_folded_into_the_weights() -> None:
    """Inputs with other readers have a gain of their own for each."""
    model = with_biases(built(BRANCHING))
    made = tunable(model, {"x": (8, 3, 6, 6)})
    gains = [site.gain.shape if site.gain else None for site in made.sites]
    assert gains == [None, (6, 1, 1), (6,), (6,), None]
    x = draw(8, 3, 6, 6, seed=99)
    values = [1 + 0.3 * draw(*dial.shape, seed=i) for i, dial in enumerate(made.dials)]
    feeds = {"x": x, **dict(zip(made.inputs, values, strict=True))}
    tuned = run_session(session(made.model), feeds)[0]
    np.testing.assert_allclose(outputs(folded(model, made, values)), tuned, rtol=1e-4)


@pytest.mark.parametrize(
    "memory", [1e9, 1.0]
)  # the second takes one... the declared batch at a time
def test_what_scales_can_undo_is_undone(memory: float) -> None:
    original = built()
    bent = damaged(original)
    found, report = refine(bent, lesson(original), 60, silent)
    assert report.before is not None and report.after is not None
    assert report.after < 0.2 * report.before
    gap = [np.abs(outputs(m) - outputs(original)).mean() for m in (bent, found)]
    assert gap[1] < 0.5 * gap[0]
    assert [n.op_type for n in found.nodes] == [n.op_type for n in original.nodes]
    again, same = refine(bent, lesson(original), 60, silent)
    assert same == report
    assert again.assemble().SerializeToString() == found.assemble().SerializeToString()


def test_probabilities_are_compared_as_logits() -> None:
    body = CLASSIFIER.replace("y = Gemm", "z = Gemm") + " y = Softmax<axis=1>(z)"
    original = built(body)
    _, report = refine(damaged(original), lesson(original), 60, silent)
    assert report.after is not None and report.before is not None
    assert report.after < 0.3 * report.before


@pytest.mark.parametrize(
    ("body", "y", "opset", "why"),
    [
        ("y = MatMul(x, e)", "float[8,3,6,6] y", 8, "opset 9"),
        (CLASSIFIER.replace("y = Gemm", "z = Gemm") + " y = ArgMax<axis=1, keepdims=0>(z)",
         "int64[8] y", 17, "output of floats"),
        ("y = Relu(x)", "float[8,3,6,6] y", 17, "no linear operator"),
        (CLASSIFIER.replace("y = Gemm", "z = Gemm") + " s = Shape(z) y = Cast<to=1>(s)",
         "float[2] y", 17, "gradient"),
    ],
)  # fmt: skip
def test_what_cannot_be_tuned_says_why(body: str, y: str, opset: int, why: str) -> None:
    model = built(body, y, opset)
    found, report = refine(model, lesson(model), 5, silent)
    assert found is model
    assert why in str(report)


def test_a_scalar_and_a_batch_of_one_are_compared_as_they_vary() -> None:
    body = CLASSIFIER.replace("y = Gemm", "z = Gemm") + " y = ReduceMean<keepdims=0>(z)"
    original = built(body, "float y")
    _, report = refine(damaged(original), lesson(original), 40, silent)
    assert report.before is not None and report.after is not None
    assert 0 <= report.after < report.before < 100


def test_a_model_that_agrees_already_stays_as_it_is() -> None:
    model = built()
    found, report = refine(model, lesson(model), 5, silent)
    assert found is model
    assert "error of the outputs" in report.why


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_mixed_pictures_are_made_of_the_given_ones(layout: str) -> None:
    shape = (5, 3, 16, 12) if layout == "nchw" else (5, 16, 12, 3)
    numbers = np.broadcast_to(np.arange(5, dtype=np.float32).reshape(5, 1, 1, 1), shape)
    first, again = (mixed(numbers, layout, np.random.default_rng(3)) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert first.shape == shape and set(np.unique(first)) <= set(range(5))
    assert any(len(np.unique(picture)) == 2 for picture in first)


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({"flops": 0.5}, 0),
        ({"flops": 0.5, "calib": Path("own.npz")}, 80),
        ({"flops": 0.5, "calib": Path("own.npz"), "refine": 7}, 7),
        ({"flops": 0.5, "calib": Path("own.npz"), "refine": 0}, 0),
        ({"flops": 0.5, "calib": Path("own.npz"), "repair": "none"}, 0),
        ({"calib": Path("own.npz")}, 0),
        ({"flops": 0.5, "calib": "none"}, 0),
        ({"flops": 0.5, "fast": True}, 0),
    ],
)
def test_samples_of_the_user_are_refined_by(given: dict[str, Any], steps: int) -> None:
    assert Options.of(**given).refine_steps == steps


def test_prune_refines_and_a_plan_does_it_again(path: Path, tmp_path: Path) -> None:
    plan, first, second = (tmp_path / name for name in ("plan.json", "a.onnx", "b.onnx"))
    base = [path, "--no-measure", "--quiet", "--no-cache"]
    told = [*base, "--target-flops", "0.5", "--samples", "40", "--refine", "12"]
    run = program(*told, "--plan-out", plan, "-o", first, "--json")
    assert run.returncode == 0, run.stderr
    document = read_json(run.stdout)
    assert document["options"]["refine"] == 12
    refined = document["refined"]
    assert refined["why"] or refined["after"] < refined["before"]
    run = program("apply", path, plan, "-o", second)
    assert run.returncode == 0, run.stderr
    assert first.read_bytes() == second.read_bytes()


def test_a_pruned_network_comes_nearer_on_its_inputs(path: Path, calib: Path) -> None:
    given = {**QUICK, "calib": calib, "cache": False}
    plain, tuned = (api.prune(path, refine=steps, **given) for steps in (0, 30))
    assert plain.refined is None and tuned.refined is not None
    assert not tuned.refined.why
    assert content(plain) != content(tuned)
    assert "refined in 30 steps" in str(tuned)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"flops": 0.5, "fast": True}, "--fast looks at weights alone"),
        ({}, "nothing is lost"),
    ],
)
def test_refine_needs_inputs_and_a_budget(path: Path, options: dict, words: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(UsageError, match=words):
        api.prune(path, refine=5, cache=False, **options)


@pytest.mark.parametrize(("macs", "rows"), [(0, 48), (1e9, 41), (5e9, 8), (1e12, 0)])
def test_a_step_takes_as_many_rows_as_the_work_allows(macs: float, rows: int) -> None:
    assert rows_within(macs, 80) == rows


def test_what_would_take_long_is_not_refined_by_default(
    path: Path, calib: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graphprune.repair.refine.WORK", 1.0)
    given = {**QUICK, "calib": calib, "cache": False}
    plain, told = (api.prune(path, refine=steps, **given) for steps in (None, 3))
    assert plain.refined is None and plain.plan.options["refine"] == 0
    assert any("--refine 80 does it" in note for note in plain.notes)
    assert told.refined is not None and told.plan.options["refine"] == 3
