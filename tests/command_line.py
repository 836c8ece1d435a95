"""What tests of the command line share: options, and its output read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx

Run = Callable[..., Any]
WEIGHTS = ("--criterion", "l1", "--repair", "none")  # what needs no calibration inputs
HALF = ("--target-flops", "0.5", *WEIGHTS)
FINE = ("--round-to", "1", "--min-channels", "1")
QUICK = ("--no-measure", "--quiet", *WEIGHTS)


def shapes(path: Path) -> dict[str, list[int]]:
    return {tensor.name: list(tensor.dims) for tensor in onnx.load(path).graph.initializer}


def read_json(text: str) -> Any:
    """Exactly one document, and strict: no NaN, no Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def program(*arguments: object, seed: str = "0") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "graphprune.cli", *map(str, arguments)]
    env = {**os.environ, "PYTHONHASHSEED": seed}
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False)
