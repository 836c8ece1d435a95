"""What an ONNX file is worth in plain ONNX Runtime: top-1 and MACs, the same for every tool.

    python -m tools.accuracy.evaluate DATA MODEL.onnx SAMPLE.npz [--threads 1]

DATA is a labelled .npz, or the work folder, which means Banking77; SAMPLE holds inputs, the first
of which the MACs are counted at. Prints one JSON document: `accuracy` in [0, 1], `macs`. A fixed
batch (the peers' exports have batch 1) is fed sample by sample. Nothing here imports graphprune.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper

from tools.accuracy.banking77 import Feeds, Run, score
from tools.peers.count_macs import node_macs
from tools.peers.search import emit, reason

BATCH = 100  # pictures per run
COUNTED = ("Conv", "Gemm", "MatMul")


def runner(path: Path, threads: int) -> Run:
    """The model as a function of feeds; inputs it does not have are left out."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    declared = {value.name: value.shape for value in session.get_inputs()}
    one_by_one = any(isinstance(shape[0], int) for shape in declared.values())

    def run(feeds: Feeds) -> list[np.ndarray]:
        own = {name: fitted(feeds[name], shape) for name, shape in declared.items()}
        if not one_by_one:
            return list(session.run(None, own))
        count = len(next(iter(own.values())))
        rows = [session.run(None, {n: a[i : i + 1] for n, a in own.items()}) for i in range(count)]
        return [np.concatenate(column) for column in zip(*rows, strict=True)]

    return run


def fitted(array: np.ndarray, declared: Sequence[int | str | None]) -> np.ndarray:
    """Zeros behind the end of every axis but the batch, up to its fixed size: padding of tokens."""
    sizes = zip(array.shape[1:], declared[1:], strict=True)
    missing = [max(0, size - own) if isinstance(size, int) else 0 for own, size in sizes]
    return np.pad(array, [(0, 0), *((0, n) for n in missing)]) if any(missing) else array


def top1(run: Run, data: Path) -> float:
    """Share of the samples of `data` (inputs and `labels`) whose largest output is the label."""
    with np.load(data) as archive:
        feeds: Feeds = {name: archive[name] for name in archive.files}
    labels = feeds.pop("labels")
    hits = 0
    for start in range(0, len(labels), BATCH):
        part = slice(start, start + BATCH)
        answer = run({name: array[part] for name, array in feeds.items()})[0]
        hits += int((answer.argmax(-1) == labels[part]).sum())
    return hits / len(labels)


def accuracy(model: Path, data: Path, threads: int) -> float:
    """In [0, 1]; `data` is a labelled .npz, or the work folder for the sentence encoder."""
    run = runner(model, threads)
    if data.suffix == ".npz":
        return top1(run, data)
    os.environ["ACCURACY_WORK"] = str(data)
    return score(run)


def count_macs(path: Path, feeds: Feeds) -> int:
    """MACs of Conv, Gemm and MatMul, at the shapes that every tensor has when the model runs."""
    model = onnx.load(path)
    graph = model.graph
    shown = {value.name for value in graph.output}
    wanted = {n for node in graph.node if node.op_type in COUNTED for n in read_or_written(node)}
    stored = {tensor.name for tensor in graph.initializer} | {v.name for v in graph.input}
    tensors = sorted(wanted - stored - shown)
    graph.output.extend(helper.make_empty_tensor_value_info(name) for name in tensors)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    serialised = model.SerializeToString()
    session = ort.InferenceSession(serialised, options, providers=["CPUExecutionProvider"])
    own = {v.name: fitted(feeds[v.name], v.shape) for v in session.get_inputs()}
    known = dict(zip((v.name for v in session.get_outputs()), session.run(None, own), strict=True))
    shapes = {name: value.shape for name, value in known.items()}
    shapes |= {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    shapes |= {name: array.shape for name, array in own.items()}
    return sum(node_macs(node, shapes) for node in graph.node)


def read_or_written(node: onnx.NodeProto) -> tuple[str, str, str]:
    return node.input[0], node.input[1], node.output[0]


def first_sample(path: Path) -> Feeds:
    with np.load(path) as archive:
        return {name: archive[name][:1] for name in archive.files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("sample", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    try:
        macs = count_macs(arguments.model, first_sample(arguments.sample))
        top = accuracy(arguments.model, arguments.data, arguments.threads)
        emit({"accuracy": top, "macs": macs})
    except Exception as error:  # a file that does not run is a result of the tool that wrote it
        emit({"error": reason(error)})


if __name__ == "__main__":
    main()
