"""What a lossless clean-up did, in numbers and in words."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from graphprune.pipeline import Change, Skipped
from graphprune.wording import counted

DEAD, CONSTANT, DUPLICATE = "dead units", "constant units", "duplicate units"
BRANCH, MASK = "branch", "mask"  # what else passes of the clean-up say that they change
COUNTED = (DEAD, CONSTANT, DUPLICATE)


@dataclass(frozen=True)
class Cleaned:
    """Changes in the order that they were made, and what was left alone."""

    changes: tuple[Change, ...] = ()
    skipped: tuple[Skipped, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.changes)

    @property
    def counts(self) -> dict[str, int]:
        """How many units left by reason, branches were bypassed and masks multiplied in."""
        found: Counter[str] = Counter()
        for change in self.changes:
            if change.what in COUNTED:
                found[change.what] += int(change.before) - int(change.after)
            elif change.what in (BRANCH, MASK):
                found[change.what] += 1
        return {what: found[what] for what in (*COUNTED, BRANCH, MASK)}

    @property
    def notes(self) -> list[str]:
        """What the report says of it."""
        counts = self.counts
        said = [f"{counts[what]} {what.split()[0]}" for what in COUNTED if counts[what]]
        places = len({change.node for change in self.changes if change.what in COUNTED})
        units = "unit" if sum(counts[what] for what in COUNTED) == 1 else "units"
        removed = f"{' and '.join(said)} {units} of {counted(places, 'group')} removed"
        lines = [removed] if said else []
        if counts[BRANCH]:
            of_branches = counted(counts[BRANCH], "branch", "branches")
            lines.append(f"{of_branches} of constants bypassed")
        lines += (
            [f"{counted(counts[MASK], 'mask')} multiplied into weights"] if counts[MASK] else []
        )
        found = [f"lossless: {'; '.join(lines)}"] if lines else []
        for entry in self.skipped[:1]:
            more = f" and {len(self.skipped) - 1} more" if len(self.skipped) > 1 else ""
            found.append(f"lossless: {entry.node}{more}: {entry.reason}")
        return found

    def document(self) -> dict[str, Any]:
        """The same for a program."""
        names = [what.split(maxsplit=1)[0] for what in self.counts]
        return {
            **dict(zip(names, self.counts.values(), strict=True)),
            "groups": [
                {
                    "name": change.node,
                    "why": change.what.split()[0],
                    "before": int(change.before),
                    "after": int(change.after),
                }
                for change in self.changes
                if change.what in COUNTED
            ],
            "left_alone": [{"name": e.node, "reason": e.reason} for e in self.skipped],
        }
