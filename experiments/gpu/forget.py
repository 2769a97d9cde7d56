"""ResNet-20 on CIFAR-10 with ten clients, trained to 90 %; then class 9 is forgotten by every method.

    fedsim assets fetch cifar10
    python experiments/gpu/forget.py
    python experiments/gpu/forget.py --data cifar10.npz        (x_train, y_train, x_test, y_test, classes)

A client's step on so small a network leaves most of a card idle, so runs that do not need each other share
it, each in a process of its own: the run itself and the two models retrained without the class; then the
methods. `sit` (fedsim forget) finds all of them finished, measures and judges. Relearning is left out.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import common

from fedsim import config
from fedsim.finish import run_experiment
from fedsim.forgetting import experiments, sitting
from fedsim.forgetting.evidence import curve_of
from fedsim.forgetting.methods import RETRAIN
from fedsim.forgetting.request import Origin, opened, request_of
from fedsim.runs import Run

RECIPE = Path(__file__).with_name("resnet20_90.toml")
RUN = "run"  #: name of the run that forgets, among the methods


def plan_of(folder: Path) -> sitting.Plan:
    """The request, of a run that may be under way: retraining needs no more than its experiment."""
    run = Run(folder / RUN)
    origin = opened(run) if run.finished else Origin(run, run.experiment())
    recover = [f"recover.rounds={max(2, origin.experiment.rounds // 10)}"]
    return sitting.plan_of(origin, request_of(origin, "class", ["9"]), recover, folder / "forget")


def one(name: str, folder: Path) -> None:
    """The run, a retraining or a method, to its end."""
    if name == RUN:
        run = Run(folder / RUN)
        run_experiment(run.experiment(), run)
        return
    plan = plan_of(folder)
    experiment = experiments.experiment_of(plan, name, [])
    run_experiment(experiment, Run.create(experiment, plan.folder))


def together(names: Sequence[str], folder: Path, limit: float) -> dict[str, Any]:
    """Several at once; name -> seconds it took, or the last line of what went wrong."""
    began = time.monotonic()
    command = [sys.executable, __file__, "--folder", str(folder), "--one"]
    begun = {}
    for name in names:
        log = (folder / f"{name}.log").open("w")
        begun[name] = subprocess.Popen([*command, name], stdout=log, stderr=log, env=os.environ), log
    found: dict[str, Any] = {}
    while len(found) < len(begun):
        late = time.monotonic() - began > limit
        for name, (process, log) in begun.items():
            if name in found or (process.poll() is None and not late):
                continue
            if process.poll() is None:
                process.kill()
            code = process.wait()
            log.close()
            last = ["", *(folder / f"{name}.log").read_text("utf-8").strip().split("\n")][-1]
            found[name] = last or f"ended with {code}" if code else round(time.monotonic() - began, 1)
        time.sleep(0.2)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Train, forget, measure, write."""
    parser = common.arguments("forget", __doc__)
    parser.add_argument("--data", default="cifar10", help="cifar10, or an .npz file")
    parser.add_argument("--rounds", type=int, help="of the run (default: as in resnet20_90.toml)")
    parser.add_argument("--set", action="append", default=[], help="override of the run")
    parser.add_argument("--methods", help="names separated by commas (default: all)")
    parser.add_argument("--folder", type=Path, help="of runs (default: a temporary one)")
    parser.add_argument("--one", help="one run of the folder, for this script's own processes")
    given = parser.parse_args(argv)
    if given.one:
        one(given.one, given.folder)
        return
    report = common.Report(given)
    with tempfile.TemporaryDirectory() as temporary:
        forget(given, report, given.folder or Path(temporary))


def forget(given: Any, report: common.Report, folder: Path) -> None:
    """All phases."""
    began = time.monotonic()

    def left() -> float:
        return given.seconds - (time.monotonic() - began)

    overrides = [f"compute.device={given.device}", *([f"rounds={given.rounds}"] if given.rounds else [])]
    if given.tiny:
        overrides += ["rounds=2", "data.name=digits", "model.name=vgg-small", "partition.shots=4"]
    elif given.data != "cifar10":
        overrides.append(f"data.name=npz:{Path(given.data).resolve()}")
    experiment = config.load(RECIPE, [f"name={RUN}", *overrides, *given.set])
    run = Run.create(experiment, folder)
    with common.utilisation(given.device) as busy:
        seconds = together([RUN, *RETRAIN], folder, left())
    history = [row for row in run.history() if "accuracy" in row]
    curve = [[row["round"], round(row["accuracy"], 4)] for row in history]
    report.add(phase="train", rounds=experiment.rounds, seconds=seconds, accuracy=curve, **busy)
    if not run.finished:
        return
    plan = plan_of(folder)
    names = experiments.methods_of(plan.origin, plan.request, given.methods or "all")
    with common.utilisation(given.device) as busy:
        seconds = together(names, folder, left())
    done = [name for name in (*names, *RETRAIN) if Run(plan.folder / name).finished]
    # before the long examination: what every run measured itself in its last round
    ends = {name: curve_of(Run(plan.folder / name))[-1] for name in done}
    report.add(phase="forget", recovery_rounds=plan.rounds, seconds=seconds, ends=ends, **busy)
    if report.late() or not {*RETRAIN} <= {*done}:
        return
    wish = sitting.Wish([name for name in done if name not in RETRAIN], relearn=0)
    judged = sitting.sit(plan, wish, lambda _: nullcontext(()))
    for name, model in judged["models"].items():
        verdict = {key: model[key] for key in ("tow", "outside", "forgotten") if key in model}
        report.add(phase="judged", method=name, figures=model["figures"], cost=model.get("cost"), **verdict)


if __name__ == "__main__":
    main()
