"""Real architectures: half of the MACs, verified; residual streams, growth channels and heads."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from graphprune.api import plan as make_plan
from graphprune.api import prepare, prune
from graphprune.options import Options
from graphprune.relations import Role

SHARED = Path(__file__).parents[2] / "shared"
LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
ARCHITECTURES = sorted((SHARED / "models" / "architectures").glob("*.onnx"))
TRAINED = sorted((SHARED / "models").glob("*.onnx"))
WEIGHTS: dict[str, Any] = {"criterion": "l1", "repair": "none"}

needs_shared = pytest.mark.skipif(not ARCHITECTURES, reason="the shared models are not here")


def filled(path: Path) -> onnx.ModelProto:
    """A weightless architecture with seeded weights."""
    spec = importlib.util.spec_from_file_location("fill", SHARED / "tools" / "materialise.py")
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules["fill"] = module
    spec.loader.exec_module(module)
    return module.materialise(onnx.load(path))


@pytest.mark.shared
@needs_shared
@pytest.mark.parametrize("path", [*ARCHITECTURES, *TRAINED], ids=lambda path: path.stem)
def test_half_of_the_macs(path: Path) -> None:
    model = filled(path) if path in ARCHITECTURES else onnx.load(path)
    result = prune(model, flops=0.5, allow_miss=True, measure=False, **WEIGHTS)
    assert result.verdict.relative_error is not None
    assert result.verdict.relative_error <= 1e-4
    assert 0.48 <= result.after.macs / result.before.macs <= 0.5


@pytest.mark.parametrize("path", sorted(LIGHT.glob("*.onnx")), ids=lambda path: path.stem)
def test_light_models(path: Path) -> None:
    result = prune(path, flops=0.5, measure=False, **WEIGHTS)
    assert 0.48 <= result.after.macs / result.before.macs <= 0.5
    assert result.verdict.passed


def shrunk(name: str) -> list[tuple[int, int, int]]:
    """(producers, consumers, widest slots per unit on one axis) of every group that lost units."""
    prepared = prepare(filled(SHARED / "models" / "architectures" / f"{name}.onnx"))
    coupling = prepared.analysis.coupling
    planned, _ = make_plan(prepared, Options(flops=0.5, **WEIGHTS))
    rows = []
    for group, entry in zip(coupling.groups, planned.groups, strict=True):
        if not entry.removed:
            continue
        axes = [coupling.relations.slots.tensors[t][i] for t, i in group.signature]
        roles = [int(np.bincount(coupling.role[a.slots]).argmax()) for a in axes]
        width = max(int((coupling.unit_of(a.slots) == group.units[0]).sum()) for a in axes)
        rows.append((roles.count(Role.PRODUCER), roles.count(Role.CONSUMER), width))
    return rows


@pytest.mark.shared
@needs_shared
@pytest.mark.parametrize("name", ["resnet18_ts", "resnet50"])
def test_residual_streams_shrink(name: str) -> None:
    assert sum(producers >= 3 for producers, _, _ in shrunk(name)) >= 3


@pytest.mark.shared
@needs_shared
def test_growth_channels_shrink() -> None:
    assert sum(consumers >= 5 for _, consumers, _ in shrunk("densenet121")) >= 10


@pytest.mark.shared
@needs_shared
@pytest.mark.parametrize(
    ("name", "layers", "head"),
    [
        ("vit_b16_ts", 12, 64),
        ("bert_base", 12, 64),
        ("bert_base_ts", 12, 64),
        ("gpt2_small", 4, 96),
    ],
)
def test_heads_and_feed_forward_shrink(name: str, layers: int, head: int) -> None:
    """A head takes ``head`` slots of one axis (packed projections: three times its width)."""
    widths = [width for _, _, width in shrunk(name)]
    assert sum(width >= min(head, 64) for width in widths) >= layers // 2
    assert sum(width == 1 for width in widths) >= layers // 2


@pytest.mark.parametrize("opset", [*range(7, 14), 15, 18, 21, 24])
def test_every_opset(opset: int) -> None:
    """The shipped model as older exporters wrote it, up to the newest operator set."""
    model = onnx.load(Path(__file__).parents[1] / "models" / "fashion_resnet.onnx")
    model.opset_import[0].version = opset
    model.ir_version = 3 if opset < 9 else 8 if opset < 24 else 12
    for node in model.graph.node:
        for attribute in [a for a in node.attribute if a.name == "training_mode" and opset < 14]:
            node.attribute.remove(attribute)
    if model.ir_version < 4:  # initialisers were inputs then
        for tensor in model.graph.initializer:
            declared = onnx.helper.make_tensor_value_info(
                tensor.name, tensor.data_type, tensor.dims
            )
            model.graph.input.append(declared)
    result = prune(model, flops=0.5, measure=False, **WEIGHTS)
    onnx.checker.check_model(result.model, full_check=True)
    assert result.verdict.passed
    assert len(result.model.graph.input) == len(model.graph.input)
