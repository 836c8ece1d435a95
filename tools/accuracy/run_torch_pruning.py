"""Torch-Pruning on the models of the accuracy table.

    python -m tools.accuracy.run_torch_pruning IN.onnx OUT.onnx [--target-macs 0.5]

Run from the repository with the peers' own Python. As tools/peers/run_torch_pruning.py, with two
operators more and a second way: where it fails on the whole network, the layers that write to a
residual stream are left alone, as a user would who meets a padded shortcut. Prints one JSON
document: `way` is what worked, `failed` what did not, with the reason.
"""

import argparse
import copy
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import torch
import torch_pruning as tp
from torch import Tensor
from torch.nn import functional

from tools.peers.onnx_to_torch import OnnxModule
from tools.peers.run_torch_pruning import SLACK, TRIES, count_macs, example_inputs, export
from tools.peers.search import bisect_ratio, emit, reason
from tools.peers.torch_operators import FUNCTIONS, Attributes, ints

STREAM = ("Add", "Pad", "Slice")  # what a residual stream goes through
PASSED = ("BatchNormalization", "Relu", "Clip")  # what lies between a layer and the stream


def pad(a: Attributes, x: Tensor, amounts: Tensor, value: Tensor | None = None) -> Tensor:
    """ONNX lists all starts, then all ends; torch pairs, the last axis first."""
    sizes = ints(amounts)
    pairs = list(zip(sizes[: x.ndim], sizes[x.ndim :], strict=True))
    while pairs and pairs[0] == (0, 0):
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


def add_operators() -> None:
    """Pad, and Slice with steps, in the converter's table."""
    plain = FUNCTIONS["Slice"]
    FUNCTIONS["Pad"] = pad
    FUNCTIONS["Slice"] = lambda a, *xs: (strided_slice if len(xs) == 5 else plain)(a, *xs)


def stream_layers(model: onnx.ModelProto, module: OnnxModule) -> list[str]:
    """Names of the layers whose output goes into a residual stream."""
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)

    def reaches(tensor: str) -> bool:
        return any(
            user.op_type in STREAM or (user.op_type in PASSED and reaches(user.output[0]))
            for user in users.get(tensor, [])
        )

    layers = [step for step in module.steps if isinstance(step.run, str)]
    return [str(step.run) for step in layers if reaches(step.outputs[0])]


def prune(
    module: OnnxModule, inputs: tuple[Tensor, ...], ratio: float, ignored: list[str]
) -> OnnxModule:
    """A copy that lost `ratio` of the channels of every group without an ignored layer."""
    pruned = copy.deepcopy(module)
    pruner = tp.pruner.MagnitudePruner(
        pruned,
        inputs,
        importance=tp.importance.MagnitudeImportance(p=1),
        global_pruning=False,
        pruning_ratio=ratio,
        ignored_layers=[pruned.get_submodule(name) for name in ignored],
        num_heads={pruned.get_submodule(name): n for name, n in pruned.heads.items()},
        in_channel_groups={},  # the defaults are shared between calls and would keep every copy
        out_channel_groups={},
    )
    pruner.step()
    return pruned


def search(
    module: OnnxModule, inputs: tuple[Tensor, ...], share: float, ignored: list[str], target: Path
) -> dict[str, Any]:
    """One way: bisect the ratio, export the best result."""
    dense = count_macs(module, inputs)

    def attempt(ratio: float) -> tuple[int, OnnxModule]:
        pruned = prune(module, inputs, ratio, ignored)
        return count_macs(pruned, inputs), pruned

    found = bisect_ratio(attempt, share * dense, TRIES, SLACK * dense)
    if found.macs > share * dense:
        raise ValueError(f"target not reached: {found.macs / dense:.1%} of the MACs left at best")
    export(found.result, inputs, target)
    return {"seconds": found.seconds, "tries": found.tries, "ratio": found.ratio}


def run(source: Path, target: Path, share: float) -> dict[str, Any]:
    model = onnx.load(source)
    module = OnnxModule(model).eval()
    inputs = example_inputs(model)
    stream = [*stream_layers(model, module), module.last]
    failed: dict[str, str] = {}
    for way, ignored in (("whole", [module.last]), ("without the residual streams", stream)):
        try:
            return {"way": way, "failed": failed} | search(module, inputs, share, ignored, target)
        except Exception as error:  # whatever the peer raises is its result
            failed[way] = reason(error)
    return {"failed": failed, "error": "; ".join(f"{way}: {why}" for way, why in failed.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--target-macs", type=float, default=0.5, dest="share")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    add_operators()
    versions = {name: version(name) for name in ("torch", "torch-pruning")}
    try:
        emit(versions | run(arguments.source, arguments.target, arguments.share))
    except Exception as error:  # a model the converter cannot read
        emit(versions | {"error": reason(error)})


if __name__ == "__main__":
    main()
