"""The command line. Nothing heavy is imported before a command needs it: `fedsim --help` is instant."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedsim import assets_cli, forget_cli, json_text, sweep_cli
from fedsim.cli_options import Command, Commands, Debug, File, Json, RunConfig, RunFolder, Runs, Set, Verbose
from fedsim.errors import UserError
from fedsim.files import place_for, place_for_picture
from fedsim.session import Session

if TYPE_CHECKING:
    from fedsim.config import Experiment
    from fedsim.runs import Run

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(assets_cli.app, name="assets")


# ------------------------------------------------------------------------------------ commands


def _say_version(wanted: bool) -> None:
    if wanted:
        from fedsim.version import code_digest

        print(f"fedsim {code_digest()}")
        raise typer.Exit


@app.callback()
def main_options(
    version: Annotated[
        bool, typer.Option("--version", help="Print version and digest of the code.", callback=_say_version)
    ] = False,
) -> None:
    """Tune, prompt, un-learn and locally train foundation models across federated clients."""


@app.command(cls=Command)
def run(
    file: File = None,
    *,
    overrides: Set = None,
    name: Annotated[str | None, typer.Option(help="Name of the run folder.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run of the same name.")] = False,
    clients: Annotated[int | None, typer.Option(min=1, help="Simulated nodes of a Flower app.")] = None,
    run_config: RunConfig = None,
    node_config: Annotated[list[str] | None, typer.Option("--node-config", hidden=True)] = None,
    federation_config: Annotated[list[str] | None, typer.Option("--federation-config", hidden=True)] = None,
    as_json: Json = False,
    folder: Runs = None,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Run an experiment, or anybody's Flower app.

    FILE is an experiment file, the name of a shipped one (fedsim list experiments; the quickstart if none
    is given), or the folder of a Flower app, which then runs unchanged on our engine with --clients nodes (or
    as many as its pyproject.toml says); --set gives engine.name, engine.workers, seed, and keys of the app's
    own config, which --run-config takes as flwr run does.
    """
    with Session(debug=debug, verbose=verbose, on_stderr=as_json) as session:
        if node_config or federation_config:
            raise UserError(
                "--node-config and --federation-config are for Flower's own nodes; simulated ones take "
                "--clients N and --set engine.KEY=VALUE, and find their partition-id in context.node_config"
            )
        app_folder = _app_folder(file)
        if app_folder is not None:
            unused = {"--name": name, "--overwrite": overwrite, "--json": as_json, "--folder": folder}
            for option in [option for option, given in unused.items() if given]:
                raise UserError(
                    f"{option} is for experiments; a Flower app keeps what it wants: leave it out"
                )
            raise typer.Exit(_run_app(session, app_folder, clients, overrides or [], run_config or []))
        if clients is not None:
            raise UserError("--clients is for the folder of a Flower app; here say --set partition.clients=N")
        if run_config:
            raise UserError("--run-config is for the folder of a Flower app; here say --set KEY=VALUE")
        from fedsim import config

        with session.loading(config.find(file or "quickstart").stem):
            from fedsim.finish import run_experiment
            from fedsim.runs import Run

            experiment = config.load(file, [*(overrides or []), *_named(name)])
        for text in experiment.unsaid():
            session.note(text)
        if experiment.sweep:
            session.note(f"this is the base experiment; fedsim sweep {file} runs the cells of its [sweep]")
        with Run.fresh(experiment, folder, overwrite=overwrite) as made:
            session.on_interrupt = f"interrupted; go on with: fedsim resume {made.folder}"
            with session.watching(experiment) as hooks:
                result = run_experiment(experiment, made, hooks)
        _close(session, result.run, result.summary, _next_command(made, experiment, file), as_json=as_json)


