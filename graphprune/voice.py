"""Who hears what: data on stdout, people's text beside it, nothing where quiet was asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from graphprune.result import Result


class Voice:
    """Data on stdout, people's text on stderr where data was asked for, nothing where quiet."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.as_json: bool = given["as_json"]
        self.quiet: bool = given["quiet"]
        self.per_operator: bool = given.get("per_operator", False)
        self._said = ""

    def stage(self, name: str) -> AbstractContextManager[Callable[[float], None]]:
        """A progress bar on a terminal, a line elsewhere; what it gives takes the share done."""
        if not self.quiet and sys.stderr.isatty():
            return self._bar(name)
        if not self.quiet:
            self._line(name)
        return nullcontext(lambda share: None)

    def _line(self, name: str) -> None:
        """Once where a stage comes twice in a row."""
        if name == self._said:
            return
        self._said = name
        with suppress(OSError):  # a log that nobody reads any more is no reason to stop working
            click.echo(f"graphprune: {name} …", err=True)

    @staticmethod
    @contextmanager
    def _bar(name: str) -> Iterator[Callable[[float], None]]:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task(name, total=None)  # without a share yet, it pulses
            yield lambda share: progress.update(task, total=1.0, completed=share)

    def content(self, text: Any, document: dict[str, Any]) -> None:
        from rich.console import Console

        from graphprune.report.document import to_json

        if self.as_json:
            click.echo(to_json(document))
        elif not self.quiet:
            wide = None if sys.stdout.isatty() else 120
            Console(width=wide, markup=False, highlight=False).print(text)

    def result(self, result: Result, model: Path, output: Path) -> None:
        from rich.console import Console
        from rich.text import Text

        from graphprune.report.document import result_document, to_json
        from graphprune.report.terminal import result_table

        if self.as_json:
            click.echo(to_json(result_document(result, model, output)))
        if not self.quiet:
            terminal = sys.stderr if self.as_json else sys.stdout
            wide = None if terminal.isatty() else 120
            console = Console(file=terminal, width=wide, highlight=False)
            console.print(result_table(result, self.per_operator))
            written = f"written: {output}{' (replaced)' if result.replaced else ''}"
            console.print(Text(written, style="bold"), soft_wrap=True)
