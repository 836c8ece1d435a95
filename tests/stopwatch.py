"""A hardware target whose times are counted, not measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

SCRIPT = """
import json, sys, onnx
asked = json.load(sys.stdin)["models"]
nodes = [[n.op_type for n in onnx.load(m["path"]).graph.node] for m in asked]
counts = [sum(kind in KINDS for kind in kinds) for kinds in nodes]
print(json.dumps({"milliseconds": [BASE + COST * n for n in counts]}))
"""


def board(folder: Path, kinds: str, cost: float, base: float = 8.0) -> str:
    """A target file: models take ``base`` ms, and ``cost`` more for every node of these kinds."""
    script, target = folder / "stopwatch.py", folder / "board.toml"
    given = {"KINDS": repr(kinds.split(",")), "COST": repr(cost), "BASE": repr(base)}
    text = SCRIPT
    for name, value in given.items():
        text = text.replace(name, value)
    script.write_text(text)
    command = json.dumps(f"{sys.executable} {script}")
    target.write_text(f'name = "board"\nlatency_command = {command}\n[multiple]\ndefault = 2\n')
    return str(target)
