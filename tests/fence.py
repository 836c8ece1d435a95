"""Run the program on one mutated model in a process of its own, fenced in time and memory."""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import onnx
from file_mutations import bytes_of, spoil_external
from graphs import random_cnn
from hostile_files import arrays_file, plan_file, target_file
from hostile_forms import FORMS
from mutations import MUTATIONS
from seeds import OWN, any_model, node_tests

SECONDS = 60  # of computing
PATIENCE = 1800  # seconds in all: a busy machine may take most of them
MEMORY = 6 << 30  # bytes of address space beyond what the process has when it starts
RUN_LIMIT = 1.0  # of one run in ONNX Runtime: endless loops are among the mutations
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
    """Make the mutated files of ``seed``, run the program on them, and judge how it ended."""
    choose = random.Random(seed)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        (root / "secret").write_bytes(b"s" * 100_000)
        folder = root / "model"
        folder.mkdir()
        kinds, arguments = files_and_arguments(choose, folder)
        return judged(seed, kinds, root, arguments)


def files_and_arguments(choose: random.Random, folder: Path) -> tuple[str, tuple[str, ...]]:
    """Write mutated files; returns what was done to them, and a command on them."""
    kind = choose.random()
    make = next(command for limit, command in COMMANDS if kind < limit)
    return make(choose, folder)


def pruned(choose: random.Random, folder: Path) -> tuple[str, tuple[str, ...]]:
    options = QUICK if choose.random() < 0.95 else ()
    path, out = folder / "model.onnx", folder / "out.onnx"
    return write_mutated(choose, path), ("prune", str(path), *COMMON, *options, "-o", str(out))


def inspected(choose: random.Random, folder: Path) -> tuple[str, tuple[str, ...]]:
    path = folder / "model.onnx"
    return write_mutated(choose, path), ("inspect", str(path))


def explained(choose: random.Random, folder: Path) -> tuple[str, tuple[str, ...]]:
    path = folder / "model.onnx"
    kinds = write_mutated(choose, path)
    return kinds, ("explain", str(path), choose.choice((*PLACES, *names_of(path, choose))))


def compared(choose: random.Random, folder: Path) -> tuple[str, tuple[str, ...]]:
    path, other = folder / "model.onnx", folder / "other.onnx"
    kinds = write_mutated(choose, path)
    other.write_bytes(path.read_bytes())
    if choose.random() < 0.7:
        other.write_bytes(any_model(random.Random(choose.randrange(30))).SerializeToString())
    pair = [str(path), str(other)]
    choose.shuffle(pair)
    return kinds, ("compare", *pair)


def applied(choose: random.Random, folder: Path) -> tuple[str, tuple[str, ...]]:
    path, plan, made = sound(choose, folder)
    file = folder / "plan.json"
    kinds = plan_file(file, plan, choose)
    return f"plan {kinds}", ("apply", path, str(file), "--no-measure", "-o", made)


def targeted(choose: random.Random, folder: Path) -> tuple[str, tuple[str, ...]]:
    path, _, made = sound(choose, folder)
    file = folder / "board.toml"
    kinds = f"target {target_file(file, choose)}"
    options = ("--target-flops", "0.7", "--target-hardware", str(file), "--allow-miss", *QUICK)
    return kinds, ("prune", path, *options, "-o", made)


def calibrated(choose: random.Random, folder: Path) -> tuple[str, tuple[str, ...]]:
    path, _, made = sound(choose, folder)
    file = folder / "arrays.npz"
    kinds = arrays_file(file, onnx.load(path), choose)
    options = (*COMMON, "--criterion", "wanda", "--calib", str(file), "--no-measure")
    return f"calib {kinds}", ("prune", path, *options, "-o", made)


def evaluated(choose: random.Random, folder: Path) -> tuple[str, tuple[str, ...]]:
    path, _, made = sound(choose, folder)
    file = folder / "arrays.npz"
    kinds = arrays_file(file, onnx.load(path), choose)
    return f"eval {kinds}", ("prune", path, *COMMON, *QUICK, "--eval", str(file), "-o", made)


