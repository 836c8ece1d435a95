"""Readers with channels of their own: selectors, who leaves with whom, and law 3."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from graphs import Builder, random_cnn
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from graphprune.analysis import Analysis, Scope
from graphprune.coupling import Mask
from graphprune.cut import cut
from graphprune.model import Array, Model
from graphprune.oracle import law_error
from graphprune.pipeline import Context, Pipeline
from graphprune.plugins import collect, installed
from graphprune.runtime import Feeds, random_inputs
from graphprune.selectors import is_selector
from graphprune.storage import load
from graphprune_passes.open_reads import OpenReads


def residual() -> onnx.ModelProto:
    """A stream of 8 channels that two convolutions and the head read."""
    b = Builder(5)
    x = b.conv("x", 3, 8)
    for _ in range(2):
        inner = b.conv(b.add("Relu", b.norm(x, 8)), 8, 6)
        x = b.add("Add", x, b.conv(b.add("Relu", inner), 6, 8))
    y = b.add("MatMul", b.add("Flatten", b.add("GlobalAveragePool", x)), b.weight(8, 5))
    return b.model({"x": ["n", 3, 6, 6]}, {y: ["n", 5]})


def projections() -> onnx.ModelProto:
    """A normalised stream of width 12 whose order and width nothing may change, read by three."""
    b = Builder(6)
    normed = b.add("LayerNormalization", "x", b.weight(12), b.weight(12))
    parts = [b.add("MatMul", normed, b.weight(12, 8)) for _ in range(3)]
    mixed = b.add("Mul", b.add("Tanh", parts[0]), b.add("Sigmoid", parts[1]))
    y = b.add("MatMul", b.add("Add", mixed, parts[2]), b.weight(8, 12))
    return b.model({"x": [2, 3, 12]}, {b.add("Add", y, "x"): [2, 3, 12]})


def dense() -> onnx.ModelProto:
    """Each convolution reads everything before it, through a normalisation of its own."""
    b = Builder(7)
    parts = [b.conv("x", 3, 6)]
    for _ in range(3):
        width = 6 + 4 * (len(parts) - 1)
        whole = b.add("Concat", *parts, axis=1) if len(parts) > 1 else parts[0]
        parts.append(b.conv(b.add("Relu", b.norm(whole, width)), width, 4))
    pooled = b.add("Flatten", b.add("GlobalAveragePool", b.add("Concat", *parts, axis=1)))
    y = b.add("MatMul", pooled, b.weight(18, 5))
    return b.model({"x": ["n", 3, 5, 5]}, {y: ["n", 5]})


NETWORKS = {"residual": residual, "projections": projections, "dense": dense}


def opened(source: onnx.ModelProto, scope: Scope | None = None) -> Analysis:
    context = Context(scope=scope or Scope())
    normal = Pipeline(collect(installed()).prepare).run(load(source), context).model
    return context.analysis(OpenReads().run(normal, context).model)


def some(analysis: Analysis, seed: int, share: float = 0.3) -> Mask:
    """Random units, less those that would empty an axis."""
    coupling = analysis.coupling
    rng = np.random.default_rng(seed)
    axes = [axis.slots for axis in coupling.relations.slots.axes if len(axis)]
    parts = [part for fold in coupling.relations.folds for part in fold.parts]
    removed = analysis.nothing_removed
    for unit in rng.permutation(coupling.n_units)[: int(share * coupling.n_units)].tolist():
        more = removed.copy()
        more[unit] = True
        alive = coupling.alive(more)
        if all(alive[slots].any() for slots in (*axes, *parts)):
            removed = coupling.closed(more)
    return removed


def in_float64(model: Model) -> Callable[[Feeds], list[Array]]:
    """The model in float64 arithmetic, by ONNX's reference implementation."""
    proto = model.assemble()
    for tensor in proto.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            wide = numpy_helper.to_array(tensor).astype(np.float64)
            tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))
    runner = ReferenceEvaluator(proto)

    def run(feeds: Feeds) -> list[Array]:
        wide = {name: np.asarray(value, np.float64) for name, value in feeds.items()}
        outputs: list[Array] = runner.run(None, wide)
        assert all(output.dtype == np.float64 for output in outputs)
        return outputs

    return run


def error_of(analysis: Analysis, removed: Mask, **options: object) -> float:
    alive = analysis.coupling.alive(removed)
    model = analysis.model
    small = cut(model, analysis.shapes, analysis.coupling, alive)[0]
    feeds = random_inputs(model, analysis.shapes)
    return law_error(model, small, analysis.shapes, analysis.coupling, alive, feeds, **options)


@pytest.mark.parametrize("name", NETWORKS)
def test_equals_the_masked_model_in_float64(name: str) -> None:
    analysis = opened(NETWORKS[name]())
    assert any(is_selector(node) for node in analysis.model.nodes)
    for seed in range(4):
        removed = some(analysis, seed)
        assert removed.any()
        assert error_of(analysis, removed, open_model=in_float64) <= 1e-12


