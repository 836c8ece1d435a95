"""What a model too large to be run here can still be asked for: weights alone, proved on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from graphprune.errors import UsageError
from graphprune.model import Model
from graphprune.options import Options

COPIES = 4  # of the weights: two sessions, each with its own packed copy, and what is repaired
UNKNOWN = 1 << 62  # free bytes where the system does not say: as if there were enough


def free_memory() -> int:
    """Bytes that this process may still take."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return UNKNOWN
    found = [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable")]
    return found[0] if found else UNKNOWN


def too_large(model: Model) -> bool:
    """Whether running it twice, and repairing weights, takes more memory than is free."""
    return COPIES * model.weight_bytes > free_memory()


def fitted(options: Options, model: Model) -> tuple[Options, tuple[str, ...]]:
    """The options for a model of this size, and what had to be left out, in words.

    Defaults give way; what the user asked for by name and does not fit raises ``UsageError``.
    """
    if not too_large(model):
        return options, ()
    free = free_memory()
    sizes = f"{model.weight_bytes / 1e9:.1f} GB of weights, {free / 1e9:.1f} GB of memory free"
    asked = {
        "--calib": options.calib is not None,
        "--max-drop": options.max_drop is not None,
        "--search": options.search > 0,
        "--spread solved": options.spread == "solved",
        "--eval": options.eval_data is not None,
        "--min-speedup": options.min_speedup is not None,
    }
    if any(asked.values()):
        names = ", ".join(name for name, given in asked.items() if given)
        raise UsageError(
            f"the model is too large to be run here: {sizes}",
            f"{names} would run it",
            "Leave that out, or go where there is more memory.",
        )
    smaller = replace(
        options,
        criterion=options.criterion or (None if options.from_outside else "l1"),
        repair=options.repair or "none",
        measure=False,
    )
    by_weights = options.criterion is None and not options.from_outside
    left = [f"planned by {smaller.criterion} (weights alone)"] if by_weights else []
    left += ["weights not repaired"] if options.repair is None else []
    left += ["latency not measured"] if options.measure else []
    note = f"the model is too large to be run here ({sizes}): {', '.join(left)}"
    return smaller, (note,) if left else ()
