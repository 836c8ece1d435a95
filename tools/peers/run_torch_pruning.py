"""Prune one ONNX model with Torch-Pruning, down to a share of its MACs.

    python -m tools.peers.run_torch_pruning IN.onnx OUT.onnx [--target-macs 0.5] [--round-to 8]

Run from the repository with the peers' own Python. Prints one JSON document: `seconds` is the
search (every try: copy the module, build the dependency graph, prune, count), `export_seconds` the
writing of the ONNX file, `error` the reason if it failed. L1 magnitude, one uniform ratio;
attention loses head dimensions (Torch-Pruning's default); the layer that makes the output is left
alone, so that the interface of the model stays.
"""

import argparse
import copy
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import torch
import torch_pruning as tp
from torch.utils.flop_counter import FlopCounterMode

from tools.peers.onnx_to_torch import OnnxModule
from tools.peers.search import bisect_ratio, emit, reason

TRIES, SLACK, OPSET = 9, 0.002, 17


def example_inputs(model: onnx.ModelProto) -> tuple[torch.Tensor, ...]:
    """One input each: noise for floats, ones (token ids and masks) for integers."""
    stored = {t.name for t in model.graph.initializer}
    kinds = [v.type.tensor_type for v in model.graph.input if v.name not in stored]
    shapes = [[d.dim_value for d in kind.shape.dim] for kind in kinds]
    return tuple(
        torch.randn(shape) if kind.elem_type == onnx.TensorProto.FLOAT else torch.ones(shape).long()
        for kind, shape in zip(kinds, shapes, strict=True)
    )


def count_macs(module: OnnxModule, inputs: tuple[torch.Tensor, ...]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs)
    return int(counter.get_total_flops()) // 2


def prune(
    module: OnnxModule, inputs: tuple[torch.Tensor, ...], ratio: float, round_to: int | None
) -> OnnxModule:
    """A copy of `module` that lost `ratio` of the channels of every group."""
    pruned = copy.deepcopy(module)
    pruner = tp.pruner.MagnitudePruner(
        pruned,
        inputs,
        importance=tp.importance.MagnitudeImportance(p=1),
        global_pruning=False,
        pruning_ratio=ratio,
        round_to=round_to,
        ignored_layers=[pruned.get_submodule(pruned.last)],
        num_heads={pruned.get_submodule(name): n for name, n in pruned.heads.items()},
        in_channel_groups={},  # the defaults are shared between calls and would keep every copy
        out_channel_groups={},
    )
    pruner.step()
    return pruned


def export(module: OnnxModule, inputs: tuple[torch.Tensor, ...], target: Path) -> float:
    """Write the module as ONNX; return the seconds."""
    began = time.perf_counter()
    torch.onnx.export(
        module.eval(),
        inputs,
        str(target),
        dynamo=False,
        opset_version=OPSET,
        input_names=module.inputs,
        output_names=module.outputs,
    )
    return time.perf_counter() - began


def run(source: Path, target: Path, share: float, round_to: int | None) -> dict[str, Any]:
    model = onnx.load(source)
    inputs = example_inputs(model)
    module = OnnxModule(model).eval()
    dense = count_macs(module, inputs)

    def attempt(ratio: float) -> tuple[int, OnnxModule]:
        pruned = prune(module, inputs, ratio, round_to)
        return count_macs(pruned, inputs), pruned

    found = bisect_ratio(attempt, share * dense, TRIES, SLACK * dense)
    seconds = export(found.result, inputs, target)
    return {
        "seconds": found.seconds,
        "export_seconds": seconds,
        "tries": found.tries,
        "ratio": found.ratio,
        "macs_left": found.macs / dense,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--target-macs", type=float, default=0.5, dest="share")
    parser.add_argument("--round-to", type=int)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    versions = {name: version(name) for name in ("torch", "torch-pruning")}
    try:
        result = run(arguments.source, arguments.target, arguments.share, arguments.round_to)
        emit(versions | result)
    except Exception as error:  # whatever the peer raises is its result
        emit(versions | {"error": reason(error)})


if __name__ == "__main__":
    main()
