"""Forget over several seeds and write one JSON file, from which tables and pictures are made.

    python experiments/forgetting.py digits_vgg --class 9 --method all --seeds 0,1,2
    python experiments/forgetting.py digits_vgg --class 9 --ablations --seeds 0,1,2
    python experiments/forgetting.py resnet20_cifar10 --class 9 --method prune,not,none,retrain-short
    python experiments/forgetting.py resnet20_cifar10 ... --name constant --run-set schedule.kind=constant

Runs lie in FEDSIM_RUNS (or runs/); what is finished there is not run again. The file is
experiments/results/forget_<experiment>.json (or `..._ablations.json`): a list of reports, one a seed.
`--draw` runs nothing: it draws the first seed's speed-up over retraining from that file, beside it.
"""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from fedsim import config
from fedsim._flwr import quiet
from fedsim.finish import run_experiment
from fedsim.forgetting import experiments, request, sitting
from fedsim.forgetting.pictures import draw_speedup
from fedsim.runs import Run, default_folder

RESULTS = Path(__file__).resolve().parent / "results"

#: right after pruning, without recovery: the rules of spec and released code
ABLATIONS = {
    "highest": [],
    "lowest": ["edit.direction=lowest"],
    "random": ["edit.direction=random"],
    "code-idf": ["edit.idf=code"],
    "global": ["edit.scope=global"],
    "released-code": ["edit.idf=code", "edit.scope=global", "edit.direction=lowest"],
}


def trained(name: str, seed: int, overrides: list[str], suffix: str) -> Run:
    """The finished run of an experiment and seed; the suffix tells recipes apart."""
    base = config.load(name, [*overrides, f"seed={seed}"])
    experiment = base.replace(f"name={base.name}-{seed}{suffix if overrides else ''}")
    run = Run(default_folder() / experiment.name)
    if not run.folder.exists():
        run = Run.create(experiment)
    if not run.finished:
        run_experiment(experiment, run)
    return run


def report(run: Run, word: str, methods: str, forget: list[str], relearn: int, suffix: str) -> dict[str, Any]:
    """One request with some methods, beside retraining."""
    origin = request.opened(run)
    wanted = request.request_of(origin, "class", [word])
    names = experiments.methods_of(origin, wanted, methods)
    folder = run.folder.parent / f"{run.folder.name}-forget-{origin.label(wanted)}{suffix}"
    plan = sitting.plan_of(origin, wanted, forget, folder)
    return sitting.sit(plan, sitting.Wish(names, forget, relearn=relearn), lambda _: nullcontext(()))


def ablations(run: Run, word: str, forget: list[str]) -> dict[str, Any]:
    """Forget and retained test accuracy right after pruning, by rule."""
    from fedsim.errors import UserError
    from fedsim.forgetting.evidence import curve_of

    origin = request.opened(run)
    wanted = request.request_of(origin, "class", [word])
    found: dict[str, Any] = {}
    for name, overrides in ABLATIONS.items():
        folder = run.folder.parent / f"{run.folder.name}-rules" / name
        plan = sitting.plan_of(origin, wanted, ["recover.rounds=1"], folder)
        experiment = experiments.experiment_of(plan, "prune", [*forget, *overrides]).replace("rounds=1")
        side = Run(folder / "prune")
        try:
            if not side.finished:
                side = side if side.folder.exists() else Run.create(experiment, folder)
                run_experiment(experiment, side)
        except UserError as error:  # a global threshold may empty a layer
            found[name] = {"error": str(error)}
            continue
        found[name] = {key: curve_of(side)[-1][key] for key in ("forget_accuracy", "retain_accuracy")}
    return found


def main() -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment")
    parser.add_argument("--class", dest="word", default="9")
    parser.add_argument("--method", default="all")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--relearn", type=int, default=3)
    parser.add_argument("--name", default="", help="suffix of folders and file, beside other settings")
    parser.add_argument("--ablations", action="store_true")
    parser.add_argument("--run-set", action="append", default=[], help="override of the run")
    parser.add_argument("--set", action="append", default=[], help="override of forgetting")
    parser.add_argument("--draw", action="store_true")
    given = parser.parse_args()
    suffix = f"-{given.name}" if given.name else "_ablations" if given.ablations else ""
    file = RESULTS / f"forget_{Path(given.experiment).stem}{suffix}.json"
    if given.draw:
        picture = file.with_suffix(".png")
        draw_speedup(json.loads(file.read_text("utf-8"))[0], picture)
        print(picture)
        return
    found = []
    for seed in map(int, given.seeds.split(",")):
        with quiet():
            run = trained(given.experiment, seed, given.run_set, suffix)
            if given.ablations:
                found.append({"seed": seed, "rules": ablations(run, given.word, given.set)})
            else:
                found.append(report(run, given.word, given.method, given.set, given.relearn, suffix))
        print(f"seed {seed}: done", flush=True)
    file.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print(file)


if __name__ == "__main__":
    main()
