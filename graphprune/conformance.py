"""Hold the rules against ONNX's own one-operator models (``onnx.backend.test``, kind ``node``)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from graphprune.check import LawBrokenError, check_rule, constants_from
from graphprune.errors import ModelError
from graphprune.model import Array, Model
from graphprune.runtime import Feeds


@dataclass(frozen=True)
class CaseResult:
    """One backend test: passed, pinned (why), or failed (how)."""

    case: str
    operator: str
    state: str
    detail: str = ""


def run_case(case: Any) -> CaseResult:
    """Try removals on the case's model with the case's data (law 3).

    Where ONNX Runtime lacks the operator or its opset, ONNX's reference evaluator takes its place.
    """
    nodes = case.model.graph.node
    operator = nodes[0].op_type if len(nodes) == 1 else "(expanded)"
    raw = [_array(value) for value in case.data_sets[0][0]]
    if any(not isinstance(value, np.ndarray) for value in raw):
        return CaseResult(case.name, operator, "pinned", "sequences and optionals are no tensors")
    model, feeds = constants_from(case.model, raw)
    try:
        checked = _check(model, feeds)
    except LawBrokenError as error:
        return CaseResult(case.name, operator, "failed", str(error))
    except ModelError as error:
        return CaseResult(case.name, operator, "pinned", error.what)
    state = "passed" if checked.passed else "pinned"
    return CaseResult(case.name, operator, state, checked.pinned.partition(" (node")[0])


def run_text(name: str, model: onnx.ModelProto) -> CaseResult:
    """As ``run_case``, on random inputs, for the last node of a model, which only ONNX Runtime
    may know."""
    node = model.graph.node[-1]
    operator = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    try:
        checked = check_rule(model)
    except LawBrokenError as error:
        return CaseResult(name, operator, "failed", str(error))
    except ModelError as error:
        return CaseResult(name, operator, "pinned", error.what)
    state = "passed" if checked.passed else "pinned"
    return CaseResult(name, operator, state, checked.pinned.partition(" (node")[0])


def _check(model: onnx.ModelProto, feeds: Feeds) -> Any:
    try:
        return check_rule(model, feeds)
    except ModelError:
        return check_rule(model, feeds, open_model=_reference)


def _reference(model: Model) -> Callable[[Feeds], list[Array]]:
    evaluator = ReferenceEvaluator(model.assemble())
    return lambda feeds: [np.asarray(v) for v in evaluator.run(None, dict(feeds))]


def _array(value: Any) -> Any:
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    return np.asarray(value) if isinstance(value, np.generic) else value