@pytest.mark.parametrize("seed", range(12))
def test_random_networks_obey_the_law(seed: int) -> None:
    analysis = opened(random_cnn(seed))
    removed = some(analysis, seed)
    if removed.any():
        assert error_of(analysis, removed) <= 1e-4


def test_a_reader_may_do_without_what_others_read() -> None:
    analysis = opened(residual())
    coupling, slots = analysis.coupling, analysis.relations.slots.tensors
    readers = [n for n in analysis.model.nodes if is_selector(n)]
    assert len(readers) == 3
    removed = analysis.nothing_removed
    removed[coupling.unit_of(slots[readers[0].output[0]][1].slots)[2]] = True
    alive = coupling.alive(removed)
    assert not alive[slots[readers[0].output[0]][1].slots][2]
    assert alive[slots[readers[0].input[0]][1].slots].all()
    assert alive[slots[readers[1].output[0]][1].slots].all()


def test_a_source_leaves_with_all_its_reads_and_they_with_it() -> None:
    analysis = opened(residual())
    coupling, slots = analysis.coupling, analysis.relations.slots.tensors
    readers = [n for n in analysis.model.nodes if is_selector(n)]
    of_reads = [int(coupling.unit_of(slots[n.output[0]][1].slots)[3]) for n in readers]
    source = int(coupling.unit_of(slots[readers[0].input[0]][1].slots)[3])
    by_reads, by_source = analysis.nothing_removed, analysis.nothing_removed
    by_reads[of_reads] = True
    by_source[source] = True
    assert (coupling.closed(by_reads) == coupling.closed(by_source)).all()
    by_reads[of_reads[0]] = False
    assert not coupling.closed(by_reads)[source]


def test_a_stream_that_must_stay_is_read_in_part() -> None:
    analysis = opened(projections())
    coupling, slots = analysis.coupling, analysis.relations.slots.tensors
    readers = [n for n in analysis.model.nodes if is_selector(n)]
    assert len(readers) == 3
    for reader in readers:
        assert (coupling.unit_of(slots[reader.output[0]][2].slots) >= 0).all()
        assert (coupling.unit_of(slots[reader.input[0]][2].slots) == -1).all()


def test_what_a_reader_alone_needs_shrinks_with_it() -> None:
    analysis = opened(dense())
    selectors = [n for n in analysis.model.nodes if is_selector(n)]
    after = [analysis.model.nodes[analysis.model.consumers[n.output[0]][0][0]] for n in selectors]
    assert [node.op_type for node in after[:-1]] == ["BatchNormalization"] * (len(after) - 1)


def test_protected_readers_keep_their_source() -> None:
    analysis = opened(residual(), Scope(protect=("n3_Conv",)))
    coupling, slots = analysis.coupling, analysis.relations.slots.tensors
    first = next(n for n in analysis.model.nodes if is_selector(n))
    assert (coupling.unit_of(slots[first.input[0]][1].slots) == -1).all()


def test_only_a_producer_lets_its_readers_follow() -> None:
    analysis = opened(residual(), Scope(only=("n0_Conv",)))
    coupling, slots = analysis.coupling, analysis.relations.slots.tensors
    first = next(n for n in analysis.model.nodes if is_selector(n))
    assert (coupling.unit_of(slots[first.input[0]][1].slots) >= 0).all()


def test_nothing_is_opened_where_one_alone_reads(chain: onnx.ModelProto) -> None:
    context = Context()
    model = load(chain)
    assert OpenReads().run(model, context).model is model


def test_weights_that_two_nodes_share_are_said() -> None:
    b = Builder(8)
    shared = b.weight(6, 6)
    x = b.add("MatMul", "x", b.weight(4, 6))
    x = b.add("Add", b.add("MatMul", x, shared), b.add("Relu", b.add("MatMul", x, shared)))
    y = b.add("MatMul", x, b.weight(6, 3))
    model = load(b.model({"x": [2, 4]}, {y: [2, 3]}))
    result = OpenReads().run(model, Context())
    assert not result.changes
    assert {entry.reason for entry in result.skipped} == {"its weight is read elsewhere too"}


def test_a_table_that_is_also_the_last_weight_is_read_whole() -> None:
    b = Builder(9)
    table = b.weight(20, 8)
    x = b.add("Gather", table, b.add("Cast", "ids", to=onnx.TensorProto.INT64))
    for _ in range(2):
        normed = b.add("LayerNormalization", x, b.weight(8), b.weight(8))
        x = b.add(
            "Add", x, b.add("MatMul", b.add("MatMul", normed, b.weight(8, 6)), b.weight(6, 8))
        )
    y = b.add("MatMul", x, b.add("Transpose", table, perm=[1, 0]))
    source = b.model({"ids": [1, 4]}, {y: [1, 4, 20]})
    analysis = opened(source)
    assert sum(is_selector(node) for node in analysis.model.nodes) == 2
    removed = some(analysis, 1)
    assert error_of(analysis, removed) <= 1e-4
