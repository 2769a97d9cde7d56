"""How much faster a run is when what lies below the first trainable parameter is computed once.

    fedsim assets fetch cifar10 efficientnet-lite0 minilm vit-small
    python experiments/bench/features.py

Every setting is `fedtune_bias_cifar10.toml` with another model and tuning, run twice in this process: with
the cache off, then on. A round is training, evaluation as the file configures it (every second round),
checkpoint, run folder; round 0 does not count. Times are CPU seconds of this process, which other load on the
machine hardly distorts, and in brackets seconds of the clock. The tables of the cache are made before, in
an empty folder; what they cost once stands in a column of its own. About 5 minutes of one core.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim import config, task
from fedsim.data import assets
from fedsim.finish import Result, run_experiment
from fedsim.hooks import Hook, Round
from fedsim.runs import Run

Times = NDArray[np.float64]

FILE = Path(__file__).parents[1] / "fedtune_bias_cifar10.toml"
SETTINGS: dict[str, tuple[str, ...]] = {
    "clip-lite 128 px, head": ("tuning.name=head", "rounds=2"),
    "clip-lite 64 px, partial": (
        "tuning.name=partial",
        "model.image_size=64",
        "data.test_samples=500",
        "rounds=2",
    ),
    "vit-small 56 px, partial": (
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


def measured(overrides: tuple[str, ...], folder: Path) -> dict[str, Any]:
    """Seconds of a round without and with the cache, what it costs once, and what both runs gave."""
    found: dict[str, Any] = {}
    for cache in (False, True):
        text = config.load(FILE, [*overrides, f"features.cache={str(cache).lower()}"])
        task.cached.cache_clear()
        if cache:
            made = task.build(text)
            began = now()
            inputs = (made.train_inputs, made.test_inputs)
            found["once"] = now() - began
            found["megabytes"] = sum(part.values.nbytes for part in inputs) / 1e6
        clock = Clock()
        result: Result = run_experiment(text, Run.create(text, folder), [clock])
        found[f"seconds {cache}"], found[f"accuracy {cache}"] = clock.seconds, result.accuracy
    return found


def main() -> None:
    """Print the table."""
    os.environ["FEDSIM_ASSETS"] = str(assets.assets_folder())
    print("| setting | s per round, off | on | ratio | once, s | MB | accuracy off | on |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FEDSIM_CACHE"] = folder
        for name, overrides in SETTINGS.items():
            m = measured(overrides, Path(folder))
            off, on = m["seconds False"], m["seconds True"]
            cells = [
                name,
                *("{:.3g} ({:.3g})".format(*pair) for pair in (off, on, off / on, m["once"])),
                f"{m['megabytes']:.0f}",
                *(f"{m[f'accuracy {cache}']:.4f}" for cache in (False, True)),
            ]
            print("|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
