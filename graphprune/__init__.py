"""graphprune: makes trained ONNX models physically smaller and faster."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["GraphPruneError", "Options", "Result", "__version__", "apply", "prune"]


def __getattr__(name: str) -> Any:
    """Import on first use, so that ``import graphprune`` and ``graphprune --help`` stay quick."""
    if name == "GraphPruneError":
        from graphprune.errors import GraphPruneError

        return GraphPruneError
    if name in ("prune", "apply", "Options", "Result"):
        from graphprune import api

        return getattr(api, name)
    raise AttributeError(f"module 'graphprune' has no attribute {name!r}")
