"""`fedsim sweep`: a line for every cell, then the table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedsim import json_text
from fedsim.cli_options import Debug, Json, Runs, Set, Verbose
from fedsim.session import Session

if TYPE_CHECKING:
    from fedsim.sweep import Cell, Sweep


def sweep(
    file: Annotated[str, typer.Argument(hidden=True)],
    *,
    grid: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=V1,V2", help="Values of a key (repeat for others); wins over [sweep]."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=V1,V2", help="Run the cells with these values alone (repeat)."),
    ] = None,
    overrides: Set = None,
    name: Annotated[str | None, typer.Option(help="Name of the sweep folder (default: NAME-sweep).")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Cells that run side by side.")] = 1,
    as_json: Json = False,
    folder: Runs = None,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Run every combination of some keys (resumable).

    FILE is an experiment file or the name of a shipped one. The same command goes on where it stopped:
    finished cells are not run again.
    """
    with Session(debug=debug, verbose=verbose, on_stderr=as_json) as session:
        session.on_interrupt = "interrupted; the same command goes on"
        with session.loading(f"sweep of {Path(file).stem}"):
            from fedsim import config
            from fedsim.sweep import Sweep, check_overrides, chosen, parse_grid

            base = config.load(file, overrides or [])
            found = Sweep.open(base, parse_grid(grid or []), name=name, parent=folder)
            check_overrides(overrides or [], found.cells)
            wanted = parse_grid(only or [], "--only")
            chosen(wanted, found.cells)
        results = _run_cells(session, found, jobs=jobs, debug=debug, only=wanted)
        _show_sweep(session, found, results)
        if as_json:
            print(json_text.dump({"sweep": str(found.folder), "results": results}))
        if any("error" in result for result in results):
            raise typer.Exit(1)


def _run_cells(
    session: Session, found: Sweep, *, jobs: int, only: dict[str, list[Any]], debug: bool
) -> list[dict[str, Any]]:
    """Run a sweep, one line per cell."""
    total = len(found.cells)
    width = len(str(total))

    def after(number: int, cell: Cell, result: dict[str, Any]) -> None:
        from rich.markup import escape

        if "summary" in result:
            summary = result["summary"]
            mark, text = "[green]✓[/]", f"{summary['accuracy_start']:.3f} → {summary['accuracy']:.3f}"
        else:
            mark, text = "[red]✗[/]", escape(str(result["error"]).splitlines()[0])
        line = f"{mark} {number:>{width}}/{total}  {escape(cell.label)}  {text}"
        session.console.print(line, highlight=False, soft_wrap=True)

    return found.run(
        lambda cell: session.watching(cell.experiment), after=after, stop_on_error=debug, jobs=jobs, only=only
    )


def _show_sweep(session: Session, found: Sweep, results: list[dict[str, Any]]) -> None:
    """The grouped table and where the files are."""
    from fedsim.sweep_table import columns_of, rows_of
    from fedsim.terminal import grid

    rows = rows_of(results)
    columns = columns_of(rows)
    keys = {key for cell in found.cells for key in cell.keys}
    alike = {k for k in columns if k in keys and len({row.get(k) for row in rows}) == 1 < len(rows)}
    table = grid()
    table.show_header, table.header_style = True, "dim"
    shown = [column for column in columns if column not in alike]
    for column in shown:
        if column in keys:  # `tuning.name` -> `tuning`, `client.lr` -> `lr`: 80 columns are few
            table.add_column(column.removesuffix(".name").rpartition(".")[2], no_wrap=True)
        else:
            table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(row.get(column, "") for column in shown))
    console = session.console
    console.print()
    if alike:
        console.print(*(f"{k}={rows[0][k]}" for k in columns if k in alike), highlight=False, markup=False)
    wide = console.measure(table, options=console.options.update(max_width=10_000)).maximum
    # a line that is folded by the terminal says more than a column that is cut off
    console.print(table, highlight=False, width=max(wide, console.width), crop=False, soft_wrap=True)
    console.print()
    session.facts({"sweep": str(found.folder), "table": str(found.folder / "table.md")})
