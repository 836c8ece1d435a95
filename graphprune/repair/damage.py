"""What a repair is given, and what it says it did."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from graphprune.coupling import Coupling, Mask
from graphprune.model import Model
from graphprune.runtime import Feeds
from graphprune.shapes import Shapes


def silent(share: float) -> None:
    """No progress display."""


@dataclass(frozen=True)
class Damage:
    """A cut model and what it was cut from; tensors and weights keep their names in all of them.

    ``normal`` is the analysed model, ``original`` the same with BatchNormalization folded where
    that is exact, ``pruned`` the cut one, folded alike. ``alive`` says which slots survive.
    ``feeds`` are the calibration inputs in chunks (none for repairs that look at weights alone);
    ``memory`` is in bytes.
    """

    normal: Model
    original: Model
    pruned: Model
    shapes: Shapes
    coupling: Coupling
    alive: Mask
    feeds: Sequence[Feeds] = ()
    memory: float = 4e9
    seed: int = 0
    progress: Callable[[float], None] = silent


@dataclass(frozen=True)
class Repaired:
    """One operator's repair; errors are squared, over the variance of its output. Of several that
    share a ``weight`` it says how many ``uses`` there are, and names the first."""

    node: str
    how: str
    before: float | None = None
    after: float | None = None
    weight: str | None = None
    uses: int = 1

    def __str__(self) -> str:
        how = f"{self.how}, {self.uses} uses of {self.weight}" if self.weight else self.how
        if self.before is None or self.after is None:
            return f"{self.node}: {how}"
        return f"{self.node}: {self.before:.3g} -> {self.after:.3g} ({how})"


@dataclass(frozen=True)
class Repair:
    """A way to repair, by name (plug-in point). ``run`` gives the repaired model and a report."""

    name: str
    run: Callable[[Damage], tuple[Model, tuple[Repaired, ...]]]
    needs_inputs: bool = True
    doc: str = ""
