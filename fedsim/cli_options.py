"""Options and arguments that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import click
import typer
from typer.core import TyperCommand

# Arguments are explained in the docstrings: click 8.5 drops the help that typer 0.20 gives them.
File = Annotated[str | None, typer.Argument(hidden=True)]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", hidden=True)]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key (repeat).")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show what libraries log and warn of.")]
Runs = Annotated[
    Path | None, typer.Option("--folder", help="Where run folders are (default: FEDSIM_RUNS or runs).")
]


class PlainHelp(TyperCommand):
    """A command whose options show `[default: 4]`: typer 0.20 escapes the bracket for markup that is off."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """As ever, without the backslashes."""
        super().format_options(ctx, formatter)
        formatter.buffer = [text.replace("\\[", "[") for text in formatter.buffer]
