"""The blocked layout: counts that stay in it, by hand and by what ONNX Runtime makes of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest
from graphs import Builder

from graphprune import api
from graphprune.layout import Blocks, blocks
from graphprune.targets import Target, builtin, choose, detect

AVX512 = builtin()["cpu-avx512"]
Block = Callable[[Builder, str, int], tuple[str, int]]  # tensor, channels → the same after it


def network(block: Block, width: int = 64) -> onnx.ModelProto:
    """Conv → block → Conv on [1, 3, 8, 8]."""
    b = Builder(1)
    y, channels = block(b, b.add("Relu", b.conv("x", 3, width)), width)
    y = b.conv(y, channels, 32, 1)
    return b.model({"x": [1, 3, 8, 8]}, {y: [1, 32, 8, 8]})


def pool(b: Builder, x: str, c: int) -> tuple[str, int]:
    return b.add("MaxPool", x, kernel_shape=[3, 3], pads=[1] * 4), c


def norm(b: Builder, x: str, c: int) -> tuple[str, int]:
    return b.add("Relu", b.norm(pool(b, x, c)[0], c)), c


def concat(b: Builder, x: str, c: int) -> tuple[str, int]:
    return b.add("Concat", x, b.conv(x, c, 32), axis=1), c + 32


def dense(b: Builder, x: str, c: int) -> tuple[str, int]:
    """Concatenations of concatenations, each normalised before it is read."""
    for _ in range(3):
        y = b.add("Relu", b.norm(x, c))
        x, c = b.add("Concat", x, b.conv(y, c, 32), axis=1), c + 32
    return b.add("Relu", b.norm(x, c)), c


def depthwise(b: Builder, x: str, c: int) -> tuple[str, int]:
    return b.add("Relu", b.conv(x, c, c, 3, group=c)), c


def grouped(b: Builder, x: str, c: int) -> tuple[str, int]:
    return b.conv(x, c, c, 3, group=2), c


def residual(b: Builder, x: str, c: int) -> tuple[str, int]:
    return b.add("Relu", b.add("Add", x, b.conv(b.conv(x, c, 32), 32, c))), c


def plain(b: Builder, x: str, c: int) -> tuple[str, int]:
    return x, c


BLOCKS = [plain, pool, norm, concat, dense, depthwise, grouped, residual]


def found(model: onnx.ModelProto, target: Target = AVX512) -> list[Blocks | None]:
    analysis = api.prepare(model).analysis
    whole = blocks(analysis, target)
    return [whole.get(group.index) for group in analysis.coupling.groups]


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (plain, [Blocks(1, 16)]),
        (depthwise, [Blocks(1, 16)]),
        (residual, [Blocks(1, 16), Blocks(1, 16)]),
        (pool, [Blocks(16, 16)]),
        (norm, [Blocks(16, 16)]),
        (concat, [Blocks(16, 16), Blocks(16, 16)]),
        (grouped, [Blocks(16, 16), Blocks(16, 16)]),  # units: a channel of each of the two groups
    ],
)
def test_by_hand(block: Block, expected: list[Blocks]) -> None:
    assert found(network(block)) == expected


def test_what_is_outside_may_stay_there() -> None:
    """40 channels are no whole blocks, 12 not even one."""
    assert found(network(pool, 40)) == [Blocks(1, 16)]  # the last convolution's
    assert found(network(plain, 12)) == [None]


def test_layers_narrower_than_two_blocks_give_what_they_have() -> None:
    assert found(network(plain, 16)) == [None]
    assert found(network(plain, 24)) == [None]
    assert found(network(plain, 32)) == [Blocks(1, 16)]


def test_a_target_without_blocks_asks_for_nothing() -> None:
    assert found(network(dense), builtin()["generic"]) == [None] * 4
    assert choose(builtin(), "cpu-avx512", round_to=4).block == 1


def test_a_budget_out_of_reach_of_whole_blocks_goes_below_and_says_so() -> None:
    result = api.prune(
        network(plain, 32), flops=0.3, fast=True, hardware="cpu-avx512", measure=False
    )
    assert result.after.macs <= 0.3 * result.before.macs
    assert any("multiples of less" in note for note in result.notes)


def runtime_operators(model: onnx.ModelProto, path: Path) -> Counter[str]:
    """What ONNX Runtime makes of it."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(path)
    ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.mark.skipif(builtin()[detect()].block == 1, reason="no blocked layout on this processor")
@pytest.mark.parametrize("share", [0.9, 0.7, 0.5, 0.3])
@pytest.mark.parametrize("block", BLOCKS)
def test_no_layout_is_left(block: Block, share: float, tmp_path: Path) -> None:
    """On this machine's own grid: no copies into another layout that were not there before, no
    fusion lost. Where the grid had to be made finer the result says so, and may have them."""
    model = network(block)
    result = api.prune(model, flops=share, fast=True, repair="none", measure=False)
    if any("multiples of less" in note for note in result.notes):
        return
    before, after = (runtime_operators(m, tmp_path / "o.onnx") for m in (model, result.model))
    assert after == before


def test_a_norm_that_a_convolution_takes_in_may_have_any_count() -> None:
    """Conv → BatchNormalization is one kernel to the runtime; after a sum it is one of its own."""
    steps = []
    for fused in (True, False):
        b = Builder(2)
        x = b.add("Relu", b.conv("x", 3, 32))
        x = b.norm(b.conv(x, 32, 32) if fused else b.add("Add", x, b.conv(x, 32, 32)), 32)
        y = b.conv(b.add("Relu", x), 32, 3)
        analysis = api.prepare(b.model({"x": [1, 3, 8, 8]}, {y: [1, 3, 8, 8]})).analysis
        found = blocks(analysis, builtin()["cpu-avx512"])
        steps.append(max((entry.step for entry in found.values()), default=1))
    assert steps == [1, 16]
