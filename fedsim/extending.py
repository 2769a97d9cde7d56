"""More rounds for a run, finished or not: `fedsim resume runs/mine --rounds 30`.

The folder becomes that of an interrupted run of so many rounds, and whoever resumes it ends with the state,
the digest and the rows of a run that had as many from the start. Where that cannot be, nothing is changed.
"""

from __future__ import annotations

import shutil
from typing import Any

from fedsim import registry
from fedsim.config import Experiment
from fedsim.errors import UserError
from fedsim.files import write_atomic
from fedsim.forgetting.request import LINEAGE
from fedsim.rounds import lr_scale
from fedsim.runs import Run


def extend(run: Run, rounds: int) -> list[str]:
    """Let a run have so many rounds in all; `finish.resume` trains those that it lacks.

    Args:
        run: finished or not.
        rounds: in all, those that are trained among them; as many as it has: nothing changes.

    Returns:
        What the user should know, a line each.

    Raises:
        UserError: rounds would be taken away, the run would not be one of so many rounds, or its clients were
            nodes.
    """
    before = run.experiment()
    if rounds == before.rounds:
        return []
    run.require_own_data("resume --rounds")
    with run.lock():
        _check_place(run)
        if rounds < before.rounds:
            raise UserError(
                f"{run.folder} is a run of {before.rounds} rounds: --rounds {rounds} cannot take some back; "
                f"for a shorter one: {_anew(run, rounds)}"
            )
        done = max((row["round"] for row in run.history()), default=0)
        if run.finished and done < before.rounds:
            raise UserError(
                f"{run.folder} ended by itself after round {done} of {before.rounds}, and would again: "
                "its patience ran out, or its strategy was done"
            )
        if done:
            _check_begun(run, before, done, rounds)
        # in this order: whatever interrupts it leaves a run that can be resumed, of as many rounds as it says
        for name in ("summary.json", "state.safetensors"):
            (run.folder / name).unlink(missing_ok=True)
        shutil.rmtree(run.folder / "baselines", ignore_errors=True)
        write_atomic(run.folder / "experiment.toml", before.replace(f"rounds={rounds}").toml().encode())
    notes = []
    if before.baselines:
        notes.append(f"baselines ({', '.join(before.baselines)}) run anew, with {rounds} rounds")
    if done == before.rounds and done % before.settings["evaluation"]["every"]:
        notes.append(
            f"round {done} was the last and so was measured, which [evaluation] every would not have done: "
            "what follows from measurements (patience, clients drawn for them) may differ from a run of "
            f"{rounds} rounds"
        )
    return notes


def _check_place(run: Run) -> None:
    """Raise UserError for a run that is part of something with rounds of its own."""
    parent = run.folder.resolve().parent
    if parent.name == "cells" and (parent.parent / "sweep.json").is_file():
        raise UserError(
            f"{run.folder} is a cell of a sweep, whose cells have equally many rounds: sweep anew with "
            "--set rounds=N --name NAME"
        )
    if (run.folder / LINEAGE).is_file():
        raise UserError(f"{run.folder} is the result of forgetting, which is compared by its rounds")
    if parent.name == "baselines":
        raise UserError(f"{run.folder} is a baseline of {parent.parent}: add the rounds to that run")


def _check_begun(run: Run, before: Experiment, done: int, rounds: int) -> None:
    """Raise UserError unless the rounds that are trained are those of a run of `rounds` rounds."""
    anew = _anew(run, rounds)
    tree: dict[str, Any] | None = run.latest_checkpoint()[0]
    if tree is None or "rounds" not in tree:
        why = "of an older fedsim" if tree is not None else "that can be read"
        lacks = "only has a checkpoint" if tree is not None else "has no checkpoint"
        raise UserError(f"{run.folder} {lacks} {why}: there is nothing to go on from; start anew: {anew}")
    schedule = before.settings["schedule"]
    scales = ([lr_scale(schedule, n, total) for n in range(1, done + 1)] for total in (before.rounds, rounds))
    if next(scales) != next(scales):
        raise UserError(
            f'{run.folder}: [schedule] kind = "{schedule["kind"]}" spreads over all {before.rounds} rounds, '
            f"so those that are trained are not those of a run of {rounds}; start anew: {anew}"
        )
    name = before["strategy"].name
    if getattr(registry.resolve("strategies", name).target, "counts_rounds", False):
        raise UserError(
            f"{run.folder}: what strategy '{name}' does in a round depends on how many there are; start "
            f"anew: {anew}"
        )


def _anew(run: Run, rounds: int) -> str:
    return f"fedsim run {run.folder / 'experiment.toml'} --set rounds={rounds}"