def sound(choose: random.Random, folder: Path) -> tuple[str, str, str]:
    """A model as it should be, written; a plan for it; where a result may go."""
    model, plan = choose.choice(planned())
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return str(path), plan, str(folder / "out.onnx")


COMMANDS = (  # and up to which share of all
    (0.6, pruned), (0.66, inspected), (0.72, explained), (0.78, compared), (0.86, applied),
    (0.91, targeted), (0.955, calibrated), (1.0, evaluated),
)  # fmt: skip
PLACES = (
    "",
    ":",
    "x:0",
    "x:0:0",
    "x:-1",
    "x:99",
    "x:0:99999999999999999999",
    "::::",
    "\ud800",
    "y",
)


def names_of(path: Path, choose: random.Random) -> list[str]:
    """Places in the model, where it can be read at all."""
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except Exception:
        return []
    names = [tensor.name for tensor in graph.initializer] + [
        n for m in graph.node for n in m.output
    ]
    return [f"{name[:200]}:{choose.randrange(3)}".replace("\x00", "") for name in names]


@cache
def planned() -> list[tuple[onnx.ModelProto, str]]:
    """Sound models, each with a plan for it."""
    from graphprune import api

    found = []
    for model in (*(make() for make in OWN), *(random_cnn(seed) for seed in range(4))):
        result = api.prune(model, flops=0.7, round_to=1, min_channels=1, allow_miss=True,
                           criterion="l1", repair="none", verify=False, measure=False)  # fmt: skip
        found.append((model, result.plan.to_json()))
    return found


def warm() -> None:
    """Import and make, once and before the forks, what a run needs; no session is opened here."""
    import onnxruntime  # noqa: F401

    from graphprune import cli, comparison, explain  # noqa: F401
    from graphprune.report import document, terminal  # noqa: F401

    node_tests()
    planned()


def write_mutated(choose: random.Random, path: Path) -> str:
    """Write a mutated model to ``path``; returns the kinds of damage."""
    model = any_model(choose)
    kinds = []
    for _ in range(choose.choice((1, 1, 1, 2, 4))):
        mutate = choose.choice(MUTATIONS if choose.random() < 0.7 else FORMS)
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


def judged(seed: int, kinds: str, root: Path, arguments: tuple[str, ...]) -> Outcome:
    """Run the program. A fault is anything but a result that runs, or one refusal."""
    before = contents(root)
    start = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        code = fenced(lambda: program(*arguments), said.fileno())
        seconds = time.perf_counter() - start
        said.seek(0)
        text = said.read().decode(errors="replace")
    after = contents(root)
    found = fault(code, text, before, after, writes=arguments[0] in ("prune", "apply"))
    return Outcome(seed, f"{arguments[0]}: {kinds}", code, seconds, found, text)


def fault(
    code: int, text: str, before: dict[str, bytes], after: dict[str, bytes], writes: bool
) -> str:
    """What is wrong with the end of a run; empty where nothing is."""
    new = {name for name in after.keys() - before.keys() if ".graphprune" not in name}
    heads = sum(line.startswith(STARTS) for line in text.splitlines())
    least = {"model/out.onnx"} if writes else set()
    whole = least | {f"{name}.data" for name in least}
    wrong = {
        f"signal {-code}": code < 0,
        "traceback": "Traceback" in text,
        f"undocumented exit code {code}": code > max(DOCUMENTED),
        "a file that was there has changed": {name: after.get(name) for name in before} != before,
        f"left behind: {sorted(new)}": code != 0 and bool(new),
        "not one error message": code > 0 and heads != 1,
        f"wrote {sorted(new)}": code == 0 and not least <= new <= whole,
        "the result is unreadable": code == 0 and not all(readable(after[n]) for n in least & new),
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
    """In the forked process: nothing that is set here outlives it."""
    from graphprune import cli, runtime

    runtime.RUN_LIMIT = RUN_LIMIT
    sys.argv = ["graphprune", *arguments]
    cli.main()


def fenced(work: Callable[[], None], said: int) -> int:
    """Exit code of ``work`` in a forked process that writes to ``said``; negative for a signal."""
    child = os.fork()
    if not child:
        _inside(work, said)
    deadline = time.monotonic() + PATIENCE
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
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
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