@app.command(cls=Command)
def resume(
    folder: RunFolder,
    *,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Train until so many rounds in all.", show_default=False)
    ] = None,
    as_json: Json = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Go on with an interrupted run, or add rounds.

    RUN is a run folder, or its name in the folder of runs. With --rounds, a finished run trains on, too, and
    ends as if it had been of so many rounds from the start.
    """
    with Session(debug=debug, verbose=verbose, on_stderr=as_json) as session:
        with session.loading(folder.name):
            from fedsim import extending, finish

            found = _open(folder)
            notes = [] if rounds is None else extending.extend(found, rounds)
            experiment = found.experiment()
        for text in notes:
            session.note(text)
        session.on_interrupt = f"interrupted; go on with: fedsim resume {found.folder}"
        if found.finished:
            session.note(f"{found.folder} is finished already; --rounds adds rounds")
        with session.watching(experiment) as hooks:
            result = finish.resume(found.folder, hooks)
        file = str(found.folder / "experiment.toml")
        _close(session, found, result.summary, _next_command(found, experiment, file), as_json=as_json)


app.command("sweep", cls=Command)(sweep_cli.sweep)


@app.command(cls=Command)
def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", hidden=True)],
    *,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw accuracy by rounds and bytes (PNG, PDF or SVG).")
    ] = None,
    debug: Debug = False,
) -> None:
    """Show finished runs side by side."""
    with Session(debug=debug) as session:
        if plot is not None:
            place_for_picture(plot, "--plot")
        with session.loading("compare", aside=True):
            from fedsim.compare import comparison, draw_curves

            runs = [_open(folder) for folder in folders]
            shown = comparison(runs)
        session.console.print(shown, highlight=False)
        if plot is not None:
            draw_curves(runs, plot)
            session.facts({"picture": str(plot)})


app.command("forget", cls=Command)(forget_cli.forget)


@app.command("list", cls=Command)
def list_(
    kind: Annotated[str | None, typer.Argument(hidden=True)] = None,
    *,
    of: Annotated[str | None, typer.Option(metavar="FILE", help="Draw the split of an experiment.")] = None,
    overrides: Set = None,
    folder: Runs = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show keys, types and defaults.")] = False,
    debug: Debug = False,
) -> None:
    """List what there is (without KIND: the kinds).

    KIND is strategies, clients, models, tuning, local, datasets, partitions, engines, edits or experiments.
    """
    with Session(debug=debug) as session:
        if of is not None and kind != "partitions":
            raise UserError(f"--of draws a split: fedsim list partitions --of {of}")
        with session.loading(f"list {of or kind or 'kinds'}", aside=True):
            from fedsim import config, listing
            from fedsim.runs import default_folder
        if of is None:
            if kind is None:
                listing.show_kinds(session.console)
            else:
                listing.show(session.console, kind, verbose=verbose)
            return
        lines, picture = listing.draw(config.load(of, overrides or []), folder or default_folder())
        for line in lines:
            session.console.print(line, markup=False, highlight=False, soft_wrap=True)
        session.console.print(f"[dim]picture[/]  {picture}", highlight=False, soft_wrap=True)


@app.command(cls=Command)
def memory(
    file: File = None,
    *,
    methods: Annotated[str, typer.Option(metavar="NAME,...", help="Methods of local learning.")] = "all",
    blocks: Annotated[str, typer.Option(metavar="K,...", help="Numbers of blocks.")] = "2,4,8,16",
    overrides: Set = None,
    folder: Runs = None,
    debug: Debug = False,
) -> None:
    """Show what training would take in memory; nothing is trained.

    FILE is an experiment file or the name of a shipped one. One step of its client, by every method and K,
    on tensors without values: most bytes saved for backward passes, of activations, and in all.
    """
    with Session(debug=debug) as session:
        with session.loading(f"memory of {Path(file or 'quickstart').stem}", aside=True):
            from fedsim import config, memory_cli
            from fedsim.runs import default_folder

            experiment = config.load(file, overrides or [])
            counts = _numbers(blocks, "--blocks")
            picture = (folder or default_folder()) / f"{experiment.name}-memory.png"
            place_for(picture, "--folder")
            rows = memory_cli.measure(experiment, methods.split(","), counts)
            memory_cli.draw(rows, f"{experiment.name}: {experiment['model'].name}", picture)
        session.console.print(memory_cli.table_of(rows), highlight=False)
        for note in memory_cli.notes_of(rows):
            session.note(note)
        session.console.print(f"[dim]picture[/]  {picture}", highlight=False, soft_wrap=True)


@app.command(cls=Command)
def export(
    folder: RunFolder,
    *,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where to write (default: RUN/export).")
    ] = None,
    debug: Debug = False,
) -> None:
    """Write a run's model (safetensors, open_clip, HF, peft)."""
    with Session(debug=debug) as session:
        with session.loading(f"export of {folder.name}", aside=True):
            from fedsim import export as exporting

            found = _open(folder)
            report = exporting.export(found, place_for(out or found.folder / "export", "--out"))
        for text in report["notices"]:
            session.note(text)
        session.facts({"exported": report["state"], "folder": report["folder"]})
        session.facts({"files": "  ".join(report["files"])})


