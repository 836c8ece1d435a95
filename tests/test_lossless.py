"""What does nothing leaves: the cleaned model is smaller and computes the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from graphs import Builder, attention
from idle_forms import HALF, cleaned, conv_chain, counts, edit, finished, mlp, put, same, widths

from graphprune import api
from graphprune.analysis import Scope


def test_zero_rows_with_a_zero_bias_are_dead() -> None:
    rows = [1, 4, 7]
    prepared = cleaned(mlp((0, put(rows, 0)), (1, put(rows, 0))))
    assert counts(prepared) == (3, 0, 0)
    assert widths(prepared, "c0", "c1", "c2") == [(9, 6), (9,), (8, 9)]


def test_columns_that_nobody_reads_take_their_producer_along() -> None:
    prepared = cleaned(mlp((2, put((slice(None), [0, 5]), 0))))
    assert counts(prepared) == (2, 0, 0)
    assert widths(prepared, "c0", "c2") == [(10, 6), (8, 10)]


def test_what_only_dead_units_read_is_dead_too() -> None:
    """Units 0 and 5 are read by unit 3 of the next layer alone, which nobody reads."""

    def read_by_one(value: Any) -> None:
        value[[0, 1, 2, 4, 5, 6, 7], 0] = 0
        value[[0, 1, 2, 4, 5, 6, 7], 5] = 0

    prepared = cleaned(mlp((2, read_by_one), (4, put((slice(None), 3), 0))))
    assert counts(prepared) == (3, 0, 0)
    assert widths(prepared, "c0", "c2", "c4") == [(10, 6), (7, 10), (5, 7)]


@pytest.mark.parametrize("act", ["Relu", "Sigmoid", "Tanh", "HardSwish", "Softplus"])
def test_constants_are_folded_into_the_next_bias(act: str) -> None:
    prepared = cleaned(mlp((0, put([2, 3], 0)), (1, put([2, 3], 0.7)), act=act))
    assert counts(prepared) == (0, 2, 0)
    assert widths(prepared, "c0", "c2", "c3") == [(10, 6), (8, 10), (8,)]


def test_a_relu_that_never_fires_is_dead() -> None:
    """Behind a Sigmoid everything lies between 0 and 1."""
    b = Builder(5)
    x = b.add("Sigmoid", b.add("Gemm", "x", b.weight(12, 6), b.weight(12), transB=1))
    x = b.add("Relu", b.add("Gemm", x, b.weight(8, 12), b.weight(8), transB=1))
    y = b.add("MatMul", x, b.weight(8, 5))
    edit(b, "c3", put(slice(None), [-100.0] * 2 + [1.0] * 6))
    prepared = cleaned(b.model({"x": [2, 6]}, {y: [2, 5]}))
    assert counts(prepared) == (2, 0, 0)
    assert widths(prepared, "c2") == [(6, 12)]


def test_equal_rows_are_one_and_their_columns_are_added() -> None:
    rows = (0, same([3, 9], [1, 1])), (1, same([3, 9], [1, 1]))
    prepared = cleaned(mlp(*rows))
    assert counts(prepared) == (0, 0, 2)
    assert widths(prepared, "c0", "c2") == [(10, 6), (8, 10)]
    different = cleaned(mlp(rows[0]))
    assert counts(different) == (0, 0, 0)


def test_equal_channels_that_are_read_at_many_places() -> None:
    """A unit's first place goes to the first place of the one that stands for it, and so on; one
    stands for thousands."""
    b = Builder(12)
    wide = b.weight(4096, 3, 1, 1)
    x = b.add("Relu", b.add("Conv", "x", wide, b.weight(4096)))
    x = b.add("Flatten", x)
    b.add("Gemm", x, b.weight(5, 4096 * 4), b.weight(5), transB=1)
    b.nodes[-1].output[0] = "y"
    for name in ("c0", "c1"):
        edit(b, name, same(range(1, 4096), [0] * 4095))
        edit(b, name, same(range(4000, 4096), [3999] * 96))
    prepared = cleaned(b.model({"x": ["n", 3, 2, 2]}, {"y": ["n", 5]}))
    assert counts(prepared) == (0, 0, 4092)  # whole blocks of four channels stay
    assert widths(prepared, "c0", "c2") == [(4, 3, 1, 1), (5, 16)]


def test_constants_of_several_values_go_into_one() -> None:
    """At zero padding each is a multiple of the one that stays."""
    b = conv_chain(norm=False)
    edit(b, "c0", put(range(20), 0))
    edit(b, "c1", put(range(20), np.linspace(0.1, 2.0, 20)))
    prepared = cleaned(finished(b))
    assert counts(prepared) == (0, 16, 0)


def test_what_is_left_after_the_last_round_is_counted() -> None:
    """Each round finds one layer more: three units of a layer are read by three of the next."""
    b = Builder(13)
    x, depth = "x", 12
    for _ in range(depth):
        x = b.add("Tanh", b.add("Gemm", x, b.weight(8, 8), b.weight(8), transB=1))
    y = b.add("MatMul", x, b.weight(8, 5))
    b.add("Identity", y)
    for layer in range(1, depth):
        edit(b, f"c{2 * layer}", put((slice(3, 8), slice(0, 3)), 0))
    edit(b, f"c{2 * depth}", put(slice(0, 3), 0))
    b.nodes[-1].output[0] = "y"
    prepared = cleaned(b.model({"x": [2, 8]}, {"y": [2, 5]}))
    assert counts(prepared) == (24, 0, 0)
    said = "\n".join(prepared.cleaned.notes)
    assert "3 more units have nothing to do now" in said


def test_a_scale_of_zero_leaves_a_constant_and_relu_may_make_it_zero() -> None:
    b = conv_chain(norm=True)
    edit(b, "c4", put(HALF, 0))
    edit(b, "c3", put(HALF, -0.5))
    assert counts(cleaned(finished(b))) == (16, 0, 0)


def test_constants_at_zero_padding_are_gathered_in_one_channel() -> None:
    b = conv_chain(norm=True)
    edit(b, "c4", put(range(17), 0))
    edit(b, "c3", put(range(17), np.linspace(0.1, 1.0, 17)))
    prepared = cleaned(finished(b))
    assert counts(prepared) == (0, 16, 0)
    assert widths(prepared, "c0") == [(16, 3, 3, 3)]


@pytest.mark.parametrize("kernel", [1, 3])
def test_constants_without_padding_are_folded(kernel: int) -> None:
    b = conv_chain(norm=False, kernel=kernel, pad=0)
    edit(b, "c0", put(HALF, 0))
    edit(b, "c1", put(HALF, 0.25))
    prepared = cleaned(finished(b))
    assert counts(prepared) == (0, 16, 0)
    assert widths(prepared, "c0") == [(16, 3, 3, 3)]


def test_counts_of_convolutions_stay_in_the_blocked_layout() -> None:
    """A channel less than a block's would be slower: dead ones are left in, and said so."""
    b = conv_chain(norm=False)
    edit(b, "c0", put(range(5), 0))
    edit(b, "c1", put(range(5), 0))
    prepared = cleaned(finished(b))
    assert counts(prepared) == (4, 0, 0)
    assert "1 unit that does nothing stays" in prepared.cleaned.notes[-1]


