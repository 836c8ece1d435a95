"""Scores and masks from a file decide instead of a criterion; what they cannot say is refused."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import Builder, attention, random_cnn
from numpy.typing import NDArray
from onnx import numpy_helper, parser

from graphprune import api
from graphprune.errors import UsageError
from graphprune.model import Model
from graphprune.outside.files import given
from graphprune.outside.masks import wanted
from graphprune.result import Result

Run = Callable[..., Any]
Arrays = dict[str, NDArray[Any]]
FINE: dict[str, Any] = {"round_to": 1, "min_channels": 1, "measure": False, "repair": "none"}
MASKED: dict[str, Any] = {"measure": False, "repair": "none"}
FIRST, SECOND = "c0", "c2"  # the convolutions of ``chain``; c4 is its MatMul


def weights(model: onnx.ModelProto) -> Arrays:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def file(folder: Path, **arrays: Any) -> Path:
    path = folder / "given.npz"
    np.savez(path, **arrays)
    return path


def removed(result: Result) -> dict[str, tuple[int, ...]]:
    return {group.name: group.removed for group in result.plan.groups if group.removed}


def grouped() -> onnx.ModelProto:
    """A convolution in two groups of four: their positions are aligned before the analysis."""
    b = Builder(5)
    x = b.add("Relu", b.conv("x", 3, 8))
    x = b.add("Relu", b.conv(x, 8, 8, group=2))
    return b.model({"x": [1, 3, 4, 4]}, {b.conv(x, 8, 3): [1, 3, 4, 4]})


def moved() -> onnx.ModelProto:
    """A weight stored as PyTorch has it and transposed in the graph; another put together."""
    b = Builder(6)
    x = b.add("MatMul", "x", b.add("Transpose", b.weight(8, 6)))
    x = b.add("Relu", b.add("Add", x, b.weight(8)))
    halves = b.add("Concat", b.weight(8, 5), b.weight(8, 4), axis=1)
    x = b.add("Tanh", b.add("MatMul", x, halves))
    y = b.add("MatMul", x, b.weight(9, 4))
    return b.model({"x": [1, 6]}, {y: [1, 4]})


def residual() -> onnx.ModelProto:
    """Two writers of one stream: a (c0) and b (c2); c4 reads their sum."""
    b = Builder(2)
    first, second = b.conv("x", 3, 8), b.conv("x", 3, 8)
    y = b.conv(b.add("Relu", b.add("Add", first, second)), 8, 4)
    return b.model({"x": [1, 3, 5, 5]}, {y: [1, 4, 5, 5]})


MODELS = {
    **{f"cnn {seed}": (lambda seed=seed: random_cnn(seed)) for seed in range(1, 9)},
    "heads": attention,
    "packed heads": lambda: attention(packed=True),
    "groups": grouped,
    "moved": moved,
}


@pytest.mark.parametrize("name", MODELS)
def test_magnitudes_as_scores_decide_as_l1(name: str, tmp_path: Path) -> None:
    """Also where the preparation copies, joins or reorders weights."""
    model = MODELS[name]()
    arrays = {k: np.abs(v) for k, v in weights(model).items() if v.dtype == np.float32 and v.ndim}
    options = {**FINE, "flops": 0.6, "allow_miss": True}
    by_weights = api.prune(model, criterion="l1", **options)
    scored = api.prune(model, scores=file(tmp_path, **arrays), **options)
    assert removed(scored) == removed(by_weights) != {}
    assert scored.plan.kept == by_weights.plan.kept


def test_scores_of_units_and_of_axes(chain: onnx.ModelProto, tmp_path: Path) -> None:
    """Per unit, along an axis, transposed: each says which units are the lowest."""
    rising = np.arange(16.0)
    options = {**FINE, "params": 0.7, "spread": "uniform"}
    result = api.prune(chain, scores=file(tmp_path, **{f"{FIRST}:0": rising[::-1]}), **options)
    assert removed(result).keys() == {f"{FIRST}:0"}
    gone = removed(result)[f"{FIRST}:0"]
    assert gone == tuple(range(16 - len(gone), 16))
    assert any("1 group without a score stays whole" in note for note in result.notes)
    both = {FIRST: rising, "c4": np.outer(np.ones(5), rising)}
    result = api.prune(chain, scores=file(tmp_path, **both), **options)
    assert removed(result).keys() == {f"{FIRST}:0", f"{SECOND}:0"}
    assert all(found == tuple(range(len(found))) for found in removed(result).values())


def test_scores_of_units_follow_the_reordering(tmp_path: Path) -> None:
    """Per unit in the user's order: the lowest position of each group leaves, wherever it went."""
    model = grouped()
    name = next(g.name for g in api.prepare(model).analysis.coupling.groups if len(g) == 4)
    tensor = name.partition(":")[0]
    scores = file(tmp_path, **{name: np.array([3.0, 0.0, 2.0, 1.0])})
    result = api.prune(model, scores=scores, params=0.95, **FINE)
    moved_to = api.prepare(model).carry({tensor: positions(model, tensor)})[tensor]
    units = sorted(g for group in result.plan.groups if group.name == name for g in group.scores)
    assert len(removed(result)[name]) == 1
    expected = [0.25 * s for s in np.bincount(np.arange(8) % 4, score_of(moved_to), 4)]
    planned = next(group for group in result.plan.groups if group.name == name)
    assert np.allclose(np.array(planned.scores) / sum(units), np.array(expected) / sum(expected))


