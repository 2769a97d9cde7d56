"""Clients per second on one GPU: a hand-written loop beside the engines, and how busy they keep the card.

    python experiments/gpu/throughput.py

Every client has 50 images and trains one epoch in batches of 10 with SGD. The hand-written loop is what
somebody would write who has nothing else to do: images, weights and sums stay on the card.
Contenders of a workload:

    loop             that loop
    serial           fedsim's serial engine as it is configured by default (deterministic algorithms)
    serial-free      the same with compute.deterministic = false
    ray-N            N workers on the card (only where Ray is installed)

Clients that are trained as one batch of models will be another contender; this version has none.
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import common
import numpy as np
import torch

from fedsim import building, config
from fedsim.config import Experiment
from fedsim.finish import run_experiment
from fedsim.hooks import Hook, Round
from fedsim.models.base import set_train_mode
from fedsim.runs import Run
from fedsim.task import Task

BATCH, SAMPLES, RATE = 10, 50, 0.01
IMAGES, DIGITS = (200, 50), (20, 20)  #: clients, cohort
CONTENDERS = ("loop", "serial", "serial-free")
#: name -> (clients and cohort, sections of the experiment)
WORKLOADS: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {
    "lenet": (IMAGES, {"model": {"name": "nets:lenet"}}),
    "cnn": (IMAGES, {"model": {"name": "nets:cnn"}}),
    "resnet20": (IMAGES, {"model": {"name": "resnet20"}}),
    "tiny-clip bias": (DIGITS, {"model": {"name": "tiny-clip"}, "tuning": {"name": "bias"}}),
    "tiny-clip prompt": (DIGITS, {"model": {"name": "tiny-clip"}, "tuning": {"name": "prompt"}}),
    # the image tower of clip-lite without its weights
    "efficientnet-lite0 bias": (
        DIGITS,
        {"model": {"name": "timm:tf_efficientnet_lite0", "image_size": 128}, "tuning": {"name": "bias"}},
    ),
}


def experiment(name: str, given: Any, folder: Path, rounds: int, *overrides: str) -> Experiment:
    """One workload as an experiment that is evaluated at its start and end alone."""
    (clients, cohort), sections = WORKLOADS[name]
    if given.tiny:
        clients = cohort = 2
    tables = {
        "name": "throughput",
        "rounds": rounds,
        "data": {"name": "digits" if name.startswith("tiny-clip") else "npz:images.npz"},
        "partition": {"name": "iid", "clients": clients, "shots": 1 if given.tiny else SAMPLES // 10},
        "client": {"lr": RATE, "batch_size": BATCH},
        "strategy": {"name": "fedavg", "fraction": cohort / clients},
        "evaluation": {"every": rounds},
        "compute": {"device": given.device},
        **sections,
    }
    places = (str(folder), str(Path(__file__).resolve().parent))
    return config.from_tables(tables, source="throughput.py", folders=places, overrides=overrides)


# -------------------------------------------------------------------------------------- the loop


def loop_rounds(task: Task, cohort: int, rounds: int) -> list[float]:
    """Seconds of rounds of the hand-written loop over the task's model and its clients' samples."""
    state = [task.model.state_dict(keep_vars=True)[e.name].data for e in task.selection.changing]
    entries = [value for value in state if value.is_floating_point()]
    current = [value.clone() for value in entries]
    sizes = [len(task.data.client(number)) for number in range(task.data.clients)]
    own = [task.data.client(number) for number in range(task.data.clients)]
    device, y = task.device, np.asarray(task.data.arrays.train_y)
    inputs = [torch.from_numpy(task.train_inputs[rows]).to(device) for rows in own]
    labels = [torch.from_numpy(y[rows]).to(device) for rows in own]
    parameters = [p for p in task.model.parameters() if p.requires_grad]
    set_train_mode(task.model, training=True)
    rng = np.random.default_rng(0)
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        sums = [torch.zeros_like(value) for value in entries]
        chosen = rng.choice(len(own), cohort, replace=False)
        for number in chosen:
            torch._foreach_copy_(entries, current)
            tool = torch.optim.SGD(parameters, lr=RATE, momentum=0.9)
            for rows in torch.randperm(sizes[number], device=device).split(BATCH):
                tool.zero_grad()
                loss = task.loss(task.network, inputs[number][rows], labels[number][rows])
                loss.backward()
                tool.step()
            torch._foreach_add_(sums, entries, alpha=float(sizes[number]))
        torch._foreach_div_(sums, float(sum(sizes[number] for number in chosen)))
        torch._foreach_copy_(current, sums)
        common.settle(str(device.type))
        times.append(time.perf_counter() - began)
    return times


# ------------------------------------------------------------------------------------ the engine


class Clock(Hook):
    """Notes when rounds end."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def round(self, result: Round) -> None:
        """Called when a round is finished."""
        self.ends.append(time.perf_counter())


def engine_rounds(chosen: Experiment, folder: Path) -> list[float]:
    """Seconds of the rounds between the first and the last, which are evaluated."""
    clock = Clock()
    building.cached.cache_clear()
    run_experiment(chosen, Run.create(chosen, folder), [clock])
    return np.diff(clock.ends)[1:-1].tolist()


def variant(contender: str) -> list[str]:
    """Overrides of a contender."""
    if contender.startswith("ray-"):
        workers = int(contender.removeprefix("ray-"))
        return ["engine.name=ray", f"engine.workers={workers}", f"engine.gpu_fraction={1 / workers}"]
    return {"serial-free": ["compute.deterministic=false"]}.get(contender, [])


def measured(name: str, contender: str, given: Any, folder: Path) -> dict[str, Any]:
    """Clients per second of one contender on one workload."""
    cohort = 2 if given.tiny else WORKLOADS[name][0][1]
    rounds = 2 if given.tiny else 4
    with common.utilisation(given.device) as busy:
        if contender == "loop":
            task = building.build(experiment(name, given, folder, 1, "compute.deterministic=false"))
            times = loop_rounds(task, cohort, rounds + 1)[1:]
        else:
            times = engine_rounds(experiment(name, given, folder, rounds + 2, *variant(contender)), folder)
    return {
        "workload": name,
        "contender": contender,
        "clients_per_second": round(cohort / median(times), 2),
        "rounds": [round(seconds, 4) for seconds in times],
        **busy,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write."""
    parser = common.arguments("throughput", __doc__)
    parser.add_argument("--workloads", help="names separated by commas (default: all)")
    parser.add_argument("--contenders", help="the same")
    given = parser.parse_args(argv)
    report = common.Report(given)
    names = given.workloads.split(",") if given.workloads else list(WORKLOADS)
    ray = ["ray-2", "ray-4", "ray-8"] if given.device == "cuda" and importlib.util.find_spec("ray") else []
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        count = 2 * SAMPLES if given.tiny else IMAGES[0] * SAMPLES
        common.random_images(where / "images.npz", count, 32)
        for name in names:
            for contender in given.contenders.split(",") if given.contenders else [*CONTENDERS, *ray]:
                if report.late():
                    return
                report.add(**measured(name, contender, given, where))


if __name__ == "__main__":
    main()
