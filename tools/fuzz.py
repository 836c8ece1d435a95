"""Run the program on mutated models; any crash, hang, stray file or traceback is a fault.

    python tools/fuzz.py --models 10000 --seed 0

Every model has a seed of its own: `--models 1 --seed N` makes it again, `--keep FOLDER` writes its
files. All that a run imports is imported once, and each run is a fork. Every
hundred models it says how to go on after an interruption.
"""

from __future__ import annotations

import argparse
import collections
import multiprocessing
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from fence import files_and_arguments, run_mutated, warm

FAILED_PROOF = 5  # exit code: no fault of the program's ways, but worth a look


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="write the first seed's model here, run nothing")
    given = parser.parse_args()
    if given.keep is not None:
        given.keep.mkdir(parents=True, exist_ok=True)
        print(files_and_arguments(random.Random(given.seed), given.keep))
        return
    warm()
    start, codes, faults = time.perf_counter(), collections.Counter[int](), []
    slowest = 0.0
    seeds = range(given.seed, given.seed + given.models)
    with multiprocessing.get_context("fork").Pool(given.jobs) as pool:
        for done, outcome in enumerate(pool.imap(run_mutated, seeds), 1):
            codes[outcome.code] += 1
            slowest = max(slowest, outcome.seconds)
            if outcome.fault:
                faults.append(outcome)
                last = outcome.said.strip().splitlines()[-1:] or [""]
                print(f"seed {outcome.seed}: {outcome.fault} [{outcome.kinds}] {last[0][:200]}")
            if outcome.code == FAILED_PROOF:
                print(f"seed {outcome.seed}: a proof failed [{outcome.kinds}]")
            if done % 100 == 0:
                spent = time.perf_counter() - start
                print(
                    f"{done} models, {len(faults)} faults, {spent:.0f} s, slowest {slowest:.1f};",
                    f"what is left: --seed {given.seed + done} --models {given.models - done}",
                )
            sys.stdout.flush()
    print(f"{given.models} models in {time.perf_counter() - start:.0f} s; slowest {slowest:.1f} s")
    for code, count in sorted(codes.items()):
        print(f"exit {code:4d}: {count}")
    print(f"{len(faults)} faults" + "".join(f" {f.seed}" for f in faults[:50]))
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
