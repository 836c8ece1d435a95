"""What a damaged or hostile file may look like: bytes of a model, and data beside it."""

from __future__ import annotations

import os
import random
from pathlib import Path

import onnx
from mutations import NUMBERS, SIZES
from onnx import TensorProto


def deep_bytes(levels: int) -> bytes:
    """What, appended to a model's file, adds a node of ``levels`` bodies inside one another.

    Written by hand: protobuf's Python refuses to build what it refuses to read.
    """

    def field(number: int, content: bytes) -> bytes:
        return varint(number << 3 | 2) + varint(len(content)) + content

    node = field(2, b"deep_0") + field(4, b"Identity")
    for level in range(1, levels):
        graph = field(1, node) + field(2, b"b") + field(12, field(1, b"deep_%d" % (level - 1)))
        attribute = field(1, b"then_branch") + field(6, graph) + varint(20 << 3) + varint(5)
        node = field(1, b"deep_flag") + field(2, b"deep_%d" % level) + field(4, b"If")
        node += field(5, attribute)
    return field(7, field(1, node))


def varint(value: int) -> bytes:
    digits = bytearray()
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    return bytes([*digits, value])


def bytes_of(content: bytes, choose: random.Random) -> bytes:
    """The file, cut short, with some bytes changed, or with bodies in bodies."""
    kind = choose.randrange(6)
    data = bytearray(content)
    if kind == 0:
        return content[: choose.randrange(len(content))]
    if kind == 5:
        return content + deep_bytes(choose.choice((2, 30, 200, 5000)))
    if kind == 1:
        for _ in range(choose.choice((1, 3, 30))):
            data[choose.randrange(len(data))] = choose.randrange(256)
        return bytes(data)
    if kind == 2:
        at = choose.randrange(len(data))
        return content[:at] + choose.randbytes(choose.choice((1, 5, 100))) + content[at:]
    if kind == 3:
        at = choose.randrange(len(data))
        return content[:at] + content[at + choose.choice((1, 5, 100)) :]
    return choose.randbytes(choose.choice((0, 1, 100, 5000)))


def spoil_external(path: Path, choose: random.Random) -> None:
    """Weights beside the model, described wrongly. ``path`` holds the model already."""
    model = onnx.load(path, load_external_data=False)
    if not any(t.raw_data for t in model.graph.initializer):
        return
    onnx.save(model, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    model = onnx.load(path, load_external_data=False)
    outside = [t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL]
    if not outside:
        return
    tensor, data = choose.choice(outside), path.parent / "w.bin"
    entries = {entry.key: entry for entry in tensor.external_data}
    places = ("../secret", str(path.parents[1] / "secret"), "/dev/zero", "/etc/passwd", ".", "",
              "link", "fifo", "down/../../secret", path.name, "w.bin\x00", "n" * 5000)  # fmt: skip
    kind = choose.randrange(7)
    if kind == 0:
        entries["location"].value = choose.choice(places)
    elif kind == 1:
        (path.parent / "link").symlink_to("../secret")
        entries["location"].value = "link"
    elif kind == 2:
        os.mkfifo(path.parent / "fifo")
        entries["location"].value = "fifo"
    elif kind == 3:
        for key in ("offset", "length"):
            if choose.random() < 0.6 and key in entries:
                entries[key].value = choose.choice((*map(str, NUMBERS), "many", "", "1e3", "0x10"))
    elif kind == 4:
        data.write_bytes(data.read_bytes()[: choose.randrange(1 + data.stat().st_size)])
    elif kind == 5:
        tensor.dims[:] = [choose.choice(SIZES)]
    else:
        del tensor.external_data[choose.randrange(len(tensor.external_data)) :]
    path.write_bytes(model.SerializeToString())
