"""What activations that wait take: memory, then disk, and both let go of them."""

from __future__ import annotations

import gc
import resource
from pathlib import Path

import numpy as np
import pytest
from frontier_forms import draw, names_of, opened, parsed, walk
from graphs import Builder, random_cnn

from graphprune.linear import linears
from graphprune.storage import load


def on_disk(value: object) -> bool:
    return isinstance(value, Path)


@pytest.mark.parametrize("memory", [0, 300, 1e9])
def test_spilling_to_disk_changes_nothing(memory: float) -> None:
    model = load(random_cnn(2))
    feeds = [{"x": draw(2, 3, 4, 4, seed=k)} for k in range(3)]
    names = [n for n in names_of(model) if n not in model.constant_names]
    moving = walk(model, feeds, names, memory=memory)
    assert all(on_disk(a) for a in moving[names[-1]].values) or memory
    assert not any(on_disk(a) for a in moving[names[-1]].values) or memory < 1e9


def test_no_more_than_the_memory_is_held() -> None:
    """Branches of one segment count too, though none of them is held yet while it runs."""
    b = Builder()
    ends = {b.add("MatMul", b.add("Relu", "x"), b.weight(64, 64)): [8, 64] for _ in range(10)}
    model = load(b.model({"x": [8, 64]}, ends))
    feeds = [{"x": draw(8, 64, seed=k)} for k in range(4)]
    one = 4 * feeds[0]["x"].nbytes
    moving = opened(model, feeds, memory=4 * one)
    moving.advance(list(ends))
    ended = [chunks.values for name, chunks in moving.held.items() if name != "x"]
    resident = [a for values in ended for a in values if not on_disk(a)]
    assert sum(a.nbytes for a in resident) <= 4 * one


def test_what_is_let_go_leaves_the_disk() -> None:
    """Disk space, like memory, is for the frontier, not for all the activations there were."""
    b = Builder()
    y = "x"
    for _ in range(8):
        y = b.add("Relu", b.add("MatMul", y, b.weight(64, 64)))
    model = load(b.model({"x": [8, 64]}, {y: [8, 64]}))
    moving = opened(model, [{"x": draw(8, 64)}], memory=0)
    for linear in linears(model):
        moving.advance([linear.x])
    gc.collect()
    assert moving._folder is not None
    assert len(list(Path(moving._folder.name).iterdir())) <= 2


def test_many_chunks_on_disk_need_few_open_files() -> None:
    """A model of fixed batch 1 has as many chunks as samples."""
    b = Builder()
    y = "x"
    for _ in range(3):
        y = b.add("Relu", b.add("MatMul", y, b.weight(4, 4)))
    model = load(b.model({"x": [1, 4]}, {y: [1, 4]}))
    moving = opened(model, [{"x": draw(1, 4, seed=k)} for k in range(40)], memory=0)
    before = len(list(Path("/proc/self/fd").iterdir()))
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before + 24, limit[1]))
    try:
        moving.advance([y])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert len(moving[y]) == 40


def test_scalars_and_empty_tensors_spill_too() -> None:
    text = """(float[3, 4] x) => (float[3, 4] y, int64 n, float[0, 4] e, bool[3, 4] m) {
        two = Constant <value = int64[2] {0, 4}> ()
        n = Size(x)
        f = Cast <to = 1> (n)
        y = Div(x, f)
        empty = Slice(y, zero, zero)
        e = Relu(empty)
        m = Greater(y, f)
    }"""
    model = parsed(text, zero=np.zeros(1, np.int64))
    walk(model, [{"x": draw(3, 4)}, {"x": draw(3, 4, seed=1)}], ["n", "f", "y", "e", "m"], memory=0)
