"""One `fedsim forget`: run the methods, the retrainings and the relearning of a request; then judge.

Everything is an ordinary run in the request's folder, so whatever is finished is not run again, and what was
interrupted goes on.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from fedsim import config, json_text
from fedsim.compare import differing
from fedsim.config import Experiment
from fedsim.errors import UserError
from fedsim.files import write_atomic
from fedsim.finish import run_experiment
from fedsim.forgetting import experiments
from fedsim.forgetting.evidence import Evidence, Examiner, cost_of, curve_of, storage_of
from fedsim.forgetting.methods import METHODS, RETRAIN, Plan, Tables, relearn
from fedsim.forgetting.request import KEYS, LINEAGE, MASKS, Origin, Request
from fedsim.forgetting.verdict import judged
from fedsim.hooks import Hook
from fedsim.runs import Run

#: makes the hooks of one run and closes them after it
Watch = Callable[[Experiment], AbstractContextManager[Sequence[Hook]]]

_RELEARNT = 0.9  #: of the original's accuracy on what was forgotten


@dataclass(frozen=True)
class Wish:
    """What the user asked for.

    Attributes:
        methods: names in `METHODS` or `RETRAIN`.
        overrides: `KEY=VALUE`.
        retrain: also train two models without the data.
        relearn: rounds of relearning (0: none).
    """

    methods: Sequence[str]
    overrides: Sequence[str] = ()
    retrain: bool = True
    relearn: int = 3


def plan_of(origin: Origin, request: Request, overrides: Sequence[str], folder: Path) -> Plan:
    """Everything that follows from run and request."""
    return Plan(origin, request, experiments.recovery_rounds(origin, overrides), folder)


def sit(plan: Plan, wish: Wish, watch: Watch) -> Tables:
    """Run what is not finished, measure everything, write `report.json`.

    Returns:
        The report.

    Raises:
        UserError: a method cannot do it; said before anything runs.
    """
    experiments.check_overrides(wish.overrides, wish.methods)
    names = list(dict.fromkeys([*wish.methods, *(RETRAIN if wish.retrain else ())]))
    made = {name: experiments.experiment_of(plan, name, wish.overrides) for name in names}
    if wish.relearn and plan.request.kind == "class":
        _check_head(plan)
    runs = {}
    for name, experiment in made.items():
        runs[name] = _finished(plan, experiment, name, watch)
    # what earlier calls left beside them
    for name in (*RETRAIN, *METHODS[plan.request.kind]):
        if name not in runs and Run(plan.folder / name).finished:
            runs[name] = Run(plan.folder / name)
    relearnt = (
        {name: _relearnt(plan, name, run, wish, watch) for name, run in runs.items()} if wish.relearn else {}
    )
    report = _report(plan, runs, relearnt)
    write_atomic(plan.folder / "report.json", (json_text.dump(report, indent=1) + "\n").encode())
    return report


def _check_head(plan: Plan) -> None:
    """Raise UserError for a head whose rows for the classes cannot be begun anew."""
    from fedsim import building
    from fedsim.payload import select

    experiment = plan.origin.experiment
    model = building.build_model(experiment, building.load_data(experiment).info)
    shared = {entry.name for entry in select(model, model.train_modules).shared}
    if not isinstance(model.head, nn.Linear) or not {"head.weight", "head.bias"} <= shared:
        raise UserError(
            "how fast the class is learnt again is measured with new rows of a linear head that trains; this "
            f"model has a {type(model.head).__name__} that is another kind or frozen: leave that out with "
            "--relearn 0"
        )


def _finished(plan: Plan, experiment: Experiment, method: str, watch: Watch) -> Run:
    """The finished run of an experiment in its folder: as it is, gone on with, or new."""
    folder = plan.folder / experiment.name
    if folder.exists():
        run = Run.open(folder)
        documents = [other.document() for other in (run.experiment(), experiment)]
        changed = differing(documents)
        if changed and not any(row["round"] for row in run.history()):
            shutil.rmtree(folder)  # nothing was trained: a call that failed at its first round left it
            run = Run.create(experiment, plan.folder)
        elif changed:
            raise UserError(
                f"{folder} holds another run (different: {', '.join(changed)}); give --name, or remove it"
            )
    else:
        run = Run.create(experiment, plan.folder)
    if not (run.folder / LINEAGE).exists():
        lineage = json.dumps(experiments.lineage_of(plan, method), indent=2) + "\n"
        write_atomic(run.folder / LINEAGE, lineage.encode())
    if not run.finished:
        with watch(experiment) as hooks:
            run_experiment(experiment, run, hooks)
    if not (run.folder / MASKS).exists():
        _keep_masks(run)
    return run


def _keep_masks(run: Run) -> None:
    """Put the pruned channels of a finished run beside its state: whoever goes on with it needs them."""
    from safetensors.numpy import save

    tree, _ = run.latest_checkpoint()
    pruned = tree["strategy"].get("pruned", {}) if tree is not None else {}
    if pruned:
        masks = {name: np.asarray(mask, dtype=np.uint8) for name, mask in pruned.items()}
        write_atomic(run.folder / MASKS, save(masks))


def _relearnt(plan: Plan, method: str, run: Run, wish: Wish, watch: Watch) -> Run:
    state = (run.folder / "state.safetensors").resolve()
    tables = relearn(plan, method, state, run.summary()["digest"], wish.relearn)
    everywhere = [text for text in wish.overrides if experiments.everywhere(text)]
    experiment = config.from_tables(
        tables, source=tables["name"], folders=plan.origin.experiment.folders, overrides=everywhere
    )
    return _finished(plan, experiment, method, watch)


# ------------------------------------------------------------------------------------- the report


def _report(plan: Plan, runs: dict[str, Run], relearnt: dict[str, Run]) -> Tables:
    examiner = Examiner(plan)
    evidence = {"original": examiner.measure(plan.origin.state)}
    evidence |= {name: examiner.measure(run.folder / "state.safetensors") for name, run in runs.items()}
    level = _RELEARNT * _forget_accuracy(evidence["original"])
    models: dict[str, Any] = {}
    for name, found in evidence.items():
        models[name] = {"figures": found.figures, "attacks": found.attacks}
        if name == "original":
            models[name]["cost"] = cost_of(plan.origin.run)
            continue
        models[name] |= {"cost": cost_of(runs[name]), "curve": curve_of(runs[name])}
        models[name]["cost"]["storage"] = storage_of(plan.origin.root, name)
        masks = runs[name].folder / MASKS
        if masks.is_file():
            models[name]["size"] = examiner.saved(runs[name].folder / "state.safetensors", masks)
        if name in relearnt:
            models[name]["figures"]["relearn"] = _relearn_rounds(relearnt[name], level)
    report = {
        "request": {"kind": plan.request.kind, "ids": list(plan.request.ids)},
        "words": plan.origin.words(plan.request),
        "origin": plan.origin.run.folder.name,
        "before": {key: plan.origin.written(kind, plan.origin.before(kind)) for kind, key in KEYS.items()},
        "rounds": plan.origin.experiment.rounds,
        "seed": plan.origin.experiment.seed,
        "models": models,
    }
    return judged(report, {name: found.outputs for name, found in evidence.items()}, examiner.resolution)


def _forget_accuracy(found: Evidence) -> float:
    return found.figures.get("forget_test", found.figures["forget_train"])


def _relearn_rounds(run: Run, level: float) -> float:
    """Rounds until the data is known again; one more than there were when it never is."""
    options = run.experiment()["strategy"].options
    first = len(options["targets"]) and int(options["edit"]["name"] != "none")
    curve = [row["forget_accuracy"] for row in run.history() if row["round"] >= first]
    reached = next((number for number, value in enumerate(curve) if value >= level), len(curve))
    return float(reached)