@app.command(cls=Command)
def bench(
    workloads: Annotated[list[str] | None, typer.Argument(metavar="[WORKLOAD...]", hidden=True)] = None,
    *,
    repeat: Annotated[int, typer.Option(min=1, help="Repetitions, interleaved.")] = 5,
    folder: Runs = None,
    debug: Debug = False,
) -> None:
    """Measure this engine beside Flower's and a plain loop.

    WORKLOAD is lenet, cnn, noop-1000, ... (default: all; about half an hour on two cores). pfl-research takes
    part where FEDSIM_PFL_PYTHON names the python of an environment that has it.
    """
    with Session(debug=debug) as session:
        import subprocess

        with session.loading("bench", aside=True):
            from fedsim import config
            from fedsim.runs import default_folder

        script = config.shipped_folder() / "bench" / "run.py"
        out = (folder or default_folder()) / "bench"
        command = [
            sys.executable,
            str(script),
            *(workloads or []),
            "--repeat",
            str(repeat),
            "--out",
            str(out),
        ]
        raise typer.Exit(subprocess.run(command, check=False).returncode)


@app.command()
def doctor(debug: Debug = False) -> None:
    """Check the installation."""
    with Session(debug=debug) as session:
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
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # an ASCII terminal shows ? for what it lacks
    try:
        app()
    except KeyboardInterrupt:  # before a command has begun
        sys.exit(130)


# ------------------------------------------------------------------------------- what commands share


def _named(name: str | None) -> list[str]:
    return [] if name is None else [f"name={json.dumps(name)}"]


def _numbers(text: str, option: str) -> list[int]:
    """`2,4,8` as numbers."""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError as error:
        raise UserError(f"{option} {text}: whole numbers with commas between them, such as 2,4,8") from error


def _open(folder: Path) -> Run:
    """A run folder, by path or by its name in the folder of runs."""
    from fedsim.runs import Run, found

    folder = found(folder)
    if (folder / "sweep.json").is_file():
        raise UserError(f"{folder} is a sweep (fedsim sweep goes on with it); its runs are in {folder}/cells")
    return Run.open(folder)


def _close(
    session: Session, finished: Run, summary: Mapping[str, Any], next_command: str, *, as_json: bool
) -> None:
    """The closing table, where the files are, what to try next."""
    from fedsim.terminal import closing_table, plural

    size = f"{plural(summary['clients'], 'client')} · {plural(summary['rounds'], 'round')}"
    if not session.console.is_terminal:  # set apart from the lines above
        session.console.print()
    title = f"[bold]{summary['name']}[/]  [dim]{summary['strategy']} · {size}[/]"
    session.console.print(title, highlight=False)
    session.console.print()
    session.console.print(closing_table(summary, finished.history()), highlight=False)
    if "start_note" in summary:
        session.console.print(f"[dim]start: {summary['start_note']}[/]", highlight=False)
    session.console.print()
    session.facts({"run folder": str(finished.folder), "next": next_command})
    if as_json:
        print(json_text.dump(summary))


def _app_folder(file: str | None) -> Path | None:
    """The folder of the Flower app that is to run, or None where it is an experiment.

    Raises:
        UserError: it is a packed app.
    """
    if file is None:
        return None
    path = Path(file)
    if path.suffix.lower() == ".fab":
        raise UserError(
            f"{file} is a packed Flower app: unpack it and run the folder: python -m zipfile -e {file} app; "
            "fedsim run app"
        )
    if path.name == "pyproject.toml":
        return path.parent
    return path if path.is_dir() else None


def _run_app(
    session: Session, folder: Path, clients: int | None, overrides: list[str], run_config: list[str]
) -> int:
    """Somebody's Flower app on our engine; its exit status."""
    from fedsim import foreign

    described = foreign.described(folder, clients, overrides, run_config)
    for text in described["notes"]:
        print(f"note  {text}", file=sys.stderr)  # stdout is the app's
    with session.loading(folder.resolve().name, aside=True):
        pass  # the app has the terminal to itself
    return foreign.launch({**described, "debug": session.debug})


def _next_command(finished: Run, experiment: Experiment, file: str | None) -> str:
    """Compare with the newest other finished run on the same data, or else change one key."""
    from fedsim import config
    from fedsim.runs import Run

    def alike(path: Path) -> bool:
        try:
            written = config.read(path / "experiment.toml")
        except (OSError, UserError):  # what lies beside a good run must not spoil its end
            return False
        return bool(written.get("data", {}).get("name") == experiment["data"].name)

    siblings = [path for path in finished.folder.parent.iterdir() if path != finished.folder]
    others = [path for path in siblings if Run(path).finished and alike(path)]
    if others:
        newest = max(others, key=lambda path: (path / "summary.json").stat().st_mtime)
        return f"fedsim compare {newest} {finished.folder}"
    change = "tuning.name=head" if experiment["tuning"].name == "bias" else "seed=1"
    return f"fedsim run {file or 'quickstart'} --set {change}"
