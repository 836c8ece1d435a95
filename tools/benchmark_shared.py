"""What repairing weights that several operators read is worth.

    python -m tools.benchmark_shared [MODEL ...]

Networks with He-initialised weights: a head over four levels of a feature pyramid, with and without
a BatchNormalization of its own for each level (statistics measured), two towers, a residual block
that runs five times; and any models given, on random inputs. At 0.7 and 0.5 of the MACs, by L1 and
as much from each layer: the mean relative error of the outputs on inputs held out, not repaired,
with such weights left as they were cut, and repaired together.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from graphprune import api
from graphprune.calibrate.pictures import dead_leaves
from graphprune.distortion import relative_error
from graphprune.frontier import Frontier
from graphprune.model import Array, set_initializer
from graphprune.runtime import random_inputs, run_session, session
from graphprune.storage import load

Feeds = list[dict[str, Array]]
SIDE, SAMPLES, CHUNK = 64, 256, 32


class Net:
    """A network of pictures, grown operator by operator."""

    def __init__(self, seed: int, *inputs: str) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, Array] = {}
        self.inputs = inputs

    def weight(self, *shape: int) -> str:
        name = f"w{len(self.weights)}"
        scale = (2 / np.prod(shape[1:])) ** 0.5 if len(shape) > 1 else 0.0
        self.weights[name] = (self.rng.standard_normal(shape) * scale).astype(np.float32)
        return name

    def add(self, op: str, *names: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(op, names, [f"t{len(self.nodes)}"], **attributes))
        return str(self.nodes[-1].output[0])

    def conv(self, x: str, weight: str, bias: str = "", stride: int = 1) -> str:
        size = self.weights[weight].shape[2]
        names = [x, weight, bias] if bias else [x, weight]
        return self.add("Conv", *names, strides=[stride] * 2, pads=[size // 2] * 4)

    def norm(self, x: str, channels: int) -> str:
        spread = [self.rng.uniform(0.5, 1.5, channels), self.rng.normal(0, 0.3, channels)]
        names = [self.weight(channels) for _ in range(4)]
        for name, value in zip(
            names, [*spread, np.zeros(channels), np.ones(channels)], strict=True
        ):
            self.weights[name] = value.astype(np.float32)
        return self.add("BatchNormalization", x, *names)

    def proto(self, *outputs: str) -> onnx.ModelProto:
        pictures = ["n", 3, SIDE, SIDE]
        ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, pictures) for n in self.inputs]
        results = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs]
        tensors = [numpy_helper.from_array(value, name) for name, value in self.weights.items()]
        graph = helper.make_graph(self.nodes, "net", ends, results, tensors)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def pyramid(norm: bool) -> onnx.ModelProto:
    """A head of three convolutions and a last one, over four levels."""
    net, channels = Net(0, "x"), 48
    x, inner, levels = "x", 3, []
    for outer in (24, 48, 64, 96):
        for before, stride in ((inner, 2), (outer, 1)):
            x = net.norm(net.conv(x, net.weight(outer, before, 3, 3), stride=stride), outer)
            x = net.add("Relu", x)
        inner = outer
        if outer > 24:
            levels.append(net.conv(x, net.weight(channels, outer, 1, 1), net.weight(channels)))
    levels.append(net.conv(levels[-1], net.weight(channels, channels, 3, 3), stride=2))
    head = [net.weight(channels, channels, 3, 3) for _ in range(3)]
    last, bias = net.weight(18, channels, 3, 3), net.weight(18)
    ends = []
    for level in levels:
        x = level
        for weight in head:
            x = net.conv(x, weight)
            x = net.add("Relu", net.norm(x, channels) if norm else x)
        ends.append(net.conv(x, last, bias))
    return measured(net.proto(*ends))


def towers() -> onnx.ModelProto:
    net = Net(1, "x", "z")
    first, second = net.weight(32, 3, 3, 3), net.weight(64, 32, 3, 3)
    third = net.weight(64, 64, 3, 3)
    ends = []
    for x in ("x", "z"):
        h = net.add("Relu", net.conv(x, first, stride=2))
        h = net.add("Relu", net.conv(h, second, stride=2))
        ends.append(net.add("GlobalAveragePool", net.add("Relu", net.conv(h, third))))
    both = net.add("Concat", *ends, axis=1)
    return net.proto(net.conv(both, net.weight(10, 128, 1, 1)))


def again() -> onnx.ModelProto:
    net = Net(2, "x")
    x = net.add("Relu", net.conv("x", net.weight(48, 3, 3, 3), stride=2))
    up, down = net.weight(96, 48, 3, 3), net.weight(48, 96, 3, 3)
    net.weights[down] /= 2
    for _ in range(5):
        x = net.add("Add", x, net.conv(net.add("Relu", net.conv(x, up)), down))
    return net.proto(net.conv(x, net.weight(10, 48, 1, 1)))


def measured(proto: onnx.ModelProto) -> onnx.ModelProto:
    """With every BatchNormalization's statistics those of pictures."""
    frontier = Frontier(load(proto), pictures(["x"], 9, 64))
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type != "BatchNormalization":
            continue
        frontier.advance([node.input[0]])
        seen = np.concatenate([frontier[node.input[0]][i] for i in range(frontier.chunks)])
        found = seen.mean((0, 2, 3)), seen.var((0, 2, 3))
        for name, value in zip(node.input[3:5], found, strict=True):
            frontier.weights[name] = set_initializer(name, value.astype(np.float32))
            tensors[name].CopyFrom(frontier.weights[name])
    return proto


