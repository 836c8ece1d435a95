"""Other precisions and storages: half, few bits, sparse, behind a cast."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from graphs import Builder
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.transformers.float16 import convert_float_to_float16
from quantised_forms import by_weights, convolutional

from graphprune.api import prune
from graphprune.errors import ModelError


def test_half_precision() -> None:
    """float16 throughout, with float32 outside, and by default options."""
    for keep in (True, False):
        model = convert_float_to_float16(convolutional(), keep_io_types=keep)
        assert by_weights(model).verdict.passed
    result = prune(model, flops=0.5, samples=16, measure=False, cache=False)
    assert result.verdict.passed
    assert {t.data_type for t in result.model.graph.initializer} <= {10, 7}


def with_stored(model: onnx.ModelProto, kind: int) -> onnx.ModelProto:
    """Weights of another type behind a Cast."""
    casts = []
    for tensor in [t for t in model.graph.initializer if len(t.dims) > 1]:
        value = numpy_helper.to_array(tensor).astype(helper.tensor_dtype_to_np_dtype(kind))
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(value, f"{name}_stored"))
        casts.append(helper.make_node("Cast", [tensor.name], [name], to=1))
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*casts, *nodes])
    return model


def test_weights_behind_a_cast() -> None:
    """bfloat16 weights, arithmetic in float32: what is stored keeps its type."""
    result = by_weights(with_stored(convolutional(), TensorProto.BFLOAT16))
    assert result.verdict.passed
    assert TensorProto.BFLOAT16 in {t.data_type for t in result.model.graph.initializer}


@pytest.mark.parametrize("kind", ["INT4", "UINT4", "FLOAT8E4M3FN", "INT16"])
def test_few_bits(kind: str) -> None:
    """Weights with a scale for each column are sliced and packed again, in their type."""
    b = Builder(3, opset=21)
    x = "x"
    for rows, columns in ((6, 16), (16, 6)):
        values = b.rng.integers(0, 8, (rows, columns)) / (2 if "FLOAT" in kind else 1)
        dtype = helper.tensor_dtype_to_np_dtype(getattr(TensorProto, kind))
        integers = numpy_helper.from_array(values.astype(dtype), f"w{rows}")
        b.initializers.append(integers)
        scale = b.constant(np.full(columns, 0.1, np.float32))
        x = b.add("MatMul", x, b.add("DequantizeLinear", integers.name, scale, axis=1))
    model = b.model({"x": [4, 6]}, {x: [4, 6]}, ir_version=10)
    result = by_weights(model)
    assert result.verdict.passed
    first = next(t for t in result.model.graph.initializer if t.name == "w6")
    assert (list(first.dims), first.data_type) == ([6, 8], getattr(TensorProto, kind))


def test_sparse_weights_become_dense() -> None:
    """Flat positions and coordinates; the report says so."""
    model = convolutional()
    for number, tensor in enumerate([t for t in model.graph.initializer if len(t.dims) == 4][:2]):
        value = numpy_helper.to_array(tensor)
        value = np.where(np.abs(value) > np.median(np.abs(value)), value, 0)
        places = np.flatnonzero(value)
        if number:
            places = np.argwhere(value)
        values = numpy_helper.from_array(value[value != 0], tensor.name)
        indices = numpy_helper.from_array(places.astype(np.int64), f"{tensor.name}_at")
        sparse = helper.make_sparse_tensor(values, indices, list(tensor.dims))
        model.graph.sparse_initializer.append(sparse)
        model.graph.initializer.remove(tensor)
    result = by_weights(model)
    assert result.verdict.passed
    assert not result.model.graph.sparse_initializer
    assert any("sparse" in note for note in result.notes)


def test_bfloat16_throughout() -> None:
    """ONNX Runtime has no kernels for it: an honest error, or a cut that nothing has verified."""
    b = Builder(3, opset=22)
    y = b.add("MatMul", b.add("Relu", b.add("MatMul", "x", b.weight(6, 16))), b.weight(16, 4))
    model = b.model({"x": [3, 6]}, {y: [3, 4]}, ir_version=10)
    for tensor in model.graph.initializer:
        value = numpy_helper.to_array(tensor).astype(helper.tensor_dtype_to_np_dtype(16))
        tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.BFLOAT16
    with pytest.raises(ModelError, match="ONNX Runtime"):
        by_weights(model)
    result = by_weights(model, verify=False)
    assert [(t.data_type, list(t.dims)) for t in result.model.graph.initializer] == [
        (TensorProto.BFLOAT16, [6, 8]),
        (TensorProto.BFLOAT16, [8, 4]),
    ]
