"""Residual blocks: found by dominators in many forms, and gone exactly as if zeros were added."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from block_forms import (
    FORMS,
    LENGTH,
    WIDTH,
    feed_forward,
    normed,
    post_norm,
    pre_norm,
    residual_cnn,
)
from graphs import Builder
from onnx import helper

from graphprune import api
from graphprune.analysis import Analysis, Scope
from graphprune.bypass import joined, without_terms
from graphprune.coupling import Mask
from graphprune.cut import cut
from graphprune.errors import UsageError
from graphprune.model import Model
from graphprune.options import Options
from graphprune.oracle import law_error, relative_error
from graphprune.pipeline import Context
from graphprune.result import Result
from graphprune.runtime import opened, random_inputs
from graphprune.storage import load
from graphprune_passes.remove_blocks import RemoveBlocks

SCOPE = Scope(units=("channels", "heads", "blocks"))


def analysed(model: onnx.ModelProto, **scope: Any) -> Analysis:
    return api.prepare(model, replace(SCOPE, **scope)).analysis


def without(analysis: Analysis, removed: Mask) -> Model:
    """The model cut, and the identities that stand for blocks gone too."""
    alive = analysis.coupling.alive(removed)
    small = cut(analysis.model, analysis.shapes, analysis.coupling, alive)[0]
    return joined(small)[0]


def error_without(analysis: Analysis, removed: Mask) -> float:
    alive = analysis.coupling.alive(removed)
    feeds = random_inputs(analysis.model, analysis.shapes)
    model = without(analysis, removed)
    onnx.checker.check_model(model.assemble(), full_check=True)
    return law_error(analysis.model, model, analysis.shapes, analysis.coupling, alive, feeds)


@pytest.mark.parametrize("name", FORMS)
def test_found(name: str) -> None:
    model, kinds = FORMS[name]()
    analysis = analysed(model)
    assert [block.kind for block in analysis.blocks] == kinds
    assert len(analysis.coupling.blocks) == len(kinds)
    for block in analysis.blocks:
        assert block.entry not in {o for i in block.nodes for o in analysis.model.nodes[i].output}


@pytest.mark.parametrize("name", FORMS)
def test_each_leaves_exactly(name: str) -> None:
    """Law 3, for every block alone and for all of them, with no node left over."""
    analysis = analysed(FORMS[name]()[0])
    units = analysis.coupling.blocks.tolist()
    for chosen in [*([unit] for unit in units), units]:
        removed = analysis.nothing_removed
        removed[chosen] = True
        assert error_without(analysis, removed) < 1e-6
        model = without(analysis, removed)
        names = {node.name for node in analysis.model.nodes}
        for i, unit in enumerate(units):
            if removed[unit]:
                assert analysis.blocks[i].branch not in model.producer
        assert {node.name for node in model.nodes} <= names
        ends = {"x", *analysis.model.output_names}
        identities = [node for node in model.nodes if node.op_type == "Identity"]
        known = [node for node in analysis.model.nodes if node.op_type == "Identity"]
        assert all(ends >= {*n.input, *n.output} for n in identities if n not in known)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("seed", range(3))
def test_leaves_with_channels(name: str, seed: int) -> None:
    """Law 3, where random channels, heads and blocks leave together."""
    analysis = analysed(FORMS[name]()[0])
    rng = np.random.default_rng(seed)
    removed = analysis.nothing_removed
    for group in analysis.coupling.groups:
        gone = rng.permutation(group.units)[: rng.integers(0, len(group))]
        removed[gone] = True
    for unit in analysis.coupling.blocks:
        removed[unit] = rng.random() < 0.5
    assert error_without(analysis, removed) < 1e-6


@pytest.mark.parametrize("name", [name for name in FORMS if name != "shared work"])
def test_cost_is_the_results(name: str) -> None:
    """What the cost model counts without a block is what an analysis of the result counts."""
    analysis = analysed(FORMS[name]()[0])
    for unit in analysis.coupling.blocks:
        removed = analysis.nothing_removed
        removed[unit] = True
        counted = analysis.cost.of(removed)
        after = analysed(without(analysis, removed).assemble()).cost
        real = after.of(np.zeros(after.width.shape[1], dtype=bool))
        assert (counted.macs, counted.params) == (real.macs, real.params)
        assert abs(counted.bytes - real.bytes) < 0.1 * real.bytes


def test_idle_units() -> None:
    """Channels that only a block has need no decision once it leaves; those of the stream do."""
    analysis = analysed(residual_cnn()[0])
    removed = analysis.nothing_removed
    removed[analysis.coupling.blocks[0]] = True
    idle = analysis.idle(removed)
    sizes = [len(g) for g in analysis.coupling.groups if idle[g.units].all()]
    assert sizes == [6]
    assert idle.sum() == 6


def test_protected_and_only() -> None:
    model, _ = pre_norm()
    analysis = analysed(model)
    first, second = analysis.blocks[:2]
    inside = analysis.model.nodes[first.nodes[0]].name
    held = analysed(model, protect=(inside,)).coupling.blocks
    assert held[0] == -1
    assert (held[1:] >= 0).all()
    names = tuple(analysis.model.nodes[i].name for i in second.nodes)
    named = analysed(model, only=names).coupling.blocks
    assert named[1] >= 0
    assert (np.delete(named, 1) == -1).all()
    assert (analysed(model, only=names[:3]).coupling.blocks == -1).all()


def test_not_among_units() -> None:
    analysis = api.prepare(pre_norm()[0]).analysis
    assert not analysis.blocks
    alone = analysed(pre_norm()[0], units=("blocks",))
    assert alone.coupling.n_units == len(alone.blocks) == 4


def test_old_opsets() -> None:
    analysis = analysed(residual_cnn(opset=8)[0])
    removed = analysis.nothing_removed
    removed[analysis.coupling.blocks] = True
    assert error_without(analysis, removed) < 1e-6


def test_half_precision() -> None:
    b = Builder()
    weights = [b.constant((b.rng.standard_normal((4, 4)) / 2).astype(np.float16)) for _ in "ab"]
    x = b.add("Cast", b.add("MatMul", "x", b.weight(4, 4)), to=onnx.TensorProto.FLOAT16)
    h = b.add("MatMul", b.add("Relu", b.add("MatMul", x, weights[0])), weights[1])
    y = b.add("Cast", b.add("Add", x, h), to=onnx.TensorProto.FLOAT)
    analysis = analysed(b.model({"x": ["n", 4]}, {y: ["n", 4]}))
    removed = analysis.nothing_removed
    removed[analysis.coupling.blocks] = True
    assert error_without(analysis, removed) < 1e-3


def test_pass_alone() -> None:
    """Named blocks leave without any plan; the interface stays; an unknown name is refused."""
    b = Builder()
    x = b.add("Add", "x", feed_forward(b, "x"))
    y = b.add("Add", x, feed_forward(b, x))
    ends = ["n", LENGTH, WIDTH]
    model = load(b.model({"x": ends}, {y: ends}))
    blocks = analysed(model.assemble()).blocks
    done = RemoveBlocks((blocks[1].name,)).run(model, Context())
    assert [value.name for value in done.model.outputs] == [y]
    assert len(done.model.initializers) < len(model.initializers)
    assert done.modified
    both = RemoveBlocks(tuple(block.name for block in blocks)).run(model, Context()).model
    feeds = {"x": np.random.default_rng(0).standard_normal((2, LENGTH, WIDTH)).astype(np.float32)}
    assert relative_error(opened(both)(feeds), [feeds["x"]]) == 0
    with pytest.raises(UsageError, match="no residual block ends with 'nothing'"):
        RemoveBlocks(("nothing",)).run(model, Context())


def test_nothing_named_nothing_done() -> None:
    model = load(pre_norm()[0])
    assert not RemoveBlocks().run(model, Context()).modified


def pruned(model: onnx.ModelProto, units: tuple[str, ...], share: float, **more: Any) -> Result:
    options = {"samples": 16, "measure": False, "cache": False, "min_channels": 1, **more}
    return api.prune(model, flops=share, units=units, **options)


def test_plan_and_apply() -> None:
    """The plan names the blocks that leave, and makes the very same model again."""
    model = pre_norm(layers=3)[0]
    made = pruned(model, ("blocks",), 0.6)
    gone = [block for block in made.plan.blocks if block.removed]
    assert 0 < len(gone) < len(made.plan.blocks) == 6
    assert made.after.macs <= 0.6 * made.before.macs
    assert f"{len(gone)} of 6 residual blocks removed" in " ".join(made.notes)
    assert len(made.model.graph.node) < len(model.graph.node)
    again = api.apply(model, made.plan)
    assert again.model.SerializeToString() == made.model.SerializeToString()


def test_blocks_and_channels_in_one_plan() -> None:
    model = pre_norm(layers=3)[0]
    both = pruned(model, ("channels", "heads", "blocks"), 0.35)
    assert any(block.removed for block in both.plan.blocks)
    assert any(group.removed for group in both.plan.groups)
    again = api.apply(model, both.plan)
    assert again.model.SerializeToString() == both.model.SerializeToString()


def test_stale_blocks_are_refused() -> None:
    model = pre_norm(layers=3)[0]
    plan = pruned(model, ("blocks",), 0.6, repair="none").plan
    other = replace(plan.blocks[0], entry="elsewhere")
    with pytest.raises(UsageError, match="finds otherwise"):
        api.apply(model, replace(plan, blocks=(other, *plan.blocks[1:])))


def test_weights_alone_do_not_decide() -> None:
    for choice in ({"fast": True}, {"criterion": "l1", "repair": "none"}, {"spread": "uniform"}):
        with pytest.raises(UsageError, match="blocks needs calibration inputs"):
            pruned(pre_norm()[0], ("channels", "blocks"), 0.7, **choice)


def test_none_to_leave_is_said() -> None:
    made = pruned(FORMS["none"]()[0], ("channels", "blocks"), 0.7)
    assert "--units blocks: no residual block may leave: there are none" in made.notes
    model = pre_norm()[0]
    names = tuple(block.name for block in analysed(model).blocks)
    made = pruned(model, ("channels", "blocks"), 0.7, protect=names, allow_miss=True)
    assert "--units blocks: no residual block may leave: those there are must stay" in made.notes
    assert not made.plan.blocks


def test_files_say_nothing_of_blocks() -> None:
    with pytest.raises(UsageError, match="say nothing of blocks"):
        Options.of(flops=0.5, units=("channels", "blocks"), scores="scores.npz").check()


def test_blocks_leave_only_where_that_is_better() -> None:
    """The plan with blocks is held against the one without on inputs held out, and that is said."""
    model = pre_norm(layers=3)[0]
    notes = pruned(model, ("channels", "heads", "blocks"), 0.5, samples=64).notes
    assert sum("distortion on inputs held out" in note for note in notes) == 1


def standing_in(repair: str) -> tuple[float, tuple[str, ...]]:
    """The error of the stream once a block that is linear has left, and what the repair said."""
    b = Builder(2)
    x = b.add("Add", "x", feed_forward(b, normed(b, "x")))
    stays = x
    x = b.add("Add", x, b.add("MatMul", x, b.constant(b.rng.random((WIDTH, WIDTH), np.float32))))
    y = b.add("Sigmoid", x)
    ends = ["n", LENGTH, WIDTH]
    model = b.model({"x": ends}, {y: ends})
    analysis = analysed(model, units=("blocks",))
    first = analysis.blocks[0].name
    made = pruned(model, ("blocks",), 0.9, repair=repair, protect=(first,), samples=256)
    assert [block.name for block in made.plan.blocks if block.removed] == [analysis.blocks[1].name]
    assert stays in made.model.graph.node[-1].input
    feeds = {"x": np.random.default_rng(5).standard_normal((64, LENGTH, WIDTH), np.float32)}
    wanted, got = (opened(load(m))(feeds) for m in (model, made.model))
    said = tuple(repaired.how for repaired in made.repairs)
    return float(np.abs(wanted[0] - got[0]).mean()), said


def test_what_leads_into_a_block_stands_in_for_it() -> None:
    bare, none = standing_in("none")
    replaced, said = standing_in("obs")
    assert replaced < 0.6 * bare
    assert not none
    assert len(said) == 1
    assert said[0].startswith("ridge")


def test_where_nothing_can_stand_in() -> None:
    """A normalisation between what leads into the block and the block: only what follows is
    repaired, and that is said."""
    made = pruned(post_norm()[0], ("blocks",), 0.7, samples=64)
    assert any("not replaced" in repaired.how for repaired in made.repairs)


@pytest.mark.parametrize("repair", ["bias", "moments", "udfc", "none"])
def test_other_repairs(repair: str) -> None:
    for name in ("residual CNN", "pre-norm", "parallel, inside first", "at the ends"):
        made = pruned(FORMS[name]()[0], ("channels", "blocks"), 0.6, repair=repair)
        assert made.verdict.passed


def test_only_sums_lose_terms() -> None:
    """A sum of one passes it on, a sum of none is a term itself, a Concat keeps its axis; whatever
    else reads a term is no sum."""
    nodes = [
        helper.make_node("Add", ["t", "a"], ["one"]),
        helper.make_node("Sum", ["t", "u"], ["none"]),
        helper.make_node("Add", ["none", "b"], ["after"]),
        helper.make_node("Concat", ["a", "u", "b"], ["joined"], axis=1),
        helper.make_node("MatMul", ["t", "w"], ["other"]),
    ]
    kept, sums = without_terms(nodes, {"t", "u"})
    found = {node.output[0]: (node.op_type, list(node.input)) for node in kept}
    assert found == {
        "one": ("Identity", ["a"]),
        "after": ("Identity", ["b"]),
        "joined": ("Concat", ["a", "b"]),
        "other": ("MatMul", ["t", "w"]),
    }
    assert kept[2].attribute[0].i == 1
    assert [terms for _, terms in sums] == ["t", "none", "u"]
