"""Channels in order of size inside each group: the function stays, balanced units become equal."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from graphs import Builder, random_cnn

from graphprune import api
from graphprune.errors import VerificationError
from graphprune.model import Array, Model
from graphprune.pipeline import Context, PassResult
from graphprune.runtime import random_inputs, run_session, session
from graphprune.shapes import infer
from graphprune.storage import load
from graphprune_passes import align_groups
from graphprune_passes.align_groups import AlignGroups

GROUPS, WIDTH = 2, 8


def aligned(model: Model) -> PassResult:
    return AlignGroups().run(model, Context())


def outputs(model: Model) -> list[Array]:
    return run_session(session(model, 1), random_inputs(model, infer(model)))


def assert_same(a: Model, b: Model) -> None:
    for expected, actual in zip(outputs(a), outputs(b), strict=True):
        assert np.abs(expected - actual).max() <= 1e-5 * max(1.0, np.abs(expected).max())


def block(b: Builder, x: str, channels: int, *, before: str = "Relu", after: str = "Relu") -> str:
    """1x1 convolution, grouped 3x3 convolution, 1x1 convolution, as in ResNeXt."""
    wide = GROUPS * WIDTH
    inner = b.norm(b.conv(x, channels, wide, 1), wide)
    inner = b.add(before, inner)
    inner = b.add(after, b.conv(inner, wide, wide, 3, group=GROUPS))
    return b.conv(inner, wide, channels, 1)


def network(**options: Any) -> onnx.ModelProto:
    b = Builder(3)
    x = b.add("Relu", b.conv("x", 3, 8))
    x = b.add("Relu", b.add("Add", x, block(b, x, 8, **options)))
    y = b.add("MatMul", b.add("Flatten", b.add("GlobalAveragePool", x)), b.weight(8, 5))
    return b.model({"x": ["n", 3, 6, 6]}, {y: ["n", 5]})


def test_the_function_stays_and_both_sides_of_the_convolution_are_ordered() -> None:
    model = load(network())
    result = aligned(model)
    assert len(result.changes) == 2  # what the grouped convolution reads, and what it writes
    assert_same(model, result.model)


def test_positions_are_in_the_order_of_their_size() -> None:
    model = load(network())
    grouped = next(
        n for n in model.nodes if any(a.name == "group" and a.i > 1 for a in n.attribute)
    )
    last = model.nodes[[*model.nodes].index(grouped) + 2]
    result = aligned(model).model
    wanted = [grouped.input[0], grouped.output[0]]
    assert wanted == [n for n in wanted if n in result.producer]
    rows = np.abs(result.array(grouped.input[1])).reshape(GROUPS, WIDTH, -1).sum(-1)
    columns = np.abs(result.array(last.input[1])).sum(axis=(0, 2, 3)).reshape(GROUPS, WIDTH)
    bias = np.abs(result.array(grouped.input[2])).reshape(GROUPS, WIDTH)
    size = sum(part / part.sum() for part in (rows, columns, bias))
    assert (np.diff(size, axis=1) >= 0).all()


def test_a_second_run_changes_nothing() -> None:
    once = aligned(load(network())).model
    assert not aligned(once).changes


def test_each_group_may_lose_other_positions() -> None:
    """Pruned to half, the channels kept of the two groups stood at different positions."""
    proto = network()
    model = load(proto)
    result = api.prune(proto, flops=0.5, criterion="l1", repair="none", measure=False, round_to=2)
    weight = next(n for n in model.nodes if any(a.name == "group" and a.i > 1 for a in n.attribute))
    before, after = model.array(weight.input[1]), load(result.model).array(weight.input[1])
    assert after.shape[0] < before.shape[0] and after.shape[1] < before.shape[1]
    kept = []
    flat = before.reshape(GROUPS, WIDTH, WIDTH, -1)
    for g, rows in enumerate(after.reshape(GROUPS, -1, *after.shape[1:])):
        small = rows.reshape(*rows.shape[:2], -1)
        first = small[0, 0]
        kept.append(np.argwhere((flat[g] == first).all(-1))[0].tolist())
    assert kept[0] != kept[1]
    assert result.verdict.relative_error < 1e-4


@pytest.mark.parametrize("seed", range(30))
def test_random_networks_compute_the_same(seed: int) -> None:
    """Shuffles, groups, squeeze and excite, concatenations: moved where allowed, never wrongly."""
    model = load(random_cnn(seed))
    assert_same(model, aligned(model).model)


def test_a_shuffle_knows_the_order() -> None:
    """Behind a channel shuffle the next convolution's groups read one channel of every group."""
    b = Builder(1)
    x = b.conv("x", 3, 16)
    x = b.conv(x, 16, 16, 1, group=2)
    x = b.add("Reshape", x, b.ints(0, 2, 8, 6, 6))
    x = b.add("Transpose", x, perm=[0, 2, 1, 3, 4])
    x = b.add("Reshape", x, b.ints(0, 16, 6, 6))
    y = b.conv(x, 16, 4, 3, group=2)
    model = load(b.model({"x": ["n", 3, 6, 6]}, {y: ["n", 4, 6, 6]}))
    assert_same(model, aligned(model).model)


def test_the_interface_knows_the_order() -> None:
    b = Builder(1)
    y = b.conv("x", 8, 8, 3, group=2)
    model = load(b.model({"x": ["n", 8, 6, 6]}, {y: ["n", 8, 6, 6]}))
    assert not aligned(model).changes


def test_a_wrong_order_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """What preparing does to weights is proved like everything else."""

    def swapped(array: Array, place: align_groups._Place, order: Array) -> Array:
        return honest(array, place, order[::-1] if place.whole is not None else order)

    honest = align_groups._moved
    monkeypatch.setattr(align_groups, "_moved", swapped)
    with pytest.raises(VerificationError, match="prepared model differs"):
        api.prune(network(), flops=0.5, criterion="l1", repair="none", measure=False, round_to=2)
