"""Blocks whose sum is inside a fused normalisation leave, and what stays is fused as it was."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest
from block_forms import WIDTH, finished, linear
from graphs import Builder
from skip_forms import LAYER, SIMPLE, SKIPS, product, skipped

from graphprune import api
from graphprune.analysis import Analysis, Scope
from graphprune.bypass import joined
from graphprune.cut import cut
from graphprune.model import Model
from graphprune.options import Options
from graphprune.oracle import law_error, relative_error
from graphprune.pipeline import Context
from graphprune.runtime import opened, random_inputs
from graphprune.storage import load
from graphprune_passes.close_skips import CloseSkips
from graphprune_passes.open_skips import OpenSkips, opened_from
from graphprune_passes.part_norms import PartNorms

SCOPE = Scope(units=("channels", "heads", "blocks"))
OPTIONS: dict[str, Any] = {"samples": 16, "measure": False, "cache": False, "round_to": 1}


def analysed(model: onnx.ModelProto) -> Analysis:
    return api.prepare(model, SCOPE).analysis


def closed(analysis: Analysis, removed: np.ndarray) -> Model:
    alive = analysis.coupling.alive(removed)
    small = cut(analysis.model, analysis.shapes, analysis.coupling, alive)[0]
    return CloseSkips().run(joined(small)[0], Context()).model


def fused(model: Model) -> int:
    return sum(node.op_type in (LAYER, SIMPLE) for node in model.nodes)


@pytest.mark.parametrize("name", SKIPS)
def test_found(name: str) -> None:
    model, kinds = SKIPS[name]()
    assert [block.kind for block in analysed(model).blocks] == kinds


@pytest.mark.parametrize("name", SKIPS)
def test_opened_and_closed_is_what_it_was(name: str) -> None:
    model = load(SKIPS[name]()[0])
    wide = OpenSkips().run(model, Context(scope=SCOPE)).model
    assert not fused(wide)
    feeds = random_inputs(model, analysed(SKIPS[name]()[0]).shapes)
    assert relative_error(opened(model)(feeds), opened(wide)(feeds)) < 1e-6
    again = CloseSkips().run(wide, Context()).model
    assert len(again.nodes) == len(model.nodes)
    for new, old in zip(again.nodes, model.nodes, strict=True):
        assert (new.op_type, new.input, new.output) == (old.op_type, old.input, old.output)
        assert not new.metadata_props
        assert {a.name: a for a in new.attribute} == {a.name: a for a in old.attribute}


@pytest.mark.parametrize("name", SKIPS)
def test_each_leaves_exactly(name: str) -> None:
    """Law 3 for every block alone and for all; one normalisation is no longer fused with a sum for
    each block that has left, and nothing else is left over."""
    model = SKIPS[name]()[0]
    analysis = analysed(model)
    units = analysis.coupling.blocks.tolist()
    feeds = random_inputs(analysis.model, analysis.shapes)
    for chosen in [*([unit] for unit in units), units]:
        removed = analysis.nothing_removed
        removed[chosen] = True
        small = closed(analysis, removed)
        alive = analysis.coupling.alive(removed)
        shapes, coupling = analysis.shapes, analysis.coupling
        assert law_error(analysis.model, small, shapes, coupling, alive, feeds) < 1e-6
        if name not in ("mixed", "bias of the sum"):
            assert fused(small) == fused(load(model)) - len(chosen)
        assert not any(opened_from(node) for node in small.nodes)


@pytest.mark.parametrize("name", SKIPS)
@pytest.mark.parametrize("seed", range(2))
def test_leaves_with_channels(name: str, seed: int) -> None:
    analysis = analysed(SKIPS[name]()[0])
    rng = np.random.default_rng(seed)
    removed = analysis.nothing_removed
    for group in analysis.coupling.groups:
        removed[rng.permutation(group.units)[: rng.integers(0, len(group))]] = True
    removed[analysis.coupling.blocks] = rng.random(len(analysis.coupling.blocks)) < 0.5
    alive = analysis.coupling.alive(removed)
    feeds = random_inputs(analysis.model, analysis.shapes)
    small = closed(analysis, removed)
    found = law_error(analysis.model, small, analysis.shapes, analysis.coupling, alive, feeds)
    assert found < 1e-6


def test_a_bias_leaves_with_its_layer_or_stays() -> None:
    """That of a linear operator is the block's own."""
    for name, kept in (("post-norm", False), ("bias of the sum", True)):
        analysis = analysed(SKIPS[name]()[0])
        block = analysis.blocks[-1]
        vectors = {node.input[4] for node in load(SKIPS[name]()[0]).nodes if len(node.input) > 4}
        inside = {n for i in block.nodes for n in analysis.model.nodes[i].input} & vectors
        assert bool(inside) is not kept


@pytest.mark.parametrize("units", [("blocks",), ("channels", "heads", "blocks")])
def test_plan_and_apply(units: tuple[str, ...]) -> None:
    model = SKIPS["pre-norm"]()[0]
    made = api.prune(model, flops=0.6, units=units, min_channels=1, **OPTIONS)
    assert made.verdict.passed
    again = api.apply(model, made.plan, options=Options(measure=False, cache=False))
    assert again.model.SerializeToString() == made.model.SerializeToString()
    types = Counter(node.op_type for node in made.model.graph.node)
    gone = sum(block.removed for block in made.plan.blocks)
    assert types[LAYER] == 6 - gone
    assert gone or len(units) > 1


def test_closed_again_on_targets_that_keep_apart() -> None:
    """What was given as one node comes back as one, where sums that were not are kept apart."""
    wide = OpenSkips().run(load(SKIPS["pre-norm"]()[0]), Context(scope=SCOPE)).model
    changes = PartNorms().run(wide, Context()).changes
    assert len(changes) == 1
    assert not opened_from(wide.nodes[2])
    assert changes[0].node == wide.nodes[2].name


def test_as_given_without_blocks() -> None:
    model = SKIPS["post-norm"]()[0]
    assert fused(api.prepare(model).analysis.model) == 4


@pytest.mark.parametrize("why", ["deviation", "computed"])
def test_left_alone(why: str) -> None:
    """A node whose inverse deviation is read; one whose scale is computed."""
    b = Builder(6)
    x = linear(b, "x", WIDTH, WIDTH)
    h, total = skipped(b, x, product(b, x))
    node = b.nodes[-1]
    if why == "deviation":
        node.output[2] = "deviation"
        h = b.add("Mul", h, "deviation")
    else:
        node.input[2] = b.add("ReduceMean", x, axes=[0, 1], keepdims=0)
        b.nodes[-2:] = b.nodes[:-3:-1]
    model = load(finished(b, b.add("Add", h, total)))
    done = OpenSkips().run(model, Context(scope=SCOPE))
    assert not done.modified
    assert fused(done.model) == 1
