"""A hardware target whose times are counted, not measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

SCRIPT = """
import json, sys, onnx
asked = json.load(sys.stdin)["models"]
graphs = [onnx.load(m["path"]).graph for m in asked]
counts = [sum(n.op_type in KINDS for n in g.node) for g in graphs]
sizes = [sum(len(t.raw_data) // 4 for t in g.initializer) for g in graphs]
times = [BASE + COST * n + EACH * size for n, size in zip(counts, sizes)]
print(json.dumps({"milliseconds": times}))
"""


def board(folder: Path, kinds: str, cost: float, base: float = 8.0, each: float = 0.0) -> str:
    """A target file: models take ``base`` ms, ``cost`` more for every node of these kinds, and
    ``each`` for every number that they hold."""
    script, target = folder / "stopwatch.py", folder / "board.toml"
    given = {"KINDS": repr(kinds.split(",")), "COST": repr(cost), "BASE": repr(base)}
    given["EACH"] = repr(each)
    text = SCRIPT
    for name, value in given.items():
        text = text.replace(name, value)
    script.write_text(text)
    command = json.dumps(f"{sys.executable} {script}")
    target.write_text(f'name = "board"\nlatency_command = {command}\n[multiple]\ndefault = 2\n')
    return str(target)
