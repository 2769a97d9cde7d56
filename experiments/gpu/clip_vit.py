"""Images per second and memory of tuning a CLIP of the shape ViT-B/16 at 224 px: all biases, or prompts.

    python experiments/gpu/clip_vit.py

Weights are RANDOM, images too: this measures time and memory, no accuracy. The steps are those of a client's
training loop (`clients.training.fit`), data transfer included. Prompts are measured twice: with the image
tower in every step, and on features that were computed once (the default of fedsim).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch

from clients.training import Recipe, back_propagation, fit
from fedsim import building, config
from fedsim.task import Task

IMAGES = 256
#: name -> (sections and overrides, batch sizes)
SETTINGS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "bias": ({"tuning": {"name": "bias"}}, (32, 128)),
    "prompt": ({"tuning": {"name": "prompt"}, "features": {"cache": False}}, (32, 128)),
    "prompt, cached features": ({"tuning": {"name": "prompt"}}, (32, 128)),
}


def task_of(name: str, given: Any, folder: Path) -> Task:
    """The task of a setting in float32."""
    tables = {
        "name": "clip-vit",
        "data": {"name": "digits" if given.tiny else "npz:images.npz"},
        "partition": {"name": "iid", "clients": 1, **({"shots": 1} if given.tiny else {})},
        "model": {"name": "tiny-clip" if given.tiny else "open_clip:ViT-B-16"},
        "client": {"lr": 0.001},
        "compute": {"device": given.device},
        **SETTINGS[name][0],
    }
    return building.build(config.from_tables(tables, source="clip_vit.py", folders=(str(folder),)))


def measured(task: Task, batch: int, precision: str, steps: int) -> dict[str, Any]:
    """Images per second and peak memory of a client's loop."""
    task.compute = replace(task.compute, precision=precision)
    parameters = [p for p in task.model.parameters() if p.requires_grad]
    tool = torch.optim.SGD(parameters, lr=0.001, momentum=0.9)
    device = str(task.device.type)
    rows = task.data.client(0)

    def train(count: int) -> None:
        recipe = Recipe(0.001, 1.0, count, batch, 0.9, 0.0, 0.0, 0.0)
        fit(task, rows, recipe, tool, back_propagation, lr_scale=1.0, proximal_mu=0.0)

    train(2)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    train(steps)
    common.settle(device)
    seconds = time.perf_counter() - began
    used = {"peak": torch.cuda.max_memory_allocated()} if device == "cuda" else {}
    return {"images_per_second": round(steps * min(batch, len(rows)) / seconds, 1), **used}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write."""
    given = common.arguments("clip_vit", __doc__).parse_args(argv)
    report = common.Report(given)
    steps = 2 if given.tiny else 16
    with tempfile.TemporaryDirectory() as folder:
        if not given.tiny:
            common.random_images(Path(folder) / "images.npz", IMAGES, 224, tests=16)
        for name, (_, batches) in SETTINGS.items():
            task = None
            for precision in ("fp32", "bf16", "fp16"):
                for batch in (2,) if given.tiny else batches:
                    if report.late():
                        return
                    task = task or task_of(name, given, Path(folder))
                    about = {"setting": name, "precision": precision, "batch": batch}
                    with common.utilisation(given.device) as busy:
                        found = measured(task, batch, precision, steps)
                    report.add(weights="random", **about, **found, **busy, trained=trained_values(task))


def trained_values(task: Task) -> int:
    """How many numbers train."""
    return sum(int(np.prod(p.shape)) for p in task.model.parameters() if p.requires_grad)


if __name__ == "__main__":
    main()
