"""Damaged files that a user gives beside a model: plans, targets, arrays."""

from __future__ import annotations

import hashlib
import io
import json
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx

ODD: tuple[Any, ...] = (
    None, True, 0, -1, 2**70, 1.5, float("nan"), float("inf"), "", "x", "\x00", [], {}, [[]],
    [None], {"a": 1}, "n" * 10_000,
)  # fmt: skip


def some_bytes(content: bytes, choose: random.Random) -> bytes:
    """Cut short, with other bytes, or nothing of it."""
    kind = choose.randrange(4)
    data = bytearray(content)
    if kind == 0:
        return content[: choose.randrange(len(content))]
    if kind == 1:
        for _ in range(choose.choice((1, 3, 30))):
            data[choose.randrange(len(data))] = choose.randrange(256)
        return bytes(data)
    if kind == 2:
        at = choose.randrange(len(data))
        return content[:at] + choose.randbytes(choose.choice((1, 100))) + content[at:]
    return choose.randbytes(choose.choice((0, 1, 5000)))


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) inside lists and tables."""
    found, waiting = [], [value]
    while waiting:
        part = waiting.pop()
        pairs = part.items() if isinstance(part, dict) else enumerate(part)
        for key, inner in list(pairs):
            found.append((part, key))
            if isinstance(inner, dict | list):
                waiting.append(inner)
    return found


def spoil(document: dict[str, Any], choose: random.Random) -> str:
    """Change values, drop or repeat them; says what was done."""
    container, key = choose.choice(places(document))
    kind = choose.randrange(4)
    if kind == 0:
        del container[key]
    elif kind == 1 and isinstance(container, list):
        container.append(container[key])
    elif kind == 2 and isinstance(container, dict):
        container[choose.choice(("x", "", "0"))] = container[key]
    else:
        container[key] = choose.choice(ODD)
    return f"{key}"[:40]


def plan_file(path: Path, plan: str, choose: random.Random) -> str:
    """A plan that was edited, with a hash that fits as often as not."""
    kind = choose.random()
    if kind < 0.15:
        path.write_bytes(some_bytes(plan.encode(), choose))
        return "bytes"
    if kind < 0.25:
        deep = choose.choice((10, 1000, 100_000))
        path.write_text("[" * deep + "]" * choose.choice((0, deep)))
        return "deep"
    document = json.loads(plan)
    done = " ".join(spoil(document, choose) for _ in range(choose.choice((1, 1, 3))))
    if choose.random() < 0.8 and isinstance(document, dict):
        document.pop("sha256", None)
        text = json.dumps(document, sort_keys=True)
        document["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(document))
    return done


TARGET = """name = "mine"
description = "a board"
minimum = 4
macs_per_element = 30.0
fewest_steps = 2
[multiple]
default = 8
Conv = 16
"""
LINES = (
    "minimum = 'x'", "minimum = -1", "minimum = 0", "minimum = 9223372036854775807",
    "minimum = []", "multiple = 3", "macs_per_element = nan", "macs_per_element = inf",
    "macs_per_element = -1.0",
    "name = 3", "name = {}", "fewest_steps = 99999999999999999999", "unheard = 1",
    "[multiple.Conv]", "[[multiple]]", "x = " + "[" * 5000, "minimum = " + "9" * 5000,
    "a" + ".a" * 5000 + " = 1",
    "d = 1979-05-27", "multiple.MatMul = 2", "multiple.MatMul = true", "\x00", "name = '''",
)  # fmt: skip


def target_file(path: Path, choose: random.Random) -> str:
    if choose.random() < 0.3:
        path.write_bytes(some_bytes(TARGET.encode(), choose))
        return "bytes"
    lines = TARGET.splitlines()
    for _ in range(choose.choice((1, 1, 2))):
        at = choose.randrange(len(lines))
        lines[at : at + choose.randrange(2)] = [choose.choice(LINES)]
    path.write_text("\n".join(lines))
    return "lines"


def arrays_file(path: Path, model: onnx.ModelProto, choose: random.Random) -> str:
    """Arrays for the model's inputs (and labels), some of them not what they should be."""
    rng = np.random.default_rng(choose.randrange(1000))
    arrays: dict[str, Any] = {"labels": rng.integers(0, 3, 6)}
    for value in model.graph.input:
        dims = [d.dim_value or 2 for d in value.type.tensor_type.shape.dim]
        arrays[value.name] = rng.standard_normal([6, *dims[1:]], dtype=np.float32)
    name = choose.choice(sorted(arrays))
    array = arrays[name]
    kind = choose.randrange(13)
    wrong = {
        0: lambda: array[:0],
        1: lambda: array[..., None],
        2: lambda: array[0],
        3: lambda: array.astype(choose.choice((np.float16, np.float64, np.int8, bool, complex))),
        4: lambda: np.full(array.shape, choose.choice((np.nan, np.inf, 1e38, -0.0))),
        5: lambda: np.full(array.shape, "text"),
        6: lambda: np.array([None, {}], object),
        7: lambda: array[::2],
        8: lambda: np.array(3),
        9: lambda: np.full(array.shape, 2**62),
    }
    if kind in wrong:
        arrays[name] = wrong[kind]()
    elif kind == 10:
        del arrays[name]
    packed = io.BytesIO()
    np.savez(packed, **arrays)
    content = packed.getvalue()
    if kind == 11:
        content = some_bytes(content, choose)
    elif kind == 12:
        content = huge_member(name, choose)
    path.write_bytes(content)
    return f"{name} {kind}"


def huge_member(name: str, choose: random.Random) -> bytes:
    """A header that promises far more than there is, or members of odd names."""
    packed = io.BytesIO()
    header = io.BytesIO()
    shape = choose.choice(((2**40,), (2**62, 2**62), (-1,), (0, 2**62)))
    described = {"descr": choose.choice(("<f4", "|O", "<f9", "V4")), "fortran_order": False}
    np.lib.format.write_array_header_1_0(header, described | {"shape": shape})
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr(f"{name}.npy", header.getvalue() + bytes(100))
        archive.writestr("../../up.npy", b"x")
        archive.writestr("labels.npy", choose.randbytes(50))
    return packed.getvalue()