def positions(model: onnx.ModelProto, tensor: str) -> NDArray[Any]:
    shape = weights(model)[tensor].shape
    return np.broadcast_to((np.arange(shape[0]) % 4)[:, None, None, None], shape)


def score_of(position: NDArray[Any]) -> NDArray[Any]:
    return np.array([3.0, 0.0, 2.0, 1.0])[position[:, 0, 0, 0]]


@pytest.mark.parametrize(
    "arrays, words",
    [
        ({"c00": np.ones(16)}, ["'c00'", "nearest is 'c0"]),
        ({FIRST: np.ones((16, 3, 3))}, ["'c0'", "[16, 3, 3]", "[16, 3, 3, 3]"]),
        ({SECOND: np.ones(16)}, ["'c2'", "axes 0 and 1"]),
        ({f"{FIRST}:0": np.ones(15)}, ["'c0:0'", "16 units", "shape [16]"]),
        ({FIRST: np.full(16, np.nan)}, ["'c0'", "NaN", "finite"]),
        ({FIRST: np.full(16, -1.0)}, ["'c0'", "negative"]),
        ({FIRST: np.array(["a"] * 16)}, ["'c0'", "not numbers", "numpy.savez"]),
        ({FIRST: np.array([None] * 16)}, ["'c0'", "Python objects", "numpy.savez"]),
        ({}, ["no arrays", "numpy.savez"]),
    ],
)
def test_scores_that_do_not_fit(
    chain: onnx.ModelProto, tmp_path: Path, arrays: Arrays, words: list[str]
) -> None:
    with pytest.raises(UsageError) as raised:
        api.prune(chain, scores=file(tmp_path, **arrays), flops=0.5, **FINE)
    assert all(word in str(raised.value) for word in words), raised.value


def mask(model: onnx.ModelProto, name: str, *gone: int, axis: int = 0) -> NDArray[Any]:
    """As ``torch.nn.utils.prune.ln_structured`` leaves it on a module."""
    found = np.ones_like(weights(model)[name])
    found[(slice(None),) * axis + (list(gone),)] = 0
    return found


def test_masks_say_what_leaves(chain: onnx.ModelProto, tmp_path: Path) -> None:
    given = {FIRST: mask(chain, FIRST, 1, 4), "c4": mask(chain, "c4", 0, 9, 15, axis=0)}
    result = api.prune(chain, masks=file(tmp_path, **given), **MASKED)
    assert removed(result) == {f"{FIRST}:0": (1, 4), f"{SECOND}:0": (0, 9, 15)}
    assert result.verdict.passed
    assert weights(result.model)[FIRST].shape == (14, 3, 3, 3)
    repaired = api.prune(chain, masks=file(tmp_path, **given), measure=False, cache=False)
    assert repaired.repairs
    assert removed(repaired) == removed(result)


@pytest.mark.parametrize("how, gone", [("union", (1, 2, 5)), ("intersection", (5,))])
def test_masks_that_disagree(how: str, gone: tuple[int, ...], tmp_path: Path) -> None:
    model = residual()
    given = {"c0": mask(model, "c0", 1, 5), "c2": mask(model, "c2", 2, 5)}
    path = file(tmp_path, **given)
    result = api.prune(model, masks=path, resolve=how, **MASKED)
    assert removed(result) == {"c0:0": gone}
    assert any("disagree about 2 units" in note for note in result.notes)
    with pytest.raises(UsageError, match="disagree about 2 units of 1 group"):
        api.prune(model, masks=path, **MASKED)


def test_a_mask_of_ones_says_that_all_stay(tmp_path: Path) -> None:
    model = residual()
    given = {"c0": mask(model, "c0", 1), "c2": np.ones_like(weights(model)["c2"])}
    with pytest.raises(UsageError, match="disagree"):
        api.prune(model, masks=file(tmp_path, **given), **MASKED)
    alone = api.prune(model, masks=file(tmp_path, c0=given["c0"]), **MASKED)
    assert removed(alone) == {"c0:0": (1,)}
    assert any("1 weight without a mask writes" in note for note in alone.notes)


