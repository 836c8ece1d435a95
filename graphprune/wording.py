"""How messages put numbers, names and sizes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence


def counted(number: int, one: str, many: str = "") -> str:
    """``1 channel``, ``2 channels``; ``many`` where it is not ``one`` and an s."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def listed(names: Iterable[object], nothing: str = "nothing") -> str:
    """``a, b, c``."""
    return ", ".join(map(str, names)) or nothing


def shape_text(dims: Sequence[int | None] | None) -> str:
    """``[N, 3, 8, 8]``: N where a size is left open; ``?`` where not even the rank is known."""
    if dims is None:
        return "?"
    return f"[{', '.join('N' if size is None else str(size) for size in dims)}]"


def lengths_text(lengths: Mapping[str, int]) -> str:
    """``ids 4, mask 3``."""
    return listed(f"{name} {length}" for name, length in lengths.items())
