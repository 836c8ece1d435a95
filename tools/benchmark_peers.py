"""Compare graphprune with the other structured pruners, on the same ONNX files.

    python tools/benchmark_peers.py [--models FOLDER_OR_FILES] [--out docs/benchmark_peers.md]
        [--workdir DIR] [--only resnet18,vit_b16] [--threads 1] [--runs 31]
        [--peer-cache] [--refresh] [--skip-graphprune]

Each tool is asked for half of the MACs. The peers take only a ratio, so it is bisected, as a user
would do. The peers run in an environment of their own, made in the working directory; every step is
a script in tools/peers that prints one JSON document. What a tool cannot do is a row of the table,
with the reason beneath it.

graphprune looks at weights alone, as the peers do (`--fast`; what calibration costs and is worth
is in docs/accuracy.md).

seconds: from the loaded model to the pruned one, all tries; no verification, no import, no export.
wall: the whole command, as started from a shell; not shown for a peer that tried several ways.
Every tool gets the same threads as the timed models.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT.parent / "shared" / "models" / "architectures"
NAMES = ("resnet18", "resnet50", "mobilenet_v2", "densenet121", "vit_b16", "bert_base")
REQUIREMENTS = ("torch==2.13.0", "onnxsim==0.8.1", "onnx", "onnxruntime", "numpy", "onnxscript")
WITHOUT_DEPENDENCIES = ("torch-pruning==1.6.1",)  # torchvision does not import beside this torch
TARGET = 0.5
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
LONGEST = 3600  # seconds one tool may take
IN_MEMORY = ("analyse", "plan", "cut")  # what the peers' seconds cover: no loading, no saving
HEAD = (
    "model",
    "tool",
    "seconds to target",
    "tries",
    "wall s",
    "MACs left",
    "parameters left",
    "latency ms",
    "speed-up (quartiles)",
)

Document = dict[str, Any]


@dataclass(frozen=True)
class Tool:
    """A peer: the module of tools/peers that runs it, and its options."""

    name: str
    script: str
    options: tuple[str, ...] = ()


PEERS = (
    Tool("Torch-Pruning", "run_torch_pruning"),
    Tool("Torch-Pruning, round_to=8", "run_torch_pruning", ("--round-to", "8")),
    Tool("Torch-Pruning, round_to=16", "run_torch_pruning", ("--round-to", "16")),
    Tool("onnxsim", "run_onnxsim"),
)


@dataclass(frozen=True)
class Row:
    """One tool on one model; `ran` is what its run said, the others what was measured after."""

    model: str
    tool: str
    ran: Document
    counted: Document
    timed: Document
    dense: Document

    def cells(self) -> list[str]:
        return [
            self.model,
            self.tool,
            _number(self.ran.get("seconds"), "{:.1f}"),
            _number(self.ran.get("tries"), "{}"),
            _number(self.ran.get("wall"), "{:.1f}"),
            *(_share(self.counted, self.dense, what) for what in ("macs", "parameters")),
            _number(self.timed.get("milliseconds"), "{:.2f}"),
            _number(self.timed, "{speed_up:.2f}× ({low:.2f}–{high:.2f})"),
        ]

    def notes(self) -> list[str]:
        """Why something failed, and what was done instead."""
        errors = [d["error"] for d in (self.ran, self.counted, self.timed) if "error" in d]
        if "way" in self.ran and self.ran["failed"]:
            failed = "; ".join(f"{way}: {why}" for way, why in self.ran["failed"].items())
            errors.append(f"worked {self.ran['way']}, after failing {failed}")
        return [f"{self.model}, {self.tool}: {error}" for error in errors]


def _number(value: Any, form: str) -> str:
    if value is None or (isinstance(value, dict) and "speed_up" not in value):
        return "–"
    return form.format(**value) if isinstance(value, dict) else form.format(value)


def _share(counted: Document, dense: Document, what: str) -> str:
    return f"{counted[what] / dense[what]:.1%}" if what in counted and what in dense else "–"


# --- running things -----------------------------------------------------------------------------


def run_json(command: list[str]) -> Document:
    """Run a command that prints a JSON document; `wall` is its seconds, `error` why it failed."""
    began = time.perf_counter()
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=LONGEST, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no result in {LONGEST} s"}
    except OSError as error:
        return {"error": f"{command[0]}: {error.strerror}"}
    wall = {"wall": time.perf_counter() - began}
    for text in (done.stdout, done.stdout.strip().rpartition("\n")[2]):
        try:
            document = json.loads(text)
        except ValueError:
            continue
        if done.returncode == 0 and isinstance(document, dict):
            return document | wall
    complaint = done.stderr.strip().rpartition("\n")[2] or "no JSON on stdout"
    return {"error": f"exit code {done.returncode}: {complaint}"}


def peer_python(workdir: Path) -> str:
    """The Python of the peers' environment, made on first use."""
    folder, wanted = workdir / "venv", "\n".join((*REQUIREMENTS, *WITHOUT_DEPENDENCIES))
    python, made = folder / "bin" / "python", folder / "requirements.txt"
    if made.exists() and made.read_text() == wanted:
        return str(python)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    install = [str(python), "-m", "pip", "install", "--quiet"]
    subprocess.run([*install, *REQUIREMENTS], check=True)
    subprocess.run([*install, "--no-deps", *WITHOUT_DEPENDENCIES], check=True)
    made.write_text(wanted)
    return str(python)


