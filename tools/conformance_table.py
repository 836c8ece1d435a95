"""Hold every rule against ONNX's one-operator models and write the table of operators.

python -m tools.conformance_table --out docs/operators.md
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import Counter, defaultdict
from pathlib import Path

from onnx.backend.test.loader import load_model_tests

from graphprune.conformance import CaseResult, run_case, run_text
from graphprune.rules import BUILTIN
from tools.contrib_cases import CASES, model

HEAD = """# Operators

Made by `python -m tools.conformance_table --out docs/operators.md`: every rule against all
one-operator models of `onnx.backend.test` (kind `node`) and those of `tools/contrib_cases.py`, for
the operators that only ONNX Runtime has (`com.microsoft`), with the law
`f(slice(x)) == slice(f(zero(x)))`, in ONNX Runtime, or in ONNX's reference evaluator where ONNX
Runtime lacks the operator. `passed`: slots were removed and the law held. `pinned`: nothing may
leave, for the reason given (often because the case's axes are of size 1 or all spatial; such
operators have cases of their own in `tests/test_rules.py`). `failed` must be empty.

"""


def rows(results: list[CaseResult]) -> list[tuple[str, ...]]:
    by_operator: dict[str, list[CaseResult]] = defaultdict(list)
    for result in results:
        by_operator[result.operator].append(result)
    ruled = {f"{domain}.{name}" if domain else name for domain, name in BUILTIN}
    table = []
    for operator in sorted(by_operator, key=lambda name: (name not in ruled, name)):
        mine = by_operator[operator]
        states = Counter(result.state for result in mine)
        why = Counter(result.detail for result in mine if result.state == "pinned")
        reason = why.most_common(1)[0][0] if why else ""
        counts = [str(states[state] or "") for state in ("passed", "pinned", "failed")]
        table.append((operator, "yes" if operator in ruled else "", *counts, reason))
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the table here as markdown")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    results = [run_case(case) for case in load_model_tests(kind="node")]
    results += [run_text(name, model(*case)) for name, case in CASES.items()]
    states = Counter(result.state for result in results)
    total = ", ".join(f"{states[state]} {state}" for state in ("passed", "pinned", "failed"))
    lines = ["| operator | rule | passed | pinned | failed | why pinned (most often) |"]
    lines += ["|---|---|---|---|---|---|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows(results)]
    text = f"{HEAD}{len(results)} cases: {total}.\n\n" + "\n".join(lines) + "\n"
    if given.out:
        given.out.write_text(text)
    print(total)
    for result in results:
        if result.state == "failed":
            print(result.case, result.detail)
    return int(states["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main())
