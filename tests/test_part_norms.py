"""Additions and normalisations that stay apart where the fused kernel is slower."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from graphprune import api
from graphprune.errors import UsageError
from graphprune.pipeline import Context
from graphprune.storage import load
from graphprune_passes.part_norms import PartNorms

Run = Callable[..., Any]
FUSED = "SkipLayerNormalization"
TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[1,6,32] x) => (float[1,6,32] y)
  <float[32,64] w, float[64,32] v, float[32] s, float[32] b> {
  h = MatMul(x, w)
  r = Relu(h)
  m = MatMul(r, v)
  a = Add(m, x)
  y = LayerNormalization(a, s, b)
}"""


def network(text: str = TEXT) -> onnx.ModelProto:
    model = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    for info in model.graph.value_info:
        shape = [d.dim_value for d in info.type.tensor_type.shape.dim]
        values = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, info.name))
    del model.graph.value_info[:]
    return model


def fused(model: onnx.ModelProto, tmp_path: Path) -> set[str]:
    """Operators of the graph that ONNX Runtime makes of the model."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return {node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node}


def outputs(model: onnx.ModelProto) -> np.ndarray:
    runner = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).standard_normal((1, 6, 32)).astype(np.float32)
    return np.asarray(runner.run(None, {"x": x})[0])


def test_two_kernels_and_the_same_outputs(tmp_path: Path) -> None:
    before = network()
    done = PartNorms().run(load(before), Context())
    after = done.model.assemble()
    onnx.checker.check_model(after, full_check=True)
    assert [change.node for change in done.changes] == ["y"]
    np.testing.assert_allclose(outputs(before), outputs(after), rtol=1e-5, atol=1e-5)
    assert FUSED in fused(before, tmp_path)  # else there is nothing to keep apart
    assert FUSED not in fused(after, tmp_path)
    assert not PartNorms().run(done.model, Context()).modified


@pytest.mark.parametrize(
    "text",
    [
        TEXT.replace("LayerNormalization(", "LayerNormalization<axis=1>("),
        TEXT.replace("a = Add(m, x)", "a = Sub(m, x)"),
    ],
)
def test_others_stay(text: str) -> None:
    assert not PartNorms().run(load(network(text)), Context()).modified


def test_the_target_decides_and_the_plan_says_so(run: Run, tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    onnx.save(network(), model)
    common = ("--target-flops", 0.5, "--fast", "--no-measure", "--round-to", 1)
    for hardware, kept_apart in (("cpu-avx2", True), ("generic", False)):
        out, plan, again = (
            tmp_path / f"{hardware}.{end}" for end in ("onnx", "json", "again.onnx")
        )
        arguments = ("--target-hardware", hardware, "-o", out, "--plan-out", plan)
        assert run(model, *common, *arguments).code == 0
        operators = {node.op_type for node in onnx.load(out).graph.node}
        assert ("Unsqueeze" in operators) == kept_apart
        assert run("apply", model, plan, "-o", again, "--no-measure").code == 0
        assert again.read_bytes() == out.read_bytes()


def test_the_proof_covers_it() -> None:
    result = api.prune(network(), flops=0.5, fast=True, hardware="cpu-avx2", round_to=1)
    assert result.verdict.passed
    assert any(change.pass_name == "part_norms" for change in result.changes)


@pytest.mark.parametrize("said", [[-1], [[]], 3, {"SkipLayerNormalization": 1}])
def test_a_plan_that_names_other_fusions(said: object) -> None:
    with pytest.raises(UsageError, match="slow_fusions"):
        api.prepare(network()).apart(said)
