"""The end of a run: the state to keep, the closing object, and running an experiment as a whole."""

from __future__ import annotations

import errno
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from fedsim import config, diagnosis, registry
from fedsim.config import Experiment
from fedsim.errors import UserError
from fedsim.hooks import Hook
from fedsim.runs import Run

if TYPE_CHECKING:
    import pandas
    from flwr.app import RecordDict

    from fedsim.rounds import Loop, Progress
    from fedsim.task import Task

#: what the system says of a place that cannot be written, in the words of the closing line
_DISK = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the disk is read-only",
    errno.EACCES: "a place may not be used",
}


@dataclass(frozen=True)
class Result:
    """What `fedsim.run` returns.

    Attributes:
        summary: the closing object, as in `summary.json`.
        run: the run folder.
    """

    summary: dict[str, Any]
    run: Run

    @property
    def history(self) -> pandas.DataFrame:
        """One row per round: accuracy, loss, train_loss, bytes, seconds, ..."""
        import pandas as pd

        return pd.DataFrame(self.run.history()).set_index("round")

    @property
    def accuracy(self) -> float:
        """Accuracy at the end."""
        return float(self.summary["accuracy"])

    def state(self) -> dict[str, Any]:
        """The final shared state, name -> numpy array."""
        from safetensors.numpy import load_file

        return dict(load_file(self.run.folder / "state.safetensors"))


def close(loop: Loop, progress: Progress) -> dict[str, Any]:
    """Write the final state and the summary of a run that came to its end.

    With early stopping the state with the best validation loss is the result.
    """
    from safetensors.numpy import save

    from fedsim import messages, payload
    from fedsim.checkpoints import load
    from fedsim.files import write_atomic

    experiment, run = loop.experiment, loop.run
    best = run.folder / "checkpoints" / "best.safetensors"
    if experiment.settings["evaluation"]["patience"]:
        if best.is_file():
            progress.arrays = load(best)["arrays"]
            progress.last = loop.server_metrics(progress)
        else:
            loop.notice("no round has a finite validation loss: the result is the last state, not the best")
    values = messages.views_of(progress.arrays)
    write_atomic(run.folder / "state.safetensors", save({k: v.copy() for k, v in values.items()}))
    summary = {
        "name": experiment.name,
        "strategy": experiment["strategy"].name,
        "rounds": progress.server_round,
        "clients": experiment.clients,
        "accuracy": progress.last["accuracy"],
        "loss": progress.last["loss"],
        "accuracy_start": progress.start["accuracy"],
        **_start_note(loop),
        **_data_card(loop),
        **{key: value for key, value in progress.last.items() if key not in ("accuracy", "loss")},
        **_more_accuracies(progress),
        **getattr(loop.strategy, "findings", {}),
        **_named_classes(loop.task),
        **_costs_of_steps(run),
        **_not_finite(run),
        "bytes_up": progress.bytes_up,
        "bytes_down": progress.bytes_down,
        "seconds": round(progress.seconds, 3),
        "digest": payload.digest(values),
        "run": str(run.folder),
    }
    states = getattr(loop.grid, "states", {})
    if states:
        summary["digest_personal"] = payload.digest(_personal_arrays(states))
    run.write_summary(summary)
    notice = diagnosis.of_skipped_steps(run.history())
    if notice is not None:
        for hook in loop.hooks:
            hook.notice(notice)
    return summary


def _more_accuracies(progress: Progress) -> dict[str, float]:
    """Where accuracies on other parts of the data or over clients began; harmonic mean of base and new."""
    found: dict[str, float] = {}
    for key in progress.last:
        if key.endswith("_accuracy") and key != "validation_accuracy" and key in progress.start:
            found[f"{key}_start"] = progress.start[key]
    if {"base_accuracy", "new_accuracy"} <= progress.last.keys():
        base, new = progress.last["base_accuracy"], progress.last["new_accuracy"]
        found["harmonic_accuracy"] = 2 * base * new / max(base + new, 1e-12)
    return found


def _costs_of_steps(run: Run) -> dict[str, float]:
    """Where clients measured their steps: most bytes held at a time, seconds a step (means over clients)."""
    rows = [row for row in run.history() if "train_peak_bytes" in row]
    if not rows:
        return {}
    return {
        "peak_bytes": max(row["train_peak_bytes"] for row in rows),
        "step_seconds": median(row["train_step_seconds"] for row in rows),
    }


