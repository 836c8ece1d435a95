"""Prune one ONNX model with onnxsim's `apply_structured_pruning`, down to a share of its MACs.

    python -m tools.peers.run_onnxsim IN.onnx OUT.onnx [--twin TWIN.onnx] [--target-macs 0.5]

Run from the repository with the peers' own Python. Prints one JSON document: `seconds` is the
search of the first way that works, `way` its name, `failed` the ways before it with their reasons.
Three ways are tried: the file as it is, simplified by onnxsim first, and the twin, another export
of the same model (onnxsim breaks on shared initialisers, which the TorchScript exporter makes). A
way works if it reaches the target and ONNX Runtime runs the result.
"""

import argparse
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import onnxsim

from tools.peers.count_macs import count_macs
from tools.peers.search import bisect_ratio, emit, reason
from tools.peers.time_models import feeds, run_once, session

TRIES, SLACK = 9, 0.002


def write(model: onnx.ModelProto, target: Path) -> None:
    """Save a pruned model, and make sure that it runs."""
    onnx.save(model, target)
    try:
        written = session(str(target), threads=1)
        run_once(written, feeds(written))
    except Exception as error:
        raise RuntimeError(f"the result does not run: {error}") from error


def search(source: Path, target: Path, share: float, simplify: bool) -> dict[str, Any]:
    """One way: bisect the ratio, write the best result, run it."""
    model = onnx.load(source)
    dense = count_macs(model)
    began = time.perf_counter()
    if simplify:
        model, _ = onnxsim.simplify(model)
    simplified = time.perf_counter() - began

    def attempt(ratio: float) -> tuple[int, onnx.ModelProto]:
        pruned = onnxsim.apply_structured_pruning(model, sparsity=ratio, importance_norm="l1")
        try:
            return count_macs(pruned), pruned
        except ValueError:
            write(pruned, target)  # if it is broken, ONNX Runtime says where
            raise

    found = bisect_ratio(attempt, share * dense, TRIES, SLACK * dense)
    write(found.result, target)
    if found.macs > share * dense:
        raise ValueError(f"target not reached: {found.macs / dense:.1%} of the MACs left at best")
    return {
        "seconds": simplified + found.seconds,
        "tries": found.tries,
        "ratio": found.ratio,
        "macs_left": found.macs / dense,
    }


def run(source: Path, target: Path, twin: Path | None, share: float) -> dict[str, Any]:
    ways = [("as it is", source, False), ("simplified", source, True)]
    if twin is not None:
        ways.append((f"from {twin.name}", twin, False))
    failed: dict[str, str] = {}
    for way, path, simplify in ways:
        try:
            return {"way": way, "failed": failed} | search(path, target, share, simplify)
        except Exception as error:  # whatever the peer raises is its result
            failed[way] = reason(error)
            target.unlink(missing_ok=True)
    return {"failed": failed, "error": "; ".join(f"{way}: {why}" for way, why in failed.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--twin", type=Path)
    parser.add_argument("--target-macs", type=float, default=0.5, dest="share")
    arguments = parser.parse_args()
    result = run(arguments.source, arguments.target, arguments.twin, arguments.share)
    emit({"onnxsim": version("onnxsim")} | result)


if __name__ == "__main__":
    main()
