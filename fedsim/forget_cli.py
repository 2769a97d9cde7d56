"""`fedsim forget`: a finished run without some classes, clients or attributes, and what that is worth."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from fedsim import json_text
from fedsim.cli_options import Debug, Verbose
from fedsim.errors import UserError
from fedsim.session import Session


def forget(
    folder: Annotated[Path, typer.Argument(metavar="RUN", hidden=True)],
    *,
    classes: Annotated[
        str | None, typer.Option("--class", metavar="C,C", help="Classes, by name or index:N (position).")
    ] = None,
    clients: Annotated[str | None, typer.Option("--client", metavar="N,N", help="Clients.")] = None,
    attributes: Annotated[
        str | None, typer.Option("--attribute", metavar="A,A", help="Attributes of the data, by LEACE.")
    ] = None,
    method: Annotated[str, typer.Option(metavar="M,M", help="Methods, or all.", show_default=False)] = "",
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="edit.KEY, recover.KEY, or as in fedsim run."),
    ] = None,
    retrain: Annotated[
        bool,
        typer.Option(
            "--retrain/--no-retrain",
            help="Also train without the data, twice (the default).",
            show_default=False,
        ),
    ] = True,
    relearn: Annotated[
        int | None, typer.Option(min=0, help="Rounds with the data back (default: 3).", show_default=False)
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the folder of this request.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one line of JSON.")] = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Make a finished run forget, and measure it.

    RUN is a run folder, or its name in the folder of runs; it is not touched. Methods for classes: prune
    (default), not, head-mask, none, roll-back, retrain-short; for clients: not (default), none, pga,
    federaser, roll-back, retrain-short. The same command goes on where it stopped.

    An attribute (a gender, a user) is erased from the model's features for every linear reader, in closed
    form from sums that the clients send; --set detacher.cut=K erases after unit K of the backbone,
    strategy.audit_rounds=5 lets clients attack what is left.
    """
    with Session(debug=debug, verbose=verbose, on_stderr=as_json) as session:
        session.on_interrupt = "interrupted; the same command goes on"
        asked = {"--class": classes, "--client": clients, "--attribute": attributes}
        given = [f"{option} {value}" for option, value in asked.items() if value is not None]
        if not given:
            raise UserError("say what to forget: --class 9, --client 3, or --attribute gender")
        if len(given) > 1:
            raise UserError(
                f"{' and '.join(given)}: one request forgets one kind; choose one, and forget the other "
                "from the run that it leaves"
            )
        from fedsim.overrides import once

        overrides = once(overrides or [])
        if attributes is not None:
            if method:
                raise UserError("--method is for classes and clients; attributes are erased by LEACE")
            if relearn is not None:
                raise UserError("--relearn is for classes and clients: leave it out for attributes")
            _erase(session, folder, attributes, overrides, name, as_json=as_json)
            return
        with session.loading(f"forgetting in {folder.name}"):
            from fedsim import config
            from fedsim.forgetting import experiments, report, request, sitting
            from fedsim.runs import Run, found

            origin = request.opened(Run.open(found(folder)))
            kind: request.Kind = "class" if classes is not None else "client"
            wanted = request.request_of(
                origin, kind, request.words_of(origin, kind, classes or clients or "")
            )
            methods = experiments.methods_of(origin, wanted, method or experiments.DEFAULT[kind])
            chosen = name or f"{origin.run.folder.name}-forget-{origin.label(wanted)}"
            config.check_name(chosen, "--name")
            plan = sitting.plan_of(origin, wanted, overrides, origin.run.folder.parent / chosen)
        if method == "all" and kind == "client" and "federaser" not in methods:
            session.note(
                "federaser is left out: it replays updates, which the run records with --set "
                "checkpoints.record_updates=true (and none may be of classes that are forgotten since)"
            )
        wish = sitting.Wish(methods, overrides, retrain=retrain, relearn=3 if relearn is None else relearn)
        result = sitting.sit(plan, wish, session.watching)
        files = report.write(result, plan.folder)
        session.console.print()
        session.console.print(report.terminal_table(result), highlight=False)
        session.console.print()
        for line in report.verdicts(result):
            session.console.print(line, markup=False, highlight=False, soft_wrap=True)
        session.console.print()
        session.facts({"folder": str(plan.folder), "report": str(files[0])})
        if as_json:
            print(json_text.dump(result))


def _erase(
    session: Session, folder: Path, names: str, overrides: list[str], name: str | None, *, as_json: bool
) -> None:
    """Erase attributes in a new run beside the old one, or go on with it."""
    with session.loading(f"erasing in {folder.name}"):
        from fedsim.finish import run_experiment
        from fedsim.forgetting import attribute
        from fedsim.overrides import once
        from fedsim.runs import Run, found

        old = Run.open(found(folder))
        chosen = [word.strip() for word in names.split(",") if word.strip()]
        named = [f"name={json.dumps(name)}"] if name else []
        experiment = attribute.experiment_of(old, chosen, once([*overrides, *named]))
        place = old.folder.parent / experiment.name
        if place.exists() and Run.open(place).experiment().digest() != experiment.digest():
            raise UserError(f"{place} is another run; give this one its own --name")
    there = nullcontext(Run(place)) if place.exists() else Run.fresh(experiment, place.parent)
    with there as run, session.watching(experiment) as hooks:
        summary = run_experiment(experiment, run, hooks).summary
    session.console.print()
    for line in attribute.before_and_after(old, run):
        session.console.print(line, markup=False, highlight=False, soft_wrap=True)
    session.console.print()
    session.facts({"folder": str(run.folder)})
    if as_json:
        print(json_text.dump(summary))
