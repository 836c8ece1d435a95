"""Where times come from: this machine's ONNX Runtime, or a command that asks a board or simulator.

A device times a piece alone, and two whole models against each other.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx

from graphprune.errors import UsageError
from graphprune.interface import fitted
from graphprune.latency.micro import NARROW, NEAR, Micro
from graphprune.model import Model
from graphprune.profiling import Kernel, kernels
from graphprune.runtime import Feeds, session, time_interleaved
from graphprune.storage import load, save

PROTOCOL = 1  # of the command: changes with what is said on stdin and stdout
REORDER = "Reorder"
LONGEST_S = 600  # seconds that a command may take
PIECE_ROUNDS = 6
PAIR_S, ROUNDS = 4.0, 301  # how long, and how often, whole models are timed against each other


class Device(Protocol):
    """What can time models."""

    @property
    def key(self) -> str:
        """All that its times depend on, as one text."""

    def piece(self, micro: Micro) -> float:
        """Microseconds of a piece. Raises ``ModelError`` where it does not run alone."""

    def pair(self, first: Model, second: Model, feeds: Feeds) -> tuple[float, float]:
        """Milliseconds of the first model, and of the second over those. ``feeds`` are those of the
        model that both may have been cut from."""


@dataclass(frozen=True)
class OnnxRuntime:
    """This machine's ONNX Runtime."""

    threads: int = 1
    provider: str = "cpu"

    @property
    def key(self) -> str:
        import onnxruntime as ort

        return f"{_cpu()}, ONNX Runtime {ort.__version__}, {self.provider}, {self.threads} threads"

    def piece(self, micro: Micro) -> float:
        found = kernels(
            micro.model, micro.feeds, self.threads, self.provider, PIECE_ROUNDS, alone=True
        )
        return float(sum(kernel.usual for kernel in found if not _stands_in(kernel)))

    def pair(self, first: Model, second: Model, feeds: Feeds) -> tuple[float, float]:
        runners = [session(model, self.threads, self.provider) for model in (first, second)]
        inputs = [fitted(model, feeds) for model in (first, second)]
        timing = time_interleaved(runners, inputs, ROUNDS, PAIR_S)
        return float(timing.median[0]), timing.ratio(1)[0]


def _stands_in(kernel: Kernel) -> bool:
    """Stand-ins, and the reorder after the last of them, whose result nothing else resembles."""
    last = kernel.operator.startswith(REORDER) and kernel.output[1:] == (NARROW, 1, 1)
    return last or NEAR in kernel.name


def _described(feeds: Feeds) -> dict[str, dict[str, Any]]:
    return {
        name: {"shape": list(value.shape), "dtype": str(value.dtype)}
        for name, value in feeds.items()
        if isinstance(value, np.ndarray)
    }


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    said = {
        line.split(":")[0].strip(): line.split(":")[-1].strip() for line in lines if ":" in line
    }
    parts = [said.get(name, "") for name in ("model name", "cpu family", "model", "cache size")]
    flags = hashlib.sha256(said.get("flags", "").encode()).hexdigest()[:8]
    return " ".join([*filter(None, parts), flags]) if lines else platform.processor()


@dataclass(frozen=True)
class Command:
    """A command of the user's: one JSON document on stdin, one on stdout, a process per request.

    stdin: ``{"protocol": 1, "models": [{"path": "/…/model.onnx", "inputs": {name: {"shape": [1, 3,
    224, 224], "dtype": "float32"}}}]}``; stdout: ``{"milliseconds": [12.3]}``, one per model.
    """

    command: str

    @property
    def key(self) -> str:
        return f"command {self.command}"

    def piece(self, micro: Micro) -> float:
        return self._ask([micro.model], micro.feeds)[0] * 1e3

    def pair(self, first: Model, second: Model, feeds: Feeds) -> tuple[float, float]:
        before, after = self._ask([first, second], feeds)
        return before, after / max(before, 1e-9)

    def _ask(self, models: Sequence[Model | onnx.ModelProto], feeds: Feeds) -> list[float]:
        loaded = [model if isinstance(model, Model) else load(model) for model in models]
        with tempfile.TemporaryDirectory() as folder:
            asked = []
            for i, model in enumerate(loaded):
                path = Path(folder) / f"model_{i}.onnx"
                save(model, path)
                asked.append({"path": str(path), "inputs": _described(fitted(model, feeds))})
            said = self._run(json.dumps({"protocol": PROTOCOL, "models": asked}))
        times = said.get("milliseconds") if isinstance(said, dict) else None
        if (
            not isinstance(times, list)
            or len(times) != len(models)
            or not all(type(t) in (int, float) and t >= 0 for t in times)
        ):
            raise self._error(f"answered {str(said)[:200]!r}")
        return [float(t) for t in times]

    def _run(self, request: str) -> Any:
        try:
            done = subprocess.run(
                shlex.split(self.command),
                input=request,
                capture_output=True,
                text=True,
                timeout=LONGEST_S,
                check=True,
            )
            return json.loads(done.stdout)
        except subprocess.CalledProcessError as error:
            raise self._error(
                f"ended with {error.returncode}: {error.stderr.strip()[-300:]}"
            ) from error
        except subprocess.TimeoutExpired as error:
            raise self._error(f"took more than {LONGEST_S} seconds") from error
        except json.JSONDecodeError as error:
            raise self._error(f"wrote no JSON: {error}") from error
        except (OSError, ValueError) as error:
            raise self._error(f"cannot be run: {error}") from error

    def _error(self, what: str) -> UsageError:
        return UsageError(
            f"the latency command {what}",
            self.command,
            'It reads {"protocol": 1, "models": [{"path", "inputs"}]} on stdin and must write '
            '{"milliseconds": [one per model]} on stdout.',
        )
