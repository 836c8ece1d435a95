"""What a user of a tool that takes only a ratio does: try ratios until the target is met."""

import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Found(Generic[T]):
    """The best try: the most MACs within the limit, or the fewest if none came within it."""

    result: T
    ratio: float
    macs: int
    tries: int
    seconds: float


def bisect_ratio(
    attempt: Callable[[float], tuple[int, T]], limit: float, tries: int, slack: float
) -> Found[T]:
    """Bisect the pruning ratio so that the MACs are at most `limit`, as near to it as can be.

    attempt: ratio in (0, 1) → (MACs, result). Stops early once the MACs are within `slack` of the
    limit. seconds: the wall time of all tries.
    """
    began = time.perf_counter()
    low, high = 0.0, 1.0
    best: tuple[tuple[bool, int], float, int, T] | None = None
    count = 0
    while count < tries:
        count += 1
        ratio = (low + high) / 2
        macs, result = attempt(ratio)
        rank = (macs <= limit, macs if macs <= limit else -macs)
        if best is None or rank > best[0]:
            best = rank, ratio, macs, result
        if limit - slack <= macs <= limit:
            break
        low, high = (low, ratio) if macs <= limit else (ratio, high)
    if best is None:
        raise ValueError("no tries")
    _, ratio, macs, result = best
    return Found(result, ratio, macs, count, time.perf_counter() - began)


def emit(document: dict[str, Any]) -> None:
    """Print the one JSON document of a runner, on the last line of stdout."""
    sys.stdout.flush()
    print("\n" + json.dumps(document), flush=True)


def reason(error: BaseException) -> str:
    """One line that names an error, without the folders of this machine."""
    text = " ".join(re.sub(r"(/[\w.-]+)+/(?=[\w.-]+\.onnx)", "", str(error)).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
