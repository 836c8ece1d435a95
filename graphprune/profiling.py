"""What each kernel of a model takes in ONNX Runtime, by its own profiler."""

from __future__ import annotations

import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from graphprune.model import Array
from graphprune.runtime import provider_of, refusal, run_session

WARM_UP = 2
OTHERS_BYTES = 16 << 20  # by measurement: with 8 MB ResNet-18's pieces sum to 5 % too little
SUFFIX = "_kernel_time"  # how the events of an operator's own work end
Event = Mapping[str, Any]


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
            raise refusal(error) from error
        others = np.empty(OTHERS_BYTES if alone else 0, np.uint8)
        begin = time.perf_counter()
        done = 0
        while done < WARM_UP + rounds:
            others.fill(done % 2)
            if done < WARM_UP:
                run_session(runner, feeds)  # with its limit on how long a run may take
            else:
                runner.run(None, dict(feeds))
            done += 1
            if done >= WARM_UP + 3 and time.perf_counter() - begin > budget_s:
                break
        events = json.loads(Path(runner.end_profiling()).read_text())
    return _by_kernel(events, done)


def _by_kernel(events: Sequence[Event], runs: int) -> list[Kernel]:
    """Kernels in the order in which they ran first, without the warm-up."""
    times: dict[tuple[str, int], list[float]] = defaultdict(list)
    named: dict[tuple[str, int], tuple[str, tuple[int, ...]]] = {}
    for event, own in own_times(events):
        name, said = event["name"].removesuffix(SUFFIX), event["args"]
        shapes = [tuple(s) for entry in said.get("output_type_shape", ()) for s in entry.values()]
        key = name, int(said["node_index"])
        named.setdefault(key, (str(said["op_name"]), (shapes or [()])[0]))
        times[key].append(own)
    found = []
    for key, (operator, output) in named.items():
        per_run = len(times[key]) // runs or 1  # a body's node runs several times in one
        kept = np.array(times[key][WARM_UP * per_run :])
        whole = len(kept) // per_run * per_run
        microseconds = kept[:whole].reshape(-1, per_run).sum(axis=1)
        found.append(Kernel(key[0], operator, output, microseconds))
    return found


def own_times(events: Sequence[Event]) -> list[tuple[Event, float]]:
    """Kernels with their microseconds, less those of kernels inside them: a body's count as
    themselves, not once more as their Loop or If."""
    kernels = [e for e in events if e.get("cat") == "Node" and e["name"].endswith(SUFFIX)]
    ordered = sorted(kernels, key=lambda e: (e["ts"], -e["dur"]))
    own = [float(event["dur"]) for event in ordered]
    around: list[int] = []  # events that have begun and not ended
    for i, event in enumerate(ordered):
        end = event["ts"] + event["dur"]
        while around and ordered[around[-1]]["ts"] + ordered[around[-1]]["dur"] < end:
            around.pop()
        if around and event["dur"]:
            own[around[-1]] -= event["dur"]
        around.append(i)
    return list(zip(ordered, own, strict=True))
