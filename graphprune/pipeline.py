"""Passes: frozen dataclasses that turn a model into another and say what they changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Protocol, runtime_checkable

from graphprune.analysis import Analysis, Scope, analyse
from graphprune.errors import GraphPruneError, UsageError
from graphprune.facts import Facts, facts_of
from graphprune.model import Array, Model
from graphprune.rules import BUILTIN, Rules

Arrays = Mapping[str, Array]
Carry = Callable[[Arrays], Arrays]


@dataclass(frozen=True)
class Change:
    """One rewrite: which pass changed what on which node or tensor, from what to what, and why."""

    pass_name: str
    node: str
    what: str
    before: str
    after: str
    why: str

    def __str__(self) -> str:
        return f"{self.node}: {self.what} {self.before} -> {self.after} ({self.why})"


@dataclass(frozen=True)
class Skipped:
    """A refusal: what a pass left alone, and why."""

    node: str
    reason: str


def as_they_are(arrays: Arrays) -> Arrays:
    """The ``carry`` of a pass that moves no weight."""
    return arrays


@dataclass(frozen=True)
class PassResult:
    """``carry`` does to arrays that belong to weights (by initialiser, of its shape) what the pass
    did to the weights."""

    model: Model
    changes: tuple[Change, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    carry: Carry = as_they_are

    @property
    def modified(self) -> bool:
        return bool(self.changes)


@dataclass
class Context:
    """What passes share: the rules, the user's scope, and one analysis per model."""

    rules: Rules = field(default_factory=lambda: BUILTIN)
    scope: Scope = field(default_factory=Scope)
    _last: Analysis | None = None
    _facts: Facts | None = None

    def analysis(self, model: Model) -> Analysis:
        """The analysis of ``model``; computed anew only when the model is another object."""
        if self._last is None or self._last.model is not model:
            self._last = analyse(model, self.scope, self.rules)
        return self._last

    def facts(self, model: Model) -> Facts:
        """What weights alone say of every tensor of ``model``; likewise."""
        if self._facts is None or self._facts.model is not model:
            self._facts = facts_of(model, self.analysis(model).shapes)
        return self._facts


@runtime_checkable
class Pass(Protocol):
    """The model is valid before and after ``run``; in between nobody looks."""

    @property
    def name(self) -> str: ...

    def run(self, model: Model, context: Context) -> PassResult: ...


After = Callable[[Pass, PassResult], None]


@dataclass(frozen=True)
class Pipeline:
    """Passes one after the other; itself a pass, so pipelines nest. ``after`` sees every result."""

    passes: Sequence[Pass]
    after: After | None = None
    name: str = "pipeline"

    def run(self, model: Model, context: Context) -> PassResult:
        changes: list[Change] = []
        skipped: list[Skipped] = []
        done: list[str] = []
        carries: list[Carry] = []
        for step in self.passes:
            try:
                result = step.run(model, context)
            except UsageError:
                raise  # a wrong option is no pass's business
            except GraphPruneError as error:
                error.add_note(f"in pass {step.name}, after {', '.join(done) or 'nothing'}")
                raise
            model = result.model
            changes += result.changes
            skipped += result.skipped
            carries.append(result.carry)
            done.append(step.name)
            if self.after is not None:
                self.after(step, result)

        def carry(arrays: Arrays) -> Arrays:
            return reduce(lambda moved, each: each(moved), carries, arrays)

        return PassResult(model, tuple(changes), tuple(skipped), carry)