def test_intersection_is_offered_where_it_helps(chain: onnx.ModelProto, tmp_path: Path) -> None:
    """Two masks that remove all of a layer between them; one that does so alone."""
    halves = {
        FIRST: mask(chain, FIRST, *range(8)),
        SECOND: mask(chain, SECOND, *range(8, 16), axis=1),
    }
    with pytest.raises(UsageError, match="--resolve intersection"):
        api.prune(chain, masks=file(tmp_path, **halves), resolve="union", **MASKED)
    alone = file(tmp_path, **{FIRST: np.zeros(16)})
    with pytest.raises(UsageError, match="Let more of it be 1") as raised:
        api.prune(chain, masks=alone, resolve="union", **MASKED)
    assert "--resolve" not in str(raised.value)


def test_columns_and_rows_of_one_group(chain: onnx.ModelProto, tmp_path: Path) -> None:
    """The writer's rows and the reader's columns must agree; biases have no say beside them."""
    first, second = mask(chain, FIRST, 3), mask(chain, SECOND, 3, axis=1)
    zero_bias = np.zeros(16)
    path = file(tmp_path, **{FIRST: first, SECOND: second, "c1": zero_bias})
    assert removed(api.prune(chain, masks=path, **MASKED)) == {f"{FIRST}:0": (3,)}
    path = file(tmp_path, **{FIRST: first, SECOND: mask(chain, SECOND, 4, axis=1)})
    with pytest.raises(UsageError, match="disagree about 2 units"):
        api.prune(chain, masks=path, **MASKED)


def test_masks_that_cannot_be_carried_out_are_told(chain: onnx.ModelProto, tmp_path: Path) -> None:
    """Outputs stay; scattered zeros fill no index; nothing to do is said."""
    scattered = np.random.default_rng(0).integers(0, 2, (16, 16, 3, 3))
    path = file(tmp_path, **{"c4": mask(chain, "c4", 0, 1, axis=1), SECOND: scattered})
    result = api.prune(chain, masks=path, **MASKED)
    assert removed(result) == {}
    notes = "\n".join(result.notes)
    assert "2 indices that the masks remove stay as they are: graph output" in notes
    assert "1 mask has zeros that fill no index" in notes
    assert "nothing was cut" in notes


def test_heads_that_are_masked_in_part_stay(tmp_path: Path) -> None:
    model = attention(heads=4, width=8)
    names = [n for n, w in weights(model).items() if w.shape == (6, 32)]
    gone = [*range(8), 9]
    path = file(tmp_path, **{name: mask(model, name, *gone, axis=1) for name in names})
    result = api.prune(model, masks=path, resolve="union", **MASKED)
    assert [len(units) for units in removed(result).values()] == [1]
    assert any("1 unit that the masks remove in part stays whole" in note for note in result.notes)


def test_positions_of_groups_stay_as_masks_mean_them(tmp_path: Path) -> None:
    """Masks speak of positions in the given model: nothing is reordered, here or by the plan."""
    model = grouped()
    path = file(tmp_path, c2=mask(model, "c2", 2, 6))
    result = api.prune(model, masks=path, **MASKED)
    kept = np.delete(weights(model)["c2"], [2, 6], axis=0)
    assert np.array_equal(weights(result.model)["c2"][:, :, 0, 0], kept[:, :4, 0, 0])
    again = api.apply(model, result.plan)
    assert again.model.SerializeToString() == result.model.SerializeToString()


@pytest.mark.parametrize(
    "arrays, words",
    [
        ({FIRST: np.zeros((16, 3, 3, 3))}, ["nothing of c0:0 would stay", "mask c0:0 of"]),
        ({FIRST: np.full(16, np.nan)}, ["'c0'", "NaN", "finite"]),
        ({FIRST: np.full(16, 0.5)}, ["'c0'", "--scores"]),
        ({"nothing": np.zeros(16)}, ["'nothing'", "inspect"]),
    ],
)
def test_masks_that_do_not_fit(
    chain: onnx.ModelProto, tmp_path: Path, arrays: Arrays, words: list[str]
) -> None:
    with pytest.raises(UsageError) as raised:
        api.prune(chain, masks=file(tmp_path, **arrays), **MASKED)
    assert all(word in str(raised.value) for word in words), raised.value


