"""Runs from the middle of a model on: what other weights do, as a run of the whole model says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from graphs import Builder, attention, random_cnn

from graphprune import stretches as under_test
from graphprune.errors import ModelError
from graphprune.linear import linears
from graphprune.model import Array, Model
from graphprune.rewriting import Change, rewritten
from graphprune.runtime import Feeds, random_inputs, run_session, session
from graphprune.shapes import infer
from graphprune.storage import load
from graphprune.stretches import Stretches


def opened(model: Model, feeds: Sequence[Feeds], **options: Any) -> Stretches:
    return Stretches(model, feeds, linears(model), **options, threads=1)


def feeds_of(model: Model, count: int = 2) -> list[Feeds]:
    shapes = infer(model)
    return [random_inputs(model, shapes, seed) for seed in range(count)]


def others(model: Model, which: Sequence[int]) -> list[Change]:
    """Other weights for some operators, a bias for all of them."""
    found = []
    for k in which:
        linear = linears(model)[k]
        matrix = linear.matrix(model) * 1.25
        found.append((linear, matrix, np.full(matrix.shape[:2], 0.5)))
    return found


def same(found: Sequence[Sequence[Array]], wanted: Sequence[Sequence[Array]]) -> bool:
    return all(
        np.allclose(a, b, rtol=1e-4, atol=1e-5)
        for first, second in zip(found, wanted, strict=True)
        for a, b in zip(first, second, strict=True)
    )


def whole(model: Model, feeds: Sequence[Feeds]) -> list[list[Array]]:
    runner = session(model, threads=1)
    return [run_session(runner, feed) for feed in feeds]


def chain(depth: int) -> Model:
    """Residual blocks of two products each; the last one's output is the model's."""
    b = Builder()
    y = "x"
    for _ in range(depth):
        inner = b.add("Relu", b.add("MatMul", y, b.weight(4, 4)))
        y = b.add("Add", y, b.add("MatMul", inner, b.weight(4, 4)))
    return load(b.model({"x": [3, 4]}, {y: [3, 4]}))


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a session was made for each node, by its first output."""
    count: Counter[str] = Counter()

    def counting(model: Model, *rest: Any, **options: Any) -> Any:
        count.update(node.output[0] for node in model.nodes)
        return session(model, *rest, **options)

    monkeypatch.setattr(under_test, "session", counting)
    return count


MODELS = [load(random_cnn(seed)) for seed in range(4)] + [load(attention()), chain(24)]


@pytest.mark.parametrize("memory", [1e9, 0.0])
@pytest.mark.parametrize("k", range(len(MODELS)))
def test_as_a_run_of_the_whole(k: int, memory: float) -> None:
    model = MODELS[k]
    feeds = feeds_of(model)
    running = opened(model, feeds, memory=memory)
    assert same(running.reference, whole(model, feeds))
    for which in ([i] for i in range(len(linears(model)))):
        changes = others(model, which)
        wanted = whole(rewritten(model, changes), feeds)
        assert same(list(running.changed(changes)), wanted)
    changes = others(model, range(len(linears(model))))
    assert same(list(running.changed(changes)), whole(rewritten(model, changes), feeds))
    assert same(list(running.changed([])), running.reference)


def test_only_what_changes_is_opened_anew(runs: Counter[str]) -> None:
    for depth in (24, 48):
        model = chain(depth)
        running = opened(model, feeds_of(model))
        assert sum(runs.values()) == len(model.nodes)
        runs.clear()
        assert len(list(running.changed(others(model, [2 * depth - 1])))) == 2
        assert sum(runs.values()) <= 2 * under_test.NODES
        runs.clear()


def test_what_comes_before_is_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = chain(48)
    running = opened(model, feeds_of(model))
    steps: list[int] = []
    step = Stretches._step

    def counted(self: Stretches, k: int, *rest: Any) -> Any:
        steps.append(k)
        return step(self, k, *rest)

    monkeypatch.setattr(Stretches, "_step", counted)
    list(running.changed(others(model, [48])))
    first = running.stretch_of[linears(model)[48].node]
    assert min(steps) == first > 2


def test_little_memory_holds_few_boundaries() -> None:
    model = chain(96)
    feeds = feeds_of(model)
    plenty, little = opened(model, feeds), opened(model, feeds, memory=3 * 2 * 3 * 4 * 4)
    assert len(plenty.held) == len(plenty.stretches)
    assert 1 <= len(little.held) <= 3
    assert 0 in little.held


def test_a_deep_model_has_no_more_stretches_than_that() -> None:
    model = chain(200)
    assert len(opened(model, feeds_of(model)).stretches) <= 3 * under_test.MOST // 2


def test_an_operator_and_the_node_that_adds_its_bias_stay_together() -> None:
    b = Builder()
    y = "x"
    for _ in range(40):  # boundaries fall on all sorts of nodes
        y = b.add("Add", b.add("MatMul", y, b.weight(4, 4)), b.weight(4))
    model = load(b.model({"x": [3, 4]}, {y: [3, 4]}))
    running = opened(model, feeds_of(model))
    assert len(running.stretches) > 3
    for linear in linears(model):
        assert linear.bias_node is not None
        assert running.stretch_of[linear.node] == running.stretch_of[linear.bias_node]


def test_a_shape_may_cross_a_boundary() -> None:
    b = Builder()
    sizes = b.add("Shape", "x")
    y = "x"
    for _ in range(40):
        y = b.add("Relu", y)
    y = b.add("Resize", y, "", "", sizes)
    model = load(b.model({"x": [1, 2, 4, 4]}, {y: [1, 2, 4, 4]}))
    feeds = feeds_of(model)
    assert same(opened(model, feeds).reference, whole(model, feeds))


def test_a_part_that_is_refused_is_run_with_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = chain(24)
    feeds = feeds_of(model)

    def refusing(part: Model, *rest: Any, **options: Any) -> Any:
        if len(part.nodes) < len(model.nodes):
            raise ModelError("refused")
        return session(part, *rest, **options)

    monkeypatch.setattr(under_test, "session", refusing)
    running = opened(model, feeds)
    assert len(running.stretches) == 1
    assert same(running.reference, whole(model, feeds))
    changes = others(model, [5])
    assert same(list(running.changed(changes)), whole(rewritten(model, changes), feeds))


def test_an_operator_that_no_output_needs_changes_nothing() -> None:
    b = Builder()
    b.add("MatMul", "x", b.weight(4, 4))
    y = b.add("MatMul", "x", b.weight(4, 4))
    model = load(b.model({"x": [3, 4]}, {y: [3, 4]}))
    running = opened(model, feeds_of(model))
    assert same(list(running.changed(others(model, [0]))), running.reference)
    assert not same(list(running.changed(others(model, [1]))), running.reference)