def peer_script(python: str, name: str, *arguments: str | Path) -> Document:
    return run_json([python, "-m", f"tools.peers.{name}", *map(str, arguments)])


def run_peer(
    python: str, tool: Tool, model: Path, twin: Path | None, target: Path, cached: bool
) -> Document:
    """Prune `model` with a peer; its document is kept beside the pruned file."""
    kept = target.with_suffix(".json")
    if cached and kept.exists() and kept.stat().st_mtime > model.stat().st_mtime:
        return dict(json.loads(kept.read_text()))
    target.unlink(missing_ok=True)
    second = ("--twin", twin) if twin is not None and tool.script == "run_onnxsim" else ()
    share = ("--target-macs", str(TARGET))
    ran = peer_script(python, tool.script, model, target, *share, *tool.options, *second)
    if "failed" in ran:
        ran.pop("wall", None)  # the time of all ways, not of the one that worked
    kept.write_text(json.dumps(ran))
    return ran


def run_graphprune(model: Path, target: Path) -> Document:
    target.unlink(missing_ok=True)
    here = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    command = shutil.which("graphprune", path=here) or "graphprune"
    share = ("--target-flops", str(TARGET))
    options = [*share, "--fast", "--no-verify", "--json", "-o", str(target)]
    ran = run_json([command, str(model), *options])
    stages = ran.get("seconds_by_stage", {})
    return {**ran, "seconds": sum(stages.get(stage, 0.0) for stage in IN_MEMORY)}


# --- the comparison -----------------------------------------------------------------------------


def models(given: list[Path], only: list[str], workdir: Path, python: str) -> Iterator[Path]:
    """The files to prune; weightless ones, beside the tool that fills them, are filled in first."""
    for path in given:
        if path.is_file():
            yield path
            continue
        materialise = path.parent.parent / "tools" / "materialise.py"
        for name in only or NAMES:
            source = path / f"{name}_ts.onnx"
            if not materialise.exists():
                yield source
                continue
            folder = workdir / "models"
            folder.mkdir(exist_ok=True)
            for weightless in (source, path / f"{name}.onnx"):
                filled = folder / weightless.name
                if weightless.exists() and not filled.exists():
                    fill = [python, str(materialise), str(weightless), str(filled)]
                    subprocess.run(fill, check=True)
            yield folder / source.name


