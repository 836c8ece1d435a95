"""Torch-Pruning on the models of the accuracy table: two operators more than the other benchmark.

    python -m tools.accuracy.run_torch_pruning IN.onnx OUT.onnx [--target-macs 0.5]

Run from the repository with the peers' own Python; see tools/peers/run_torch_pruning.py.
"""

from torch import Tensor
from torch.nn import functional

from tools.peers import run_torch_pruning
from tools.peers.torch_operators import FUNCTIONS, Attributes, ints


def pad(a: Attributes, x: Tensor, amounts: Tensor, value: Tensor | None = None) -> Tensor:
    """ONNX lists all starts, then all ends; torch pairs, the last axis first."""
    sizes = ints(amounts)
    pairs = list(zip(sizes[: x.ndim], sizes[x.ndim :], strict=True))
    while pairs and pairs[0] == (0, 0):  # channels that come and go cannot be named in a pad
        pairs.pop(0)
    fill = 0.0 if value is None else float(value)
    return functional.pad(x, [n for pair in reversed(pairs) for n in pair], value=fill)


def strided_slice(
    a: Attributes, x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor, steps: Tensor
) -> Tensor:
    index = [slice(None)] * x.ndim
    for axis, *bounds in zip(*map(ints, (axes, starts, ends, steps)), strict=True):
        index[axis] = slice(*bounds)
    return x[tuple(index)]


if __name__ == "__main__":
    plain = FUNCTIONS["Slice"]
    FUNCTIONS["Pad"] = pad
    FUNCTIONS["Slice"] = lambda a, *xs: (strided_slice if len(xs) == 5 else plain)(a, *xs)
    run_torch_pruning.main()
