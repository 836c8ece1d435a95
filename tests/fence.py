"""Run the program on one mutated model in a process of its own, fenced in time and memory."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx
from mutations import MUTATIONS, bytes_of, spoil_external
from seeds import any_model

SECONDS = 120  # of which a busy machine may take most
MEMORY = 6 << 30  # bytes of address space beyond what the process has when it starts
DOCUMENTED = frozenset(range(9))
QUICK = ("--criterion", "l1", "--repair", "none", "--no-measure")
COMMON = ("--target-flops", "0.7", "--round-to", "1", "--min-channels", "1", "--samples", "4")


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its exit code (negative: the signal), and what was wrong with that."""

    seed: int
    kinds: str
    code: int
    seconds: float
    fault: str
    said: str


def run_mutated(seed: int) -> Outcome:
    """Make the mutated model of ``seed``, run the program on it, and judge how it ended."""
    choose = random.Random(seed)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        (root / "secret").write_bytes(b"s" * 100_000)
        folder = root / "model"
        folder.mkdir()
        kinds = write_mutated(choose, folder / "model.onnx")
        options = QUICK if choose.random() < 0.98 else ()
        return judged(seed, kinds, root, folder / "model.onnx", (*COMMON, *options))


def warm() -> None:
    """Import, once and before the forks, what a run imports; no session is opened here."""
    import onnxruntime  # noqa: F401
    from graphs import random_cnn

    from graphprune import api, cli  # noqa: F401
    from graphprune.report import document, terminal  # noqa: F401

    api.prune(random_cnn(3), flops=0.7, round_to=1, min_channels=1, allow_miss=True,
              criterion="l1", repair="none", verify=False, measure=False)  # fmt: skip


def write_mutated(choose: random.Random, path: Path) -> str:
    """Write a mutated model to ``path``; returns the kinds of damage."""
    model = any_model(choose)
    kinds = []
    for _ in range(choose.choice((1, 1, 1, 2, 4))):
        mutate = choose.choice(MUTATIONS)
        try:
            mutate(model, choose)
        except Exception:  # an earlier mutation took what this one edits
            continue
        kinds.append(mutate.__name__)
    if model.ByteSize() > 1 << 30:
        return "too large"
    path.write_bytes(model.SerializeToString())
    kind = choose.random()
    if kind < 0.1:
        path.write_bytes(bytes_of(path.read_bytes(), choose))
        kinds.append("bytes")
    elif kind < 0.2:
        spoil_external(path, choose)
        kinds.append("external")
    return " ".join(kinds)


def judged(seed: int, kinds: str, root: Path, path: Path, options: tuple[str, ...]) -> Outcome:
    """Run the program on ``path``. A fault is anything but a result that runs, or one refusal."""
    before = contents(root)
    out = path.with_name("out.onnx")
    start = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        code = fenced(lambda: program(str(path), *options, "-o", str(out)), said.fileno())
        seconds = time.perf_counter() - start
        said.seek(0)
        text = said.read().decode(errors="replace")
    after = contents(root)
    shutil.rmtree(path.parent / ".graphprune", ignore_errors=True)
    return Outcome(seed, kinds, code, seconds, fault(code, text, before, after), text)


def fault(code: int, text: str, before: dict[str, bytes], after: dict[str, bytes]) -> str:
    """What is wrong with the end of a run; empty where nothing is."""
    new = {name for name in after.keys() - before.keys() if ".graphprune" not in name}
    heads = sum(line.startswith(STARTS) for line in text.splitlines())
    whole = {"model/out.onnx", "model/out.onnx.data"}
    wrong = {
        f"signal {-code}": code < 0,
        "traceback": "Traceback" in text,
        f"undocumented exit code {code}": code > max(DOCUMENTED),
        "a file that was there has changed": {name: after.get(name) for name in before} != before,
        f"left behind: {sorted(new)}": code != 0 and bool(new),
        "not one error message": code > 0 and heads != 1,
        f"wrote {sorted(new)}": code == 0 and not {"model/out.onnx"} <= new <= whole,
        "the result is unreadable": code == 0 and not readable(after.get("model/out.onnx", b"")),
    }
    return "; ".join(name for name, true in wrong.items() if true)


def readable(content: bytes) -> bool:
    try:
        return bool(onnx.load_model_from_string(content).graph.node)
    except ValueError:
        return False


STARTS = ("graphprune: error:", "Error:")


def contents(root: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(root)): p.read_bytes()
        for p in sorted(root.rglob("*"))
        if p.is_file() and not p.is_symlink()
    }


def program(*arguments: str) -> None:
    from graphprune import cli

    sys.argv = ["graphprune", *arguments]
    cli.main()


def fenced(work: Callable[[], None], said: int) -> int:
    """Exit code of ``work`` in a forked process that writes to ``said``; negative for a signal."""
    child = os.fork()
    if not child:
        _inside(work, said)
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGALRM)  # nothing here handles it: an end with a name
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _inside(work: Callable[[], None], said: int) -> None:
    """The forked process: limits, then the work; never returns."""
    code = 1
    try:
        os.dup2(said, 1)
        os.dup2(said, 2)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        try:
            work()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            import traceback

            traceback.print_exc()
        sys.stdout.flush() if sys.stdout else None
        sys.stderr.flush()
    finally:
        os._exit(code)
