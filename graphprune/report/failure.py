"""A failure as a program reads it: what is wrong, where, how to go on, and the exit code."""

from __future__ import annotations

import json

from graphprune.version import __version__


def failure_json(what: str, where: str, hint: str, code: int) -> str:
    """The document that stands on stdout in place of a result."""
    error = {"what": what, "where": where, "hint": hint, "code": code}
    document = {"schema": "graphprune.error/1", "graphprune": __version__, "error": error}
    return json.dumps(document, indent=1)
