"""The program that the commands belong to."""

from __future__ import annotations

import difflib
from pathlib import Path

import click

from graphprune.errors import UsageError
from graphprune.version import __version__


class PruneByDefault(click.Group):
    """`graphprune model.onnx …` means `graphprune prune model.onnx …`."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.commands:
            self._check_model(args[0])
            args = ["prune", *args]
        return super().resolve_command(ctx, args)

    def _check_model(self, name: str) -> None:
        """A word that could be no file's path but a mistyped command is not blamed as a model."""
        if Path(name).name != name or "." in name or Path(name).exists():
            return
        near = difflib.get_close_matches(name, self.commands, n=1)
        meant = f"Did you mean `graphprune {near[0]}`? " if near else ""
        raise UsageError(
            f"there is no command {name!r}, nor a model file of that name",
            hint=f"{meant}`graphprune --help` lists the commands.",
        )

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own = {"--help", "-h", "--version"}
        if args and args[0].startswith("-") and args[0] not in own:
            args = ["prune", *args]
        return super().parse_args(ctx, args)


@click.group(cls=PruneByDefault, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="graphprune")
def cli() -> None:
    """Make a trained ONNX model physically smaller and faster.

    \b
    graphprune model.onnx --target-flops 0.5

    Exit codes: 0 done; 2 usage or files; 3 invalid or unsupported model; 4 budget not reachable;
    5 verification failed; 6 accuracy gate; 7 latency gate; 8 nothing prunable.
    """
