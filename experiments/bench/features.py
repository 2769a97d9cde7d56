"""How much faster a run is when what lies below the first trainable parameter is computed once.

    fedsim assets fetch cifar10 efficientnet-lite0 minilm vit-small
    python experiments/bench/features.py

Every setting is an experiment run twice in this process: with the cache off, then on. PromptFL without the
cache also runs its text tower on captions of full length (32 tokens), as it would without shortcuts. A round
is training, evaluation as the experiment configures it, checkpoint, run folder; round 0 does not count.
Times are CPU seconds of this process, which other load on the machine hardly distorts (of rounds, seconds of
the clock, too). The tables of the cache are made before, in an empty folder; what they cost once is a figure
of its own. About ten minutes of one core. Everything goes to experiments/results/bench_features.json.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clients import training as loop
from fedsim import building, config
from fedsim.data import assets
from fedsim.files import write_atomic
from fedsim.finish import Result, run_experiment
from fedsim.hooks import Hook, Round
from fedsim.models import prompt
from fedsim.models.text_towers import TextTower
from fedsim.runs import Run

OUT = Path(__file__).resolve().parent.parent / "results" / "bench_features.json"

Times = NDArray[np.float64]

BIAS, PROMPT = "fedtune_bias_cifar10", "promptfl_cifar10"
#: name -> experiment and overrides
SETTINGS: dict[str, tuple[str, ...]] = {
    "clip-lite 160 px, 8 prompt tokens": (PROMPT, "rounds=2", "evaluation.every=1"),
    "clip-lite 128 px, head": (BIAS, "tuning.name=head", "rounds=2"),
    "clip-lite 64 px, partial": (
        BIAS,
        "tuning.name=partial",
        "model.image_size=64",
        "data.test_samples=500",
        "rounds=2",
    ),
    "vit-small 56 px, partial": (
        BIAS,
        "model.name=vit-small",
        "model.image_size=56",
        "tuning.name=partial",
        "data.test_samples=500",
        "rounds=2",
    ),
}


def now() -> Times:
    """Seconds of CPU and clock."""
    return np.array([time.process_time(), time.perf_counter()])


class Clock(Hook):
    """Notes when rounds end."""

    def __init__(self) -> None:
        self.ends: list[Times] = []

    def round(self, result: Round) -> None:
        """Called when a round is finished."""
        self.ends.append(now())

    @property
    def seconds(self) -> Times:
        """Mean seconds of a round after round 0."""
        return (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1)


@contextmanager
def full_length(*, wanted: bool) -> Iterator[None]:
    """Inside, prompts are not cut to the length of the longest."""
    read = prompt.text_tower

    def long_tower(*arguments: Any, **options: Any) -> TextTower:
        tower = read(*arguments, **options)
        tower.can_shorten = False
        return tower

    if wanted:
        prompt.text_tower = long_tower
    try:
        yield
    finally:
        prompt.text_tower = read


@contextmanager
def training_time() -> Iterator[list[float]]:
    """Inside, the list gets the CPU seconds that every client trains."""
    found: list[float] = []
    fit = loop.fit

    def timed(*arguments: Any, **options: Any) -> dict[str, Any]:
        began = time.process_time()
        metrics = fit(*arguments, **options)
        found.append(time.process_time() - began)
        return metrics

    loop.fit = timed
    try:
        yield found
    finally:
        loop.fit = fit


def measured(file: str, overrides: Sequence[str], folder: Path) -> dict[str, Any]:
    """CPU and clock seconds of a round without and with the cache, what it costs once, both accuracies."""
    found: dict[str, Any] = {}
    for cache in (False, True):
        experiment = config.load(file, [*overrides, f"features.cache={str(cache).lower()}"])
        building.cached.cache_clear()
        with full_length(wanted=not cache), training_time() as training:
            if cache:
                made = building.build(experiment)
                began = now()
                inputs = (made.train_inputs, made.test_inputs)
                found["once"] = (now() - began).tolist()
                found["megabytes"] = sum(part.values.nbytes for part in inputs) / 1e6
            clock = Clock()
            result: Result = run_experiment(experiment, Run.create(experiment, folder), [clock])
        name = "on" if cache else "off"
        found[name], found[f"accuracy_{name}"] = clock.seconds.tolist(), result.accuracy
        found[f"training_{name}"] = sum(training) / result.summary["rounds"]
    return found


def main() -> None:
    """Measure and write."""
    os.environ["FEDSIM_ASSETS"] = str(assets.assets_folder())
    found = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FEDSIM_CACHE"] = folder
        for name, (file, *overrides) in SETTINGS.items():
            found.append({"setting": name, **measured(file, overrides, Path(folder))})
            print(json.dumps(found[-1]), flush=True)
    write_atomic(OUT, (json.dumps(found, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
