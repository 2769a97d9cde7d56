"""The command line. Nothing heavy is imported before a command needs it: `fedsim --help` is instant."""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from fedsim.errors import UserError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from fedsim.config import Experiment
    from fedsim.hooks import Hook
    from fedsim.runs import Run
    from fedsim.sweep import Cell, Sweep

# Read by libraries when they are imported: no telemetry, no progress bars, no fork warnings.
for _switch, _value in {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}.items():
    os.environ.setdefault(_switch, _value)

_CHATTY = ("flwr", "ray", "torch", "datasets", "transformers", "matplotlib", "tensorboard")

app = typer.Typer(
    help="Tune, prompt, un-learn and locally train foundation models across federated clients.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

File = Annotated[str | None, typer.Argument(help="Experiment file or shipped name (default: quickstart).")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key (repeat).")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show what libraries log and warn of.")]
Runs = Annotated[
    Path | None, typer.Option("--folder", help="Where run folders are (default: FEDSIM_RUNS or runs).")
]


# ------------------------------------------------------------------------------------ commands


@app.command()
def run(
    file: File = None,
    *,
    overrides: Set = None,
    name: Annotated[str | None, typer.Option(help="Name of the run folder.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run of the same name.")] = False,
    as_json: Json = False,
    folder: Runs = None,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Run an experiment (the quickstart if no FILE is given)."""
    with _Session(debug=debug, verbose=verbose, on_stderr=as_json) as session:
        with session.loading():
            from fedsim import config
            from fedsim.finish import run_experiment
            from fedsim.runs import Run

            experiment = config.load(file, [*(overrides or []), *_named(name)])
            made = Run.create(experiment, folder, overwrite=overwrite)
        session.on_interrupt = f"interrupted; go on with: fedsim resume {made.folder}"
        if experiment.sweep:
            session.note(f"this is the base experiment; fedsim sweep {file} runs the cells of its [sweep]")
        with _removed_if_unused(made), session.watching(experiment) as hooks:
            result = run_experiment(experiment, made, hooks)
        _close(session, result.run, result.summary, _next_command(made, experiment, file), as_json=as_json)


@app.command()
def resume(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    as_json: Json = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Go on with an interrupted run."""
    with _Session(debug=debug, verbose=verbose, on_stderr=as_json) as session:
        with session.loading():
            from fedsim import finish

            found = _open(folder)
            experiment = found.experiment()
        session.on_interrupt = f"interrupted; go on with: fedsim resume {found.folder}"
        if found.finished:
            session.note(f"{found.folder} is finished already")
        with session.watching(experiment) as hooks:
            result = finish.resume(found.folder, hooks)
        _close(session, found, result.summary, _next_command(found, experiment, None), as_json=as_json)


@app.command()
def sweep(
    file: Annotated[str, typer.Argument(help="Experiment file or shipped name.")],
    *,
    grid: Annotated[
        list[str] | None, typer.Option(metavar="KEY=V1,V2", help="Values of a key (repeat); adds to [sweep].")
    ] = None,
    overrides: Set = None,
    name: Annotated[str | None, typer.Option(help="Name of the sweep folder (default: NAME-sweep).")] = None,
    as_json: Json = False,
    folder: Runs = None,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Run every combination of some keys (resumable).

    The same command goes on where it stopped: finished cells are not run again.
    """
    with _Session(debug=debug, verbose=verbose, on_stderr=as_json) as session:
        session.on_interrupt = "interrupted; the same command goes on"
        with session.loading():
            from fedsim import config
            from fedsim.sweep import Sweep, parse_grid

            base = config.load(file, overrides or [])
            found = Sweep.open(base, parse_grid(grid or []), name=name, parent=folder)
        results = _run_cells(session, found, debug=debug)
        _show_sweep(session, found, results)
        if as_json:
            print(json.dumps({"sweep": str(found.folder), "results": results}))
        if any("error" in result for result in results):
            raise typer.Exit(1)


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="Folders of finished runs.")],
    debug: Debug = False,
) -> None:
    """Show finished runs side by side."""
    with _Session(debug=debug) as session:
        with session.loading():
            from fedsim.compare import comparison

            shown = comparison([_open(folder) for folder in folders])
        session.console.print(shown, highlight=False)


@app.command("list")
def list_(
    kind: Annotated[str | None, typer.Argument(help="strategies, clients, models, tuning, ...")] = None,
    *,
    of: Annotated[str | None, typer.Option(metavar="FILE", help="Draw the split of an experiment.")] = None,
    overrides: Set = None,
    folder: Runs = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show keys, types and defaults.")] = False,
    debug: Debug = False,
) -> None:
    """List what there is (without KIND: the kinds)."""
    with _Session(debug=debug) as session:
        with session.loading():
            from fedsim import config, listing
            from fedsim.runs import default_folder
        if of is None:
            if kind is None:
                listing.show_kinds(session.console)
            else:
                listing.show(session.console, kind, verbose=verbose)
            return
        if kind != "partitions":
            raise UserError(f"--of draws a split: fedsim list partitions --of {of}")
        lines, picture = listing.draw(config.load(of, overrides or []), folder or default_folder())
        for line in lines:
            session.console.print(line, markup=False, highlight=False, soft_wrap=True)
        session.console.print(f"[dim]picture[/]  {picture}", highlight=False, soft_wrap=True)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where to write (default: RUN/export).")
    ] = None,
    debug: Debug = False,
) -> None:
    """Write a run's model as safetensors (and open_clip)."""
    with _Session(debug=debug) as session:
        with session.loading():
            from fedsim import export as exporting

            found = _open(folder)
            report = exporting.export(found, out or found.folder / "export")
        for text in report["notices"]:
            session.note(text)
        session.facts({"exported": report["state"], "folder": report["folder"]})
        session.facts({"files": "  ".join(report["files"])})


@app.command()
def doctor(debug: Debug = False) -> None:
    """Check the installation."""
    with _Session(debug=debug) as session:
        from rich.markup import escape

        from fedsim.doctor import examine

        broken = 0
        for finding in examine(debug=debug):
            mark = "[green]✓[/]" if finding.fix is None else "[red]✗[/]"
            text = f"{mark} {finding.title:<12} {escape(finding.text)}"
            session.console.print(text, highlight=False, soft_wrap=True)
            if finding.fix is not None:
                broken += 1
                session.console.print(f"{'':<15}→ {escape(finding.fix)}", highlight=False, soft_wrap=True)
        if broken:
            raise typer.Exit(1)


def main() -> None:
    """Entry point of the `fedsim` command."""
    try:
        app()
    except KeyboardInterrupt:  # before a command has begun
        sys.exit(130)


# ------------------------------------------------------------------------------------- session


class _Session:
    """One command: where it prints, how quiet libraries are, and how errors end it.

    A UserError is one line and exit code 2, Ctrl-C is exit code 130, anything else exit code 1.

    Attributes:
        on_interrupt: what Ctrl-C prints.
    """

    def __init__(self, *, debug: bool, verbose: bool = False, on_stderr: bool = False) -> None:
        from rich.console import Console

        self.debug = debug
        self.verbose = verbose
        self.console = Console(stderr=on_stderr)
        self.on_interrupt = "interrupted"
        self._quiet = ExitStack()

    def __enter__(self) -> Self:
        if not self.verbose:
            self._quiet.enter_context(_silence())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._quiet.close()
        if isinstance(error, KeyboardInterrupt):
            self._say(self.on_interrupt)
            raise typer.Exit(130) from None
        if not isinstance(error, Exception) or isinstance(error, typer.Exit | BrokenPipeError):
            return
        if self.debug:
            traceback.print_exception(error)
        if isinstance(error, UserError):
            self._say(f"error: {error}")
            raise typer.Exit(2) from None
        hint = "" if self.debug else " (use --debug for the traceback)"
        first = str(error).splitlines()[0] if str(error) else ""
        self._say(f"error: {type(error).__name__}: {first}{hint}")
        raise typer.Exit(1) from None

    def note(self, text: str) -> None:
        """One line that the user should know."""
        from rich.markup import escape

        self.console.print(f"[yellow]note[/]  {escape(text)}", highlight=False, soft_wrap=True)

    def facts(self, pairs: Mapping[str, str]) -> None:
        """Aligned `label  value` lines; values are never wrapped, so that paths can be copied."""
        from rich.markup import escape

        for label, value in pairs.items():
            self.console.print(f"[dim]{label:<10}[/]  {escape(value)}", highlight=False, soft_wrap=True)

    def loading(self) -> AbstractContextManager[Any]:
        """A sign of life while torch and Flower are imported (terminals only)."""
        return self.console.status("[dim]loading[/]") if self.console.is_terminal else nullcontext()

    @contextmanager
    def watching(self, experiment: Experiment) -> Iterator[Sequence[Hook]]:
        """The hooks that show a run: live on a terminal, plain lines elsewhere (and under --verbose)."""
        from fedsim.progress import LiveHook, PlainHook

        if self.console.is_terminal and not self.verbose:
            with LiveHook(self.console, experiment.baselines) as hook:
                yield [hook]
        else:
            yield [PlainHook(self._plain, experiment.baselines)]

    def _plain(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


@contextmanager
def _silence() -> Iterator[None]:
    """No warnings and no log lines below ERROR from libraries."""
    before = {name: logging.getLogger(name).level for name in _CHATTY}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in _CHATTY:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in before.items():
                logging.getLogger(name).setLevel(level)


@contextmanager
def _removed_if_unused(made: Run) -> Iterator[None]:
    """A run that fails before its first round leaves no folder."""
    import shutil

    try:
        yield
    except Exception:
        if not (made.folder / "metrics.jsonl").exists():
            shutil.rmtree(made.folder, ignore_errors=True)
        raise


# ------------------------------------------------------------------------------- what commands share


def _named(name: str | None) -> list[str]:
    return [] if name is None else [f"name={json.dumps(name)}"]


def _open(folder: Path) -> Run:
    """A run folder, by path or by its name in the folder of runs."""
    from fedsim.runs import Run, default_folder

    if not folder.exists() and (default_folder() / folder).is_dir():
        folder = default_folder() / folder
    if (folder / "sweep.json").is_file():
        raise UserError(f"{folder} is a sweep (fedsim sweep goes on with it); its runs are in {folder}/cells")
    return Run.open(folder)


def _close(
    session: _Session, finished: Run, summary: Mapping[str, Any], next_command: str, *, as_json: bool
) -> None:
    """The closing table, where the files are, what to try next."""
    from fedsim.terminal import closing_table

    rounds, clients = summary["rounds"], summary["clients"]
    if not session.console.is_terminal:  # set apart from the lines above
        session.console.print()
    session.console.print(
        f"[bold]{summary['name']}[/]  [dim]{summary['strategy']} · {clients} clients · {rounds} rounds[/]",
        highlight=False,
    )
    session.console.print()
    session.console.print(closing_table(summary, finished.history()), highlight=False)
    session.console.print()
    session.facts({"run folder": str(finished.folder), "next": next_command})
    if as_json:
        print(json.dumps(summary))


def _next_command(finished: Run, experiment: Experiment, file: str | None) -> str:
    """Compare with the newest other finished run, or else change one key."""
    from fedsim.runs import Run

    siblings = [path for path in finished.folder.parent.iterdir() if path != finished.folder]
    others = [path for path in siblings if Run(path).finished]
    if others:
        newest = max(others, key=lambda path: (path / "summary.json").stat().st_mtime)
        return f"fedsim compare {newest} {finished.folder}"
    change = "seed=1" if experiment["tuning"].name == "full" else "tuning.name=full"
    return f"fedsim run {file or 'quickstart'} --set {change}"


def _run_cells(session: _Session, found: Sweep, *, debug: bool) -> list[dict[str, Any]]:
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

    return found.run(lambda cell: session.watching(cell.experiment), after=after, stop_on_error=debug)


def _show_sweep(session: _Session, found: Sweep, results: list[dict[str, Any]]) -> None:
    """The grouped table and where the files are."""
    from fedsim.sweep import columns_of, rows_of
    from fedsim.terminal import grid

    rows = rows_of(results)
    columns = columns_of(rows)
    keys = {key for cell in found.cells for key in cell.keys}
    table = grid()
    table.show_header, table.header_style = True, "dim"
    for column in columns:
        if column in keys:  # `tuning.name` -> `tuning`, `client.lr` -> `lr`: 80 columns are few
            table.add_column(column.removesuffix(".name").rpartition(".")[2], overflow="fold")
        else:
            table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(row.get(column, "") for column in columns))
    session.console.print()
    session.console.print(table, highlight=False)
    session.console.print()
    session.facts({"sweep": str(found.folder), "table": str(found.folder / "table.md")})
