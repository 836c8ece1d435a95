"""ONNX operators in torch, in two flat tables: the layers, and the functions.

A layer is made of the attributes and the constant inputs of its node; a function is called with the
attributes and all inputs. Only what the benchmark's models use is here.
"""

from collections.abc import Callable
from typing import Any

import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn
from torch.nn import functional

Attributes = dict[str, Any]

TYPES = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
    TensorProto.BOOL: torch.bool,
}


def with_values(layer: nn.Module, **values: Tensor | None) -> nn.Module:
    """`layer` with its parameters and statistics replaced."""
    layer.load_state_dict({k: v for k, v in values.items() if v is not None}, strict=False)
    return layer


def symmetric(attributes: Attributes) -> list[int]:
    """The pads of a convolution or pooling, if both sides of each axis agree."""
    pads = attributes.get("pads", [0, 0, 0, 0])
    if pads[:2] != pads[2:]:
        raise NotImplementedError(f"pads {pads}")
    return list(pads[:2])


# --- layers -------------------------------------------------------------------------------------


def conv(a: Attributes, weight: Tensor, bias: Tensor | None = None) -> nn.Module:
    group = a.get("group", 1)
    layer = nn.Conv2d(
        weight.shape[1] * group,
        weight.shape[0],
        tuple(weight.shape[2:]),
        stride=a.get("strides", [1, 1]),
        padding=symmetric(a),
        dilation=a.get("dilations", [1, 1]),
        groups=group,
        bias=bias is not None,
    )
    return with_values(layer, weight=weight, bias=bias)


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Module:
    """A Linear from a weight [out, in]."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    return with_values(layer, weight=weight, bias=bias)


def batch_norm(a: Attributes, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> nn.Module:
    layer = nn.BatchNorm2d(len(scale), eps=a.get("epsilon", 1e-5))
    return with_values(layer, weight=scale, bias=bias, running_mean=mean, running_var=var)


def layer_norm(a: Attributes, scale: Tensor, bias: Tensor) -> nn.Module:
    layer = nn.LayerNorm(scale.shape, eps=a.get("epsilon", 1e-5))
    return with_values(layer, weight=scale, bias=bias)


LAYERS: dict[str, Callable[..., nn.Module]] = {
    "Conv": conv,
    "Gemm": lambda a, w, b=None: linear(w if a.get("transB", 0) else w.T, b),
    "MatMul": lambda a, w, b=None: linear(w.T, b),
    "BatchNormalization": batch_norm,
    "LayerNormalization": layer_norm,
}

# --- functions ----------------------------------------------------------------------------------


def ints(values: Tensor) -> list[int]:
    return [int(v) for v in values.flatten().tolist()]


def max_pool(a: Attributes, x: Tensor) -> Tensor:
    ceil = bool(a.get("ceil_mode", 0))
    return functional.max_pool2d(x, a["kernel_shape"], a["strides"], symmetric(a), ceil_mode=ceil)


def average_pool(a: Attributes, x: Tensor) -> Tensor:
    ceil, padded = bool(a.get("ceil_mode", 0)), bool(a.get("count_include_pad", 0))
    return functional.avg_pool2d(x, a["kernel_shape"], a["strides"], symmetric(a), ceil, padded)


def gather(a: Attributes, x: Tensor, index: Tensor) -> Tensor:
    axis = a.get("axis", 0)
    if index.ndim == 0:
        return x.select(axis, int(index))
    picked = x.index_select(axis, index.flatten())
    return picked.reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])


def slice_(
    a: Attributes, x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor | None = None
) -> Tensor:
    for axis, start, end in zip(
        range(len(starts)) if axes is None else ints(axes), ints(starts), ints(ends), strict=True
    ):
        x = x[(slice(None),) * axis + (slice(start, end),)]
    return x


def reshape(a: Attributes, x: Tensor, shape: Tensor) -> Tensor:
    return x.reshape([x.shape[i] if n == 0 else n for i, n in enumerate(ints(shape))])


def expand(a: Attributes, x: Tensor, shape: Tensor) -> Tensor:
    return x.expand(torch.broadcast_shapes(tuple(int(n) for n in x.shape), tuple(ints(shape))))


def constant_of_shape(a: Attributes, shape: Tensor) -> Tensor:
    value = torch.tensor(numpy_helper.to_array(a["value"])) if "value" in a else torch.zeros(1)
    return value.reshape(()).expand(ints(shape)).clone()


def flatten(a: Attributes, x: Tensor) -> Tensor:
    axis = a.get("axis", 1)
    return x.flatten(1) if axis == 1 else x.reshape(int(torch.tensor(x.shape[:axis]).prod()), -1)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    # elementwise
    "Add": lambda a, x, y: x + y,
    "Mul": lambda a, x, y: x * y,
    "Div": lambda a, x, y: x / y,
    "Equal": lambda a, x, y: x == y,
    "GreaterOrEqual": lambda a, x, y: x >= y,
    "And": lambda a, x, y: x & y,
    "Where": lambda a, c, x, y: torch.where(c, x, y),
    "Identity": lambda a, x: x,
    "Cast": lambda a, x: x.to(TYPES[a["to"]]),
    "Clip": lambda a, x, low, high: torch.clamp(x, float(low), float(high)),
    "Relu": lambda a, x: functional.relu(x),
    "Erf": lambda a, x: torch.erf(x),
    "Sqrt": lambda a, x: torch.sqrt(x),
    # reductions
    "MatMul": lambda a, x, y: x @ y,
    "Softmax": lambda a, x: functional.softmax(x, a.get("axis", -1)),
    "MaxPool": max_pool,
    "AveragePool": average_pool,
    "GlobalAveragePool": lambda a, x: functional.adaptive_avg_pool2d(x, 1),
    # movement
    "Concat": lambda a, *xs: torch.cat(xs, a["axis"]),
    "Flatten": flatten,
    "Reshape": reshape,
    "Transpose": lambda a, x: x.permute(a["perm"]),
    "Squeeze": lambda a, x, axes: x.squeeze(ints(axes)),
    "Expand": expand,
    "Gather": gather,
    "Slice": slice_,
    # shapes
    "Shape": lambda a, x: torch.tensor([int(n) for n in x.shape]),
    "ConstantOfShape": constant_of_shape,
}
