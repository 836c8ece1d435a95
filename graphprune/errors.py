"""The errors a user sees: what is wrong, where, and how to go on. Each class owns an exit code."""

from __future__ import annotations

from typing import ClassVar


class GraphPruneError(Exception):
    """Bad input or an unreachable goal: what is wrong, where it is, and a hint how to go on."""

    exit_code: ClassVar[int] = 3

    def __init__(self, what: str, where: str = "", hint: str = "") -> None:
        super().__init__(what, where, hint)
        self.what = what
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        place = f" ({self.where})" if self.where else ""
        advice = f"\n  {self.hint}" if self.hint else ""
        return f"{self.what}{place}{advice}"


class UsageError(GraphPruneError):
    """An option is wrong, or a path that the user named cannot be read or written."""

    exit_code = 2


class ModelError(GraphPruneError):
    """The model is invalid, or nothing here can run it."""

    exit_code = 3


class UncomputableError(ModelError, ValueError):
    """A constant that the graph computes cannot be had; a rule that asks for it is refused."""


class EndlessError(GraphPruneError):
    """A run of the model did not end in time; no other sizes or branches are tried then."""

    exit_code = 3


class TargetError(GraphPruneError):
    """The budget cannot be reached."""

    exit_code = 4


class VerificationError(GraphPruneError):
    """The cut model does not compute what the original with zeroed consumers computes."""

    exit_code = 5


class AccuracyGateError(GraphPruneError):
    """The result loses more accuracy than the gate allows."""

    exit_code = 6


class LatencyGateError(GraphPruneError):
    """The result is slower than the gate allows."""

    exit_code = 7


class NothingPrunableError(GraphPruneError):
    """Everything in the model is pinned."""

    exit_code = 8
