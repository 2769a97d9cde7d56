"""Options and arguments that several commands have."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated

import click
import typer
from typer.core import TyperCommand, TyperGroup

from fedsim.errors import nearest

# Arguments are explained in the docstrings: click 8.5 drops the help that typer 0.20 gives them.
File = Annotated[str | None, typer.Argument(hidden=True)]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", hidden=True)]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key (repeat).")]
RunConfig = Annotated[
    list[str] | None,
    typer.Option(
        "--run-config", "-c", metavar="'A=1 B=2'|TOML", help="Keys of a Flower app's config (repeat)."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show what libraries log and warn of.")]
Runs = Annotated[
    Path | None, typer.Option("--folder", help="Where run folders are (default: FEDSIM_RUNS or runs).")
]


class Commands(TyperGroup):
    """Names the nearest command, once: click and typer each do it on their own."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As ever; an unknown command ends in a usage error."""
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            ctx.fail(f"No such command '{name}': {nearest(name, self.commands)}")
        return super().resolve_command(ctx, args)


class Command(TyperCommand):
    """A command of ours: an option that is a key of the experiment is answered with `--set`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As ever; click empties `args`."""
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            ours = {option for parameter in self.params for option in parameter.opts}
            option = error.option_name
            misspelt = "." not in option and get_close_matches(option, ours, cutoff=0.75)
            if "--set" not in ours or misspelt:
                raise  # click names what is close
            text = f"{error.message.rstrip('.')}; {_hint(option, given, grid='--grid' in ours)}"
            raise click.NoSuchOption(option, message=text, ctx=error.ctx) from None

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """As ever, but `[default: 4]` as it is: typer 0.20 escapes the bracket for markup that is off."""
        super().format_options(ctx, formatter)
        formatter.buffer = [text.replace("\\[", "[") for text in formatter.buffer]


def _hint(option: str, given: Sequence[str], *, grid: bool) -> str:
    """How the key that an unknown option is, or seems to be, is set."""
    key = _key_like(option.lstrip("-").replace("-", "_"))
    if key is None:
        return "keys of the experiment are given with --set, such as --set client.lr=0.01"
    value = "VALUE"
    for text, after in zip(given, [*given[1:], "-"], strict=True):
        name, equals, rest = text.partition("=")
        if name == option and (equals or not after.startswith("-")):
            value = rest if equals else after
    setter = "--grid" if grid and "," in value else "--set"
    return f"a key of the experiment is given with {setter} {key}={value}"


def _key_like(word: str) -> str | None:
    """`rounds` -> `rounds`, `strategy` -> `strategy.name`, `shots` -> `partition.shots`, `a.b` -> `a.b`."""
    from fedsim import settings

    if "." in word or word in inspect.signature(settings.top_keys).parameters:
        return word
    if word in settings.DEFAULT_NAMES:
        return f"{word}.name"
    for section, keys in {**settings.COMMON, **settings.SETTINGS}.items():
        if word in inspect.signature(keys).parameters:
            return f"{section}.{word}"
    return None
