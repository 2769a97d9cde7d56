"""Time of a training step of every method of local learning, side by side: the `step` of a sweep's own tables
is taken at different times of a busy machine.

    python experiments/bench/local_steps.py [repetitions]

Every repetition takes one step (forward and backward passes of a batch of the sweep's clients, one thread) of
each cell in turn, in CPU seconds of this process; the figure is the median of its ratios to back-propagation
in the same repetition. A few minutes. Everything goes to experiments/results/bench_local_steps.json.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from fedsim import building, config
from fedsim.config import Experiment
from fedsim.files import write_atomic
from fedsim.models.base import set_train_mode
from fedsim.sweep import cells_of

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "results" / "bench_local_steps.json"
SWEEPS = ("local_methods_cifar10", "local_resnet32_cifar10")
_WARM = 2


def main() -> None:
    """Measure and write."""
    torch.set_num_threads(1)
    repetitions = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    found = [row for name in SWEEPS for row in measured(name, repetitions)]
    write_atomic(OUT, (json.dumps(found, indent=1) + "\n").encode())


def measured(name: str, repetitions: int) -> list[dict[str, Any]]:
    """Median, least and most time of a step over back-propagation's, for each method and K of a sweep."""
    base = config.load(name)
    cells = {}
    for cell in cells_of(base, base.sweep):
        key = (cell.keys["local.name"], cell.keys["local.blocks"])
        cells.setdefault(key, cell.experiment)
    steps = {key: step_of(experiment) for key, experiment in cells.items()}
    times: dict[Any, list[float]] = {key: [] for key in steps}
    for repetition in range(repetitions + _WARM):
        for key, step in steps.items():
            began = time.process_time()
            step()
            if repetition >= _WARM:
                times[key].append(time.process_time() - began)
    reference = times["bp", 1]
    rows = []
    for (method, blocks), seconds in times.items():
        ratios = [one / other for one, other in zip(seconds, reference, strict=True)]
        row = {"network": base["model"].name, "method": method, "blocks": blocks}
        row |= {
            "seconds": median(seconds),
            "ratio": median(ratios),
            "least": min(ratios),
            "most": max(ratios),
        }
        rows.append(row)
        print(row, flush=True)
    return rows


def step_of(experiment: Experiment) -> Callable[[], object]:
    """One step of the first client's first batch, as its training loop takes it but for the optimiser's."""
    task = building.build(experiment)
    assert task.local is not None
    learner = task.local.begin(0, {})
    set_train_mode(task.model, training=True)
    size = experiment["client"].options["batch_size"]
    inputs, labels = task.train_batch(np.sort(task.data.client(0)[:size]))

    def step() -> None:
        learner.zero_grad(set_to_none=True)
        with task.compute.autocast():
            learner.gradients(inputs, labels, task.backward)

    return step


if __name__ == "__main__":
    main()
