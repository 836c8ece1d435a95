"""What each kernel of a model takes in ONNX Runtime, by its own profiler."""

from __future__ import annotations

import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from graphprune.errors import ModelError
from graphprune.model import Array
from graphprune.runtime import provider_of, run_session

WARM_UP = 2
OTHERS_BYTES = 16 << 20  # by measurement: with 8 MB ResNet-18's pieces sum to 5 % too little
SUFFIX = "_kernel_time"


@dataclass(frozen=True)
class Kernel:
    """One node of the graph as ONNX Runtime runs it (fused, with its reorders)."""

    name: str
    operator: str
    output: tuple[int, ...]  # shape of the first output
    microseconds: NDArray[np.float64]  # of each run

    @property
    def usual(self) -> float:
        """Mean of the faster half of the runs: what others do to the machine only adds."""
        fastest = np.sort(self.microseconds)[: (len(self.microseconds) + 1) // 2]
        return float(fastest.mean())


def kernels(
    model: onnx.ModelProto,
    feeds: Mapping[str, Array],
    threads: int = 1,
    provider: str = "cpu",
    rounds: int = 12,
    budget_s: float = 0.5,
    alone: bool = False,
) -> list[Kernel]:
    """Every kernel of ``model`` with its microseconds in ``rounds`` runs, or as many as fit into
    ``budget_s`` seconds (three at least). A part of a model is run ``alone``: between its runs the
    caches are filled with something else, as the model's other parts would.

    Raises ``ModelError`` where ONNX Runtime refuses the model or cannot run it.
    """
    import onnxruntime as ort

    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = threads
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        providers = [provider_of(provider, ort.get_available_providers())]
        try:
            runner = ort.InferenceSession(model.SerializeToString(), options, providers)
        except Exception as error:  # ONNX Runtime's errors share no base class of their own
            text = " ".join(str(error).split())
            raise ModelError(f"ONNX Runtime refuses the model: {text[:400]}") from error
        others = np.empty(OTHERS_BYTES if alone else 0, np.uint8)
        begin = time.perf_counter()
        done = 0
        while done < WARM_UP + rounds:
            others.fill(done % 2)
            run_session(runner, feeds)
            done += 1
            if done >= WARM_UP + 3 and time.perf_counter() - begin > budget_s:
                break
        events = json.loads(Path(runner.end_profiling()).read_text())
    return _by_kernel(events, done)


def _by_kernel(events: list[dict[str, object]], runs: int) -> list[Kernel]:
    """Kernels in the order in which they ran first, without the warm-up."""
    times: dict[int, list[float]] = defaultdict(list)
    named: dict[int, tuple[str, str, tuple[int, ...]]] = {}
    for event in events:
        name, said = str(event.get("name")), event.get("args")
        if event.get("cat") != "Node" or not name.endswith(SUFFIX) or not isinstance(said, dict):
            continue
        index = int(said["node_index"])
        shapes = [tuple(s) for entry in said.get("output_type_shape", ()) for s in entry.values()]
        named.setdefault(
            index, (name.removesuffix(SUFFIX), str(said["op_name"]), (shapes or [()])[0])
        )
        times[index].append(float(str(event["dur"])))
    found = []
    for index, (name, operator, output) in named.items():
        per_run = len(times[index]) // runs or 1  # a body's node runs several times in one
        kept = np.array(times[index][WARM_UP * per_run :])
        whole = len(kept) // per_run * per_run
        found.append(Kernel(name, operator, output, kept[:whole].reshape(-1, per_run).sum(axis=1)))
    return found