def compare(model: Path, arguments: argparse.Namespace, python: str) -> list[Row]:
    """Prune one model with every tool, then count and time all results together."""
    name = model.stem.removesuffix("_ts")
    twin = model.with_name(f"{name}.onnx")
    results = arguments.workdir / "results"
    results.mkdir(exist_ok=True)
    ran: dict[str, Document] = {"original": {}}
    files = {"original": model}
    if not arguments.skip_graphprune:
        files["graphprune"] = results / f"{name}.graphprune.onnx"
        ran["graphprune"] = run_graphprune(model, files["graphprune"])
    for tool in PEERS:
        files[tool.name] = results / f"{name}.{_slug(tool.name)}.onnx"
        other = twin if twin.exists() and twin != model else None
        cached = arguments.peer_cache and not arguments.refresh
        ran[tool.name] = run_peer(python, tool, model, other, files[tool.name], cached)

    made = [str(files[t]) for t, d in ran.items() if "error" not in d and files[t].exists()]
    sampling = ("--threads", str(arguments.threads), "--runs", str(arguments.runs))
    counted = peer_script(python, "count_macs", *made)
    timed = peer_script(python, "time_models", *made, *sampling)
    timed = timed.get("models", {str(model): timed})
    dense = counted.get(str(model), counted)
    return [
        Row(name, t, d, counted.get(str(files[t]), {}), timed.get(str(files[t]), {}), dense)
        for t, d in ran.items()
    ]


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in text.lower())


# --- the report ---------------------------------------------------------------------------------


def conditions(threads: int, runs: int) -> str:
    """What the latencies depend on, in one sentence."""
    cpu, kind = Path("/proc/cpuinfo"), platform.machine()
    text = cpu.read_text() if cpu.exists() else ""
    kind += ", AVX-512" if "avx512f" in text else ", AVX2" if "avx2" in text else ""
    return (
        f"Target: {TARGET:.0%} of the MACs. Latency: ONNX Runtime, CPU ({kind}), batch 1, "
        f"{threads} thread(s), median of {runs} rounds, every model once in each round; "
        "speed-up: median and quartiles of the rounds' ratios to the original. Every tool looks at "
        "weights alone (graphprune: `--fast`)."
    )


def markdown(rows: list[Row], sentence: str) -> str:
    lines = ["# graphprune beside its peers", "", sentence, ""]
    lines += [f"| {' | '.join(HEAD)} |", "|---|---|" + "---:|" * (len(HEAD) - 2)]
    lines += [f"| {' | '.join(row.cells())} |" for row in rows]
    notes = [f"- {note}" for row in rows for note in row.notes()]
    lines += ["", "## What failed, and what was done instead", "", *notes] if notes else []
    return "\n".join([*lines, "", "Made by `tools/benchmark_peers.py`.", ""])


def show(rows: list[Row]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 150)
    table = Table(*HEAD[:2], title=f"Pruned to {TARGET:.0%} of the MACs")
    for title in HEAD[2:]:
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(*row.cells(), end_section=row is rows[-1] or row.tool == PEERS[-1].name)
    console.print(table)
    for row in rows:
        for note in row.notes():
            console.print(f"• {note}", markup=False, highlight=False)


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--models", type=Path, nargs="+", default=[MODELS], metavar="PATH")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmark_peers.md")
    parser.add_argument("--workdir", type=Path, help="environment, models and results")
    parser.add_argument("--only", default="", help="comma-separated names of models in a folder")
    parser.add_argument("--threads", type=int, default=1, help="threads of every tool and model")
    parser.add_argument("--runs", type=int, default=31, help="timed rounds")
    parser.add_argument("--peer-cache", action="store_true", help="reuse the peers' results")
    parser.add_argument("--refresh", action="store_true", help="run the peers all the same")
    parser.add_argument("--skip-graphprune", action="store_true", help="only the peers")
    arguments = parser.parse_args()
    workdir = arguments.workdir or Path(tempfile.gettempdir()) / "graphprune-peers"
    arguments.workdir = workdir.resolve()
    arguments.workdir.mkdir(parents=True, exist_ok=True)
    only = [name.strip() for name in arguments.only.split(",") if name.strip()]

    os.environ.update({name: str(arguments.threads) for name in THREADS})
    python = peer_python(arguments.workdir)
    rows: list[Row] = []
    given = [path.resolve() for path in arguments.models]
    for model in models(given, only, arguments.workdir, python):
        print(f"{model.stem} …", file=sys.stderr)
        rows += compare(model, arguments, python)
    show(rows)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(markdown(rows, conditions(arguments.threads, arguments.runs)))


if __name__ == "__main__":
    main()
