"""Every rule against all one-operator models of ``onnx.backend.test``; no case may fail."""

from __future__ import annotations

import pytest
from onnx.backend.test.loader import load_model_tests

from graphprune.conformance import run_case

CASES = {case.name: case for case in load_model_tests(kind="node")}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("start", range(0, len(CASES), 100))
def test_backend_models(start: int) -> None:
    results = [run_case(case) for case in list(CASES.values())[start : start + 100]]
    assert [r for r in results if r.state == "failed"] == []


@pytest.mark.filterwarnings("ignore")
def test_a_plain_case_passes() -> None:
    assert run_case(CASES["test_add_bcast"]).state == "passed"
    assert run_case(CASES["test_softmax_axis_1"]).state == "passed"
    assert run_case(CASES["test_det_2d"]).state == "pinned"