def test_one_unit_of_every_axis_stays() -> None:
    prepared = cleaned(mlp((0, put(slice(None), 0)), (1, put(slice(None), 0))))
    assert widths(prepared, "c0", "c2", "c4") == [(1, 6), (1, 1), (5, 1)]


def test_a_head_whose_values_are_not_read_leaves_with_its_queries_and_keys() -> None:
    model = attention()
    b = Builder()
    b.initializers = list(model.graph.initializer)
    last = model.graph.node[-1].input[1]
    edit(b, last, put(slice(8, 16), 0))
    del model.graph.initializer[:]
    model.graph.initializer.extend(b.initializers)
    prepared = cleaned(model)
    assert counts(prepared) == (1, 0, 0)
    assert [tuple(t.dims) for t in prepared.analysis.model.initializers.values()].count(
        (6, 24)
    ) == 3


def test_nothing_changes_where_nothing_is_idle(chain: onnx.ModelProto) -> None:
    with_it, without = (api.prepare(chain, Scope(lossless=on)) for on in (True, False))
    assert with_it.analysis.model.sha256 == without.analysis.model.sha256
    assert not with_it.cleaned


def test_protected_units_stay() -> None:
    rows = [1, 4, 7]
    model = mlp((0, put(rows, 0)), (1, put(rows, 0)))
    assert counts(cleaned(model, protect=("c0",))) == (0, 0, 0)
    assert counts(cleaned(model, only=("c4",))) == (0, 0, 0)


def test_casts_like_other_types_are_no_duplicates() -> None:
    """What CastLike makes depends on its second input's type: to integers and back is not x."""
    b = Builder(14)
    x = b.add("Gemm", "x", b.weight(16, 6), b.weight(16), transB=1)
    for name in ("c0", "c1"):
        edit(b, name, same(range(8, 16), range(8)))
    halves = b.add("Split", x, b.ints(8, 8), outputs=2, axis=1)
    kinds = b.constant(np.zeros(1, np.int32)), b.constant(np.zeros(1, np.float32))
    parts = [b.add("CastLike", *pair) for pair in zip(halves, kinds, strict=True)]
    parts = [b.add("Cast", part, to=1) for part in parts]
    y = b.add("MatMul", b.add("Concat", *parts, axis=1), b.weight(16, 5))
    prepared = cleaned(b.model({"x": [2, 6]}, {y: [2, 5]}))
    assert counts(prepared) == (0, 0, 0)
