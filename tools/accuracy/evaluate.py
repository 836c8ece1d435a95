"""Accuracy of ONNX files in plain ONNX Runtime: the one measure for every tool.

    python -m tools.accuracy.evaluate DATA.npz MODEL.onnx ... [--threads 1]
    python -m tools.accuracy.evaluate WORK MODEL.onnx ...     # a folder: Banking77

A fixed batch (the peers' exports have batch 1) is fed sample by sample. Nothing here imports
graphprune.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from .banking77 import Feeds, Run, score

BATCH = 100  # pictures per run


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    for model in arguments.models:
        print(f"{accuracy(model, arguments.data, arguments.threads):.2%}  {model.name}", flush=True)


if __name__ == "__main__":
    main()
