"""The command line: every expected error is one message and its exit code."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import click

from graphprune.commands import blocks, look, prune, targets  # noqa: F401  (each adds its own)
from graphprune.commands.group import cli
from graphprune.errors import GraphPruneError, UsageError

INTERRUPTED = 130
INTERRUPTION = "interrupted; nothing was written"


def main() -> None:
    """Entry point."""
    try:
        code = cli.main(standalone_mode=False)
        sys.stdout.flush()
        if code:
            sys.exit(code)
    except GraphPruneError as error:
        notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", ()))
        click.echo(f"graphprune: error: {error}{notes}", err=True)
        _fail(error.exit_code, error.what, f"{error.where}{notes}".strip(), error.hint)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.Abort:
        click.echo(f"graphprune: {INTERRUPTION}", err=True)
        _fail(INTERRUPTED, INTERRUPTION)
    except click.ClickException as error:
        error.show()
        _fail(UsageError.exit_code, error.format_message())
    except BrokenPipeError:  # the reader has seen enough; Python's own flush must not complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        sys.stdout = None  # its flush at exit would fail once more
        click.echo(f"graphprune: error: cannot write the report: {error.strerror}", err=True)
        sys.exit(UsageError.exit_code)
    except MemoryError:
        click.echo("graphprune: error: out of memory", err=True)
        _fail(GraphPruneError.exit_code, "out of memory")


def _fail(code: int, what: str, where: str = "", hint: str = "") -> NoReturn:
    """End with ``code``; where JSON was asked for, stdout says why too."""
    if "--json" in sys.argv[1:]:  # looked up here: the command line itself may be what is wrong
        from graphprune.report.failure import failure_json

        try:
            click.echo(failure_json(what, where, hint, code))
        except OSError:
            sys.stdout = None  # its flush at exit would fail once more
    sys.exit(code)


if __name__ == "__main__":
    main()
