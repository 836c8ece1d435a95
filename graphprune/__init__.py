"""graphprune: makes trained ONNX models physically smaller and faster."""

from __future__ import annotations

from typing import Any

from graphprune.version import __version__

__all__ = ["GraphPruneError", "Options", "Result", "__version__", "apply", "prune"]


def __getattr__(name: str) -> Any:
    """Import on first use, so that ``import graphprune`` and ``graphprune --help`` stay quick."""
    if name == "GraphPruneError":
        from graphprune.errors import GraphPruneError

        return GraphPruneError
    if name in ("prune", "apply", "Options", "Result"):
        from graphprune import api  # where all four names are at hand

        return getattr(api, name)
    raise AttributeError(f"module 'graphprune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