def _named_classes(task: Task) -> dict[str, Any]:
    """The classes that keys of the experiment stand for, by name."""
    from fedsim.data.classes import position_of

    data, names = task.data, task.data.arrays.classes
    trigger = task.experiment.settings["backdoor"]
    found: dict[str, Any] = {}
    if data.forgotten is not None and data.forgotten.classes:
        found["forgotten_classes"] = [names[i] for i in data.forgotten.classes]
    if data.new_classes:
        found["new_classes"] = list(names[data.base_classes :])
    if "client" in trigger:
        found["backdoor_class"] = names[position_of(trigger["label"], names, "[backdoor] label")]
    return found


def _not_finite(run: Run) -> dict[str, int]:
    """How many figures of rounds are NaN or infinite, where there are any."""
    values = [value for row in run.history() for value in row.values() if isinstance(value, float)]
    count = sum(not math.isfinite(value) for value in values)
    return {"not_finite": count} if count else {}


def _start_note(loop: Loop) -> dict[str, str]:
    """What the start accuracy owes to labels, where a reader could be misled."""
    schooling = loop.task.model.schooling
    if not schooling:
        return {}
    return {"start_note": f"{schooling}, no {loop.experiment['data'].name} label used"}


def _data_card(loop: Loop) -> dict[str, list[str]]:
    """What the data are, where they are the user's own."""
    arrays = loop.task.data.arrays
    return {"data_card": arrays.card()} if arrays.notes else {}


def _personal_arrays(states: Mapping[int, RecordDict]) -> dict[str, Any]:
    """All arrays that clients keep, as client/record/name."""
    from fedsim.messages import views_of

    return {
        f"{client}/{key}/{name}": array
        for client, state in states.items()
        for key, record in state.array_records.items()
        for name, array in views_of(record).items()
    }


def run_experiment(experiment: Experiment, run: Run, hooks: Sequence[Hook] = ()) -> Result:
    """Run (or resume) an experiment in its folder on the experiment's own engine, then its baselines.

    Raises:
        UserError: the experiment cannot work as it is.
    """
    from fedsim.messages import UNMEASURED

    inner = {name: baseline(experiment, name) for name in experiment.baselines}  # mistakes come first
    if not run.finished:
        _simulate(experiment, run, hooks)
    summary = run.summary()
    for name, other in inner.items():
        key = f"accuracy_{name.replace('-', '_')}"
        if key not in summary:
            folder = run.folder / "baselines" / name
            side = Run.open(folder) if folder.exists() else Run.create(other, folder.parent)
            found = run_experiment(other, side, hooks).summary
            summary[key] = found["accuracy"]
            if (left_out := found.get(f"accuracy{UNMEASURED}")) is not None:
                summary[f"{key}{UNMEASURED}"] = left_out
            run.write_summary(summary)
    return Result(summary, run)


def _simulate(experiment: Experiment, run: Run, hooks: Sequence[Hook]) -> None:
    from fedsim.app import client_app, make_server_app
    from fedsim.engine.simulate import run_apps

    engine = experiment["engine"]
    try:
        run_apps(
            make_server_app(experiment, run, hooks),
            client_app,
            experiment.clients,
            engine=engine.name,
            seed=experiment.seed,
            **engine.options,
        )
    except OSError as error:
        what = _DISK.get(error.errno or 0)
        if what is None:
            raise
        raise UserError(f"{what} ({error}); then go on with: fedsim resume {run.folder}") from error


def baseline(experiment: Experiment, name: str) -> Experiment:
    """The same experiment under another strategy: what the strategy brings along wins over the file."""
    document = experiment.document()
    try:
        target = registry.resolve("strategies", name).target
    except UserError as error:
        raise UserError(f"baselines: {error}") from error
    keys = set(registry.schema(target).model_fields)
    # what is asked of a federation's size is not asked of a baseline
    kept = {k: v for k, v in document["strategy"].items() if k in keys and not k.startswith("min_")}
    document |= {"name": name, "baselines": [], "strategy": {**kept, "name": name}}
    if not document["evaluation"]["patience"]:
        document["evaluation"]["every"] = experiment.rounds  # only its end is compared
    for section, values in getattr(target, "defaults", {}).items():
        document[section] = {**document.get(section, {}), **values}
    return config.from_tables(document, source=f"baseline {name}", folders=experiment.folders)


def resume(folder: Path, hooks: Sequence[Hook] = ()) -> Result:
    """Go on with an interrupted run from its newest checkpoint; a finished run is returned as it is."""
    run = Run.open(folder)
    experiment = run.experiment()
    if run.finished and not any(
        f"accuracy_{name.replace('-', '_')}" not in run.summary() for name in experiment.baselines
    ):
        return Result(run.summary(), run)
    run.require_own_data("resume")
    return run_experiment(experiment, run, hooks)
