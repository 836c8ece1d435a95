"""Peak memory and seconds of pruning decoders from 0.5 GB upwards; growth should be linear.

    python tools/benchmark_giants.py --sizes 0.5 2 14 --folder /tmp/giants

Makes each model with tools/make_decoder.py (shards of 2 GB), prunes it in a process of its own to
half of its MACs from weights alone, and prints what that process held: all pages (RSS, which counts
mapped files' pages that the system may drop at any time) and its own (anonymous), sampled every
20 ms.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from make_decoder import KINDS, decoder, shape_of
from rich.console import Console
from rich.table import Table

QUICK = ("--target-flops", "0.5", "--criterion", "l1", "--repair", "none", "--no-measure")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.5, 2.0], help="GB")
    parser.add_argument("--dtype", choices=KINDS, default="float16")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "giants")
    parser.add_argument("--verify", action="store_true", help="prove each cut as well")
    parser.add_argument("--keep", action="store_true", help="leave the models to another run")
    given = parser.parse_args()
    title = f"{given.dtype} decoders, half of the MACs" + (", verified" if given.verify else "")
    table = Table(
        "GB", "parameters", "largest shard GB", "peak RSS MiB", "of it anonymous MiB", "seconds",
        "CPU seconds", "result GB", title=title,
    )  # fmt: skip
    seconds, sizes = [], []
    for size in given.sizes:
        shape = shape_of(size * 1e9 / np.dtype(KINDS[given.dtype][0]).itemsize)
        folder = given.folder / f"{size:g}"
        path = folder / "model.onnx"
        if not path.exists():
            path = decoder(folder, shape, given.dtype, length=16)
        extra = () if given.verify else ("--no-verify",)
        spent, busy, rss, own = pruned(path, extra)
        total = weights(folder, "model-")
        shard = max(file.stat().st_size for file in folder.glob("model-*"))
        row = (
            f"{total / 1e9:.2f}", f"{shape.parameters / 1e9:.2f} G", f"{shard / 1e9:.2f}",
            f"{rss:,.0f}", f"{own:,.0f}", f"{spent:.1f}", f"{busy:.1f}",
            f"{weights(folder, 'out.onnx') / 1e9:.2f}",
        )  # fmt: skip
        print(*row, flush=True)
        table.add_row(*row)
        seconds.append(busy)
        sizes.append(total)
        for file in folder.glob("out.onnx*"):
            file.unlink()
        if not given.keep:
            shutil.rmtree(folder)
    if len(sizes) > 1:
        slope = np.polyfit(np.log(sizes), np.log(seconds), 1)[0]
        table.caption = f"slope of CPU seconds against bytes: {slope:.2f}"
    Console(width=120).print(table)


def weights(folder: Path, start: str) -> int:
    return sum(file.stat().st_size for file in folder.glob(f"{start}*"))


def pruned(path: Path, extra: tuple[str, ...]) -> tuple[float, float, float, float]:
    """Seconds, CPU seconds, peak RSS and peak anonymous MiB of a pruning in its own process."""
    out = path.with_name("out.onnx")
    start = time.perf_counter()
    command = [sys.executable, "-m", "graphprune.cli", str(path), *QUICK, *extra, "-o", str(out)]
    process = subprocess.Popen([*command, "--quiet", "--no-cache"])
    own = 0.0
    while True:
        done, status, usage = os.wait4(process.pid, os.WNOHANG)
        if done:
            break
        file = Path(f"/proc/{process.pid}/status")
        lines = dict(line.split(":", 1) for line in file.read_text().splitlines())
        own = max(own, float(lines.get("RssAnon", "0").split()[0]) / 1024)
        time.sleep(0.02)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{path}: exit code {process.returncode}")

    busy = usage.ru_utime + usage.ru_stime
    return time.perf_counter() - start, busy, usage.ru_maxrss / 1024, own


if __name__ == "__main__":
    main()
