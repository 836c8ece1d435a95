"""The command line: every expected error is one message and its exit code."""

from __future__ import annotations

import os
import sys

import click

from graphprune.commands import blocks, look, prune, targets  # noqa: F401  (each adds its own)
from graphprune.commands.group import cli
from graphprune.errors import GraphPruneError, UsageError

INTERRUPTED = 130


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
        sys.exit(error.exit_code)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.Abort:
        click.echo("graphprune: interrupted; nothing was written", err=True)
        sys.exit(INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(UsageError.exit_code)
    except BrokenPipeError:  # the reader has seen enough; Python's own flush must not complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        sys.stdout = None  # its flush at exit would fail once more
        click.echo(f"graphprune: error: cannot write the report: {error.strerror}", err=True)
        sys.exit(UsageError.exit_code)
    except MemoryError:
        click.echo("graphprune: error: out of memory", err=True)
        sys.exit(GraphPruneError.exit_code)


if __name__ == "__main__":
    main()