@pytest.mark.parametrize(
    "options, words",
    [
        ({"masks": 1, "flops": 0.5}, "a budget"),
        ({"masks": 1, "round_to": 8}, "--round-to"),
        ({"masks": 1, "max_drop": 0.1}, "a budget"),
        ({"masks": 1, "scores": 1, "flops": 0.5}, "--scores and --masks"),
        ({"scores": 1, "criterion": "l1", "flops": 0.5}, "--criterion and --scores"),
        ({"scores": 1, "resolve": "union", "flops": 0.5}, "--resolve"),
        ({"masks": 1, "resolve": "both"}, "'both' is unknown"),
        ({"scores": 1}, "no budget"),
    ],
)
def test_options_that_contradict(
    chain: onnx.ModelProto, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    path = file(tmp_path, **{FIRST: np.ones(16)})
    options = {key: path if value == 1 else value for key, value in options.items()}
    with pytest.raises(UsageError, match=words):
        api.prune(chain, **options)


@pytest.mark.parametrize("option", ["--masks", "--scores"])
def test_on_the_command_line(run: Run, small: Path, option: str) -> None:
    """Named in the report and in the plan; the plan makes the same model without the file."""
    model = onnx.load(small)
    path = file(small.parent, **{FIRST: mask(model, FIRST, 2, 7), SECOND: mask(model, SECOND, 5)})
    out, plan, again = (small.with_name(n) for n in ("out.onnx", "plan.json", "again.onnx"))
    budget = ["--target-flops", 0.8] if option == "--scores" else []
    checks = ["--no-measure", "--no-cache", "--samples", 16]
    ran = run(small, option, path, *budget, "-o", out, "--plan-out", plan, "--json", *checks)
    assert ran.code == 0, ran.err
    options = json.loads(ran.out)["options"]
    assert options["criterion"] == f"{option.removeprefix('--')} given.npz"
    assert len(options["outside"]["sha256"]) == 64
    assert f"decided by: {options['criterion']}" in ran.err
    path.unlink()
    ran = run("apply", small, plan, "-o", again, "--no-measure", "--quiet", "--no-cache")
    assert ran.code == 0, ran.err
    assert again.read_bytes() == out.read_bytes()


def test_an_archive_of_something_else(tmp_path: Path, chain: onnx.ModelProto) -> None:
    """PyTorch's files are archives too."""
    path = tmp_path / "masks.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"content")
    with pytest.raises(UsageError, match=r"no arrays(.|\n)*numpy\.savez"):
        api.prune(chain, masks=path, **MASKED)


@pytest.mark.parametrize("content", [b"no archive", b"", None])
def test_a_file_that_is_none(run: Run, small: Path, content: bytes | None) -> None:
    path = small.with_name("given.npz")
    if content is not None:
        path.write_bytes(content)
    ran = run(small, "--masks", path, "-o", small.with_name("out.onnx"))
    assert (ran.code, ran.out) == (2, "")
    assert "cannot read arrays" in ran.err
    assert str(path) in ran.err


def test_what_every_reader_would_keep(tmp_path: Path) -> None:
    """Before ties are looked at, each axis has a set of its own."""
    model = residual()
    prepared = api.prepare(model)
    arrays = {"c0": mask(model, "c0", 1), "c4": mask(model, "c4", 2, 3, axis=1)}
    found = wanted(prepared.analysis, given(prepared, arrays, tmp_path))
    leaves = {place: np.flatnonzero(gone).tolist() for place, gone in found.axes.items()}
    assert leaves == {("c0", 0): [1], ("c4", 1): [2, 3]}


def test_bodies_and_constants_can_be_named(tmp_path: Path) -> None:
    """A weight that is a Constant node has the name of what it writes."""
    model = parser.parse_model(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[1, 4] x) => (float[1, 2] y) <float[6, 2] v = {1,2,3,4,5,6,7,8,9,10,11,12}> {
            w = Constant <value = float[4, 6] {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,
                21,22,23,24}> ()
            h = MatMul(x, w)
            r = Relu(h)
            y = MatMul(r, v)
        }
        """
    )
    gone = np.ones((4, 6))
    gone[:, 3] = 0
    result = api.prune(model, masks=file(tmp_path, w=gone), **MASKED)
    assert list(removed(result).values()) == [(3,)]
    assert isinstance(result.made, Model)


def test_groups_that_begin_with_one_axis_have_names_of_their_own(tmp_path: Path) -> None:
    """The rows of one weight go two ways: both groups can be scored, and are."""
    b = Builder(7)
    x = b.add("Relu", b.conv("x", 3, 8))
    left, right = f"{x}_left", f"{x}_right"
    b.nodes.append(onnx.helper.make_node("Split", [x], [left, right], axis=1))
    y = b.add("Add", b.conv(left, 4, 5), b.conv(right, 4, 5))
    model = b.model({"x": [1, 3, 4, 4]}, {y: [1, 5, 4, 4]})
    names = [group.name for group in api.prepare(model).analysis.coupling.groups]
    assert names == [f"{FIRST}:0", f"{FIRST}:0#2"]
    given_scores = dict(zip(names, (np.arange(4.0), np.arange(4.0)[::-1]), strict=True))
    options = {**FINE, "flops": 0.5, "spread": "uniform"}
    result = api.prune(model, scores=file(tmp_path, **given_scores), **options)
    assert removed(result) == {names[0]: (0, 1), names[1]: (2, 3)}
