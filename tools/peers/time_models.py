"""Time ONNX files side by side in ONNX Runtime, in one process.

    python -m tools.peers.time_models ORIGINAL.onnx OTHER.onnx ... [--threads 1] [--runs 31]

Prints one JSON document: file → {"milliseconds", "speed_up", "low", "high"} or {"error"}. Every
round runs each model once, in turn, starting one further along each time, so that what else happens
on the machine falls on all alike. milliseconds is the median; speed_up is the median, low and high
the quartiles, of the rounds' ratios to the first file. CPU provider, batch of the graph.
"""

import argparse
import time
from typing import Any

import numpy as np
import onnxruntime as ort

from tools.peers.search import emit, reason

WARM_UP = 3
Feeds = dict[str, np.ndarray]


def session(path: str, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def feeds(model: ort.InferenceSession) -> Feeds:
    """Noise for floats; ones (token ids and masks) for integers; symbolic dimensions are 1."""
    rng = np.random.default_rng(0)
    values: Feeds = {}
    for value in model.get_inputs():
        shape = [n if isinstance(n, int) else 1 for n in value.shape]
        if "float" in value.type:
            values[value.name] = rng.standard_normal(shape, dtype=np.float32)
        else:
            values[value.name] = np.ones(shape, np.int32 if "int32" in value.type else np.int64)
    return values


def run_once(model: ort.InferenceSession, values: Feeds) -> tuple[float, list[tuple[int, ...]]]:
    """Seconds, and the shapes of the outputs."""
    began = time.perf_counter()
    outputs = model.run(None, values)
    return time.perf_counter() - began, [np.shape(o) for o in outputs]


def time_models(paths: list[str], threads: int, runs: int) -> dict[str, Any]:
    original, *others = paths
    models = {original: session(original, threads)}
    values = feeds(models[original])
    _, expected = run_once(models[original], values)
    report: dict[str, Any] = {}
    for path in others:
        try:
            models[path] = session(path, threads)
            _, shapes = run_once(models[path], values)
            if shapes != expected:
                raise ValueError(f"output shapes {shapes} instead of {expected}")
        except Exception as error:  # a file that does not run is a result of the tool
            models.pop(path, None)
            report[path] = {"error": reason(error)}

    names = list(models)
    seconds = np.empty((WARM_UP + runs, len(names)))
    for turn in range(len(seconds)):
        for i in range(len(names)):
            column = (turn + i) % len(names)
            seconds[turn, column], _ = run_once(models[names[column]], values)
    seconds = seconds[WARM_UP:]
    ratios = seconds[:, :1] / seconds
    for column, name in enumerate(names):
        low, middle, high = np.percentile(ratios[:, column], [25, 50, 75])
        milliseconds = 1e3 * float(np.median(seconds[:, column]))
        quartiles = {"speed_up": float(middle), "low": float(low), "high": float(high)}
        report[name] = {"milliseconds": milliseconds} | quartiles
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="+")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=31)
    arguments = parser.parse_args()
    report = time_models(arguments.paths, arguments.threads, arguments.runs)
    emit({"onnxruntime": ort.__version__, "models": report})


if __name__ == "__main__":
    main()
