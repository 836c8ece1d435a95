"""--units: whole heads, the same positions of every head, all other channels, or some of these."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from attention_forms import (
    FORMS,
    HEADS,
    INNER,
    SIZE,
    WIDTH,
    Net,
    net,
    rotate_half,
    rotate_pairs,
    rotate_strided,
    separate,
)
from conftest import Ran
from grouped_forms import GROUPED, ONE_KV_HEAD, cached

from graphprune.analysis import Scope
from graphprune.api import apply, prepare, prune
from graphprune.errors import UsageError
from graphprune.options import Options

Run = Callable[..., Ran]
INSIDE = ("channels", "head-dims")


def sizes(source: onnx.ModelProto, *units: str) -> list[int]:
    groups = prepare(source, Scope(units=units)).analysis.coupling.groups
    return [len(group) for group in groups]


def block() -> onnx.ModelProto:
    """Attention, then two linear layers with 20 channels between."""
    b = Net()
    x = b.add("Add", "x", separate(b))
    hidden = b.add("Relu", b.linear(x, WIDTH, 20))
    y = b.add("Add", x, b.linear(hidden, 20, WIDTH))
    return b.model({"x": ["n", 5, WIDTH]}, {y: ["n", 5, WIDTH]})


@pytest.mark.parametrize(
    ("units", "expected"),
    [
        (("channels", "heads"), [HEADS, 20]),
        (("channels", "heads", "head-dims"), [HEADS, 20]),
        (("channels", "head-dims"), [SIZE, SIZE, 20]),
        (("channels",), [20]),
        (("heads",), [HEADS]),
        (("head-dims",), [SIZE, SIZE]),
    ],
    ids=str,
)
def test_what_was_chosen_leaves(units: tuple[str, ...], expected: list[int]) -> None:
    source = block()
    assert sizes(source, *units) == expected
    result = prune(
        source, flops=0.9, units=units, round_to=1, min_channels=1, fast=True, measure=False
    )
    assert result.verdict.passed


@pytest.mark.parametrize("name", [*FORMS, *GROUPED, *ONE_KV_HEAD])
def test_positions_of_every_form(name: str) -> None:
    source = net({**FORMS, **GROUPED, **ONE_KV_HEAD}[name])
    found = [size for size in sizes(source, *INSIDE) if size != WIDTH]
    assert set(found) <= {SIZE, SIZE // 2}
    assert found
    result = prune(
        source, flops=0.8, units=INSIDE, round_to=1, min_channels=1, fast=True, measure=False
    )
    assert result.verdict.passed


@pytest.mark.parametrize("form", [rotate_half, rotate_pairs, rotate_strided])
def test_turned_positions_leave_in_pairs(form: Callable[[Net], str]) -> None:
    assert sizes(net(form), *INSIDE) == [SIZE // 2, SIZE]


def test_positions_leave_where_heads_are_pinned() -> None:
    """A scale for each head that the interface holds: only with ``head-dims`` anything leaves."""
    b = Net()
    q, k, v = b.separate()
    scores = b.add("Mul", b.keys(q, k), "per_head")
    y = b.join(b.mix(scores, v))
    source = b.model({"x": ["n", 5, WIDTH], "per_head": [1, HEADS, 1, 1]}, {y: ["n", 5, WIDTH]})
    assert sizes(source, "channels", "heads") == []
    assert sizes(source, "channels", "heads", "head-dims") == [SIZE, SIZE]


def test_query_heads_are_heads() -> None:
    assert sizes(net(cached), *INSIDE) == []
    assert len(sizes(net(cached), "heads")) == 1


def test_a_plan_remembers_its_units() -> None:
    source = block()
    made = prune(
        source, flops=0.9, units=("head-dims",), round_to=1, min_channels=1, fast=True,
        measure=False,
    ).plan  # fmt: skip
    assert json.loads(made.to_json())["options"]["units"] == ["head-dims"]
    result = apply(source, made, options=Options(measure=False))
    shapes = [list(t.dims) for t in result.model.graph.initializer]
    widths = [shape[1] for shape in shapes if len(shape) == 2 and shape[0] == WIDTH]
    assert min(widths) < INNER
    assert all(width % HEADS == 0 for width in widths if width != 20)


def test_only_known_kinds() -> None:
    with pytest.raises(UsageError, match="'head' is no kind of unit"):
        prune(block(), flops=0.9, units=("head",))
    with pytest.raises(UsageError, match="no kind"):
        prune(block(), flops=0.9, units=())


def test_the_command_line(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(block(), path)
    listed = run("inspect", path, "--units", "channels", "--json")
    assert listed.code == 0
    groups = json.loads(listed.out)["groups"]
    assert [group["units"] for group in groups] == [20]
    ran = run(path, "--target-flops", 0.9, "--fast", "--no-measure", "--units", "heads, head-dim")
    assert ran.code == 2
    assert "'head-dim' is no kind of unit" in ran.err


def grouped_projections(held: bool) -> onnx.ModelProto:
    """1x1 convolutions whose groups are the heads, on [n, WIDTH, 5]; with ``held`` the input comes
    from outside, so no group may leave."""
    b = Net()
    wide = HEADS * SIZE
    x = "x" if held else b.add("Relu", b.add("Conv", "x", b.weight(wide, wide, 1)))
    made = [b.add("Conv", x, b.weight(wide, SIZE, 1), group=HEADS) for _ in "qkv"]
    q, k, v = (b.add("Reshape", piece, b.ints(0, HEADS, SIZE, 5)) for piece in made)
    scores = b.add("Softmax", b.add("MatMul", b.add("Transpose", q, perm=[0, 1, 3, 2]), k), axis=-1)
    mixed = b.add("MatMul", v, b.add("Transpose", scores, perm=[0, 1, 3, 2]))
    joined = b.add("Reshape", mixed, b.ints(0, wide, 5))
    y = b.add("Conv", joined, b.weight(WIDTH, wide, 1))
    return b.model({"x": ["n", wide, 5]}, {y: ["n", WIDTH, 5]})


@pytest.mark.parametrize("held", [True, False])
def test_heads_that_are_groups_of_a_convolution(held: bool) -> None:
    """They are one thing; where it must stay, channels of every group may leave."""
    source = grouped_projections(held)
    assert sizes(source, "channels", "heads") == ([SIZE, SIZE] if held else [HEADS])
    assert sizes(source, "heads") == ([] if held else [HEADS])
    result = prune(source, flops=0.6, round_to=1, min_channels=1, fast=True, measure=False)
    assert result.verdict.passed