def pictures(names: list[str], seed: int, count: int) -> Feeds:
    found = []
    for chunk in range(count // CHUNK):
        rng = [np.random.default_rng([seed, chunk, place]) for place in range(len(names))]
        drawn = [(dead_leaves(CHUNK, 3, SIDE, SIDE, one) - 0.5) / 0.25 for one in rng]
        found.append({n: a.astype(np.float32) for n, a in zip(names, drawn, strict=True)})
    return found


def cases(models: list[Path]) -> Iterator[tuple[str, onnx.ModelProto, Feeds, Feeds]]:
    made: dict[str, Callable[[], onnx.ModelProto]] = {
        "head over four levels": lambda: pyramid(False),
        "the same, normalised by level": lambda: pyramid(True),
        "two towers": towers,
        "a block run five times": again,
    }
    for name, make in made.items():
        proto = make()
        names = [value.name for value in proto.graph.input]
        yield name, proto, pictures(names, 1, SAMPLES), pictures(names, 2, SAMPLES // 2)
    for path in models:
        prepared = api.prepare(path)
        shapes = prepared.analysis.shapes
        drawn = [random_inputs(prepared.original, shapes, seed) for seed in range(SAMPLES)]
        yield path.stem, onnx.load(path), drawn[SAMPLES // 4 :], drawn[: SAMPLES // 4]


def errors(proto: onnx.ModelProto, share: float, calib: Path, held: Feeds) -> Iterator[float]:
    """Not repaired; with such weights left as they were cut; repaired together."""
    module = import_module("graphprune.repair.reconstruct")
    first = session(load(proto), 1)
    wanted = [run_session(first, feed) for feed in held]
    for repair, found in (("none", None), ("obs", lambda model: []), ("obs", module.shared)):
        with patch.object(module, "shared", found):
            result = api.prune(
                proto,
                flops=share,
                criterion="l1",
                spread="uniform",
                repair=repair,
                calib=str(calib) if repair != "none" else None,
                round_to=1,
                min_channels=1,
                measure=False,
                cache=False,
            )
        runner = session(load(result.model), 1)
        pairs = zip(wanted, (run_session(runner, feed) for feed in held), strict=True)
        yield float(np.mean([relative_error(a, b) for a, b in pairs]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", type=Path)
    print("| model | MACs | not repaired | shared weights as cut | repaired together |")
    print("|---|---|---|---|---|", flush=True)
    for name, proto, feeds, held in cases(parser.parse_args().models):
        with tempfile.TemporaryDirectory() as folder:
            calib = Path(folder) / "calib.npz"
            np.savez(calib, **{n: np.concatenate([f[n] for f in feeds]) for n in feeds[0]})
            for share in (0.7, 0.5):
                cells = [f"{found:.3g}" for found in errors(proto, share, calib, held)]
                print(f"| {name} | {share} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
