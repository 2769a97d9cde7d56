"""Shipped experiment files that a test cannot run: their cells are valid, their models build and step."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from fedsim import config
from fedsim.building import build
from fedsim.sweep import Cell, cells_of

METHODS = ("promptfl_methods_cifar10", "promptfl_methods_cifar10_100")
SWEEPS = (*METHODS, "promptfl_methods_cifar10_lr", "promptfl_base_to_new_cifar10", "promptfl_gpu")


@cache
def cells(name: str) -> list[Cell]:
    """Of the first seed."""
    experiment = config.load(name)
    return cells_of(experiment, {**experiment.sweep, "seed": [experiment.seed]})


@pytest.mark.parametrize("name", SWEEPS)
def test_every_cell_is_an_experiment_of_its_own(name: str) -> None:
    assert len({cell.experiment.digest() for cell in cells(name)}) == len(cells(name)) > 4


@pytest.mark.parametrize(("name", "clients"), zip(METHODS, (10, 100), strict=True))
def test_the_methods_table_is_complete(name: str, clients: int) -> None:
    """Every method under every split and number of shots, with one learning rate; three seeds."""
    assert config.load(name).sweep["seed"] == [0, 1, 2]
    assert {cell.experiment.clients for cell in cells(name)} == {clients}
    for method in ("promptfl", "promptfolio", "fedpgp", "fedclip"):
        own = [cell.experiment for cell in cells(name) if cell.experiment["strategy"].name == method]
        places = {(e["partition"].name, e["partition"].common["shots"]) for e in own}
        assert len(places) == 9
        assert len({e["client"].options["lr"] for e in own}) == 1


def test_promptfl_reaches_what_the_readme_says() -> None:
    """Bars: at least 0.72 with each of three seeds, in five minutes; 4 M D bytes a client and round."""
    file = config.shipped_folder() / "results" / "promptfl_cifar10.json"
    rows = [result["summary"] for result in json.loads(file.read_text("utf-8"))]
    assert len({row["digest"] for row in rows}) == 3
    assert min(row["accuracy"] for row in rows) >= 0.72
    assert max(row["seconds"] for row in rows) <= 300
    assert {row["bytes_up"] for row in rows} == {20 * 10 * 4 * 8 * 384}


@pytest.mark.parametrize("model", ["RN50", "ViT-B-16"])
def test_cells_for_a_gpu_build_with_random_weights_and_step_on_meta(model: str, tmp_path: Path) -> None:
    """What differs here: images (black, of ten classes), weights, and where it computes."""
    (cell, *_) = (c for c in cells("promptfl_gpu") if f"open_clip:{model}@openai" in c.keys.values())
    classes = np.array([f"thing {letter}" for letter in "abcdefghij"])
    x, y = np.zeros((20, 3, 32, 32), np.uint8), np.arange(20) % 10
    np.savez(tmp_path / "black.npz", x_train=x, y_train=y, x_test=x, y_test=y, classes=classes)
    changes = ["compute.device=cpu", f"model.name=open_clip:{model}", "partition.shots=2"]
    task = build(cell.experiment.replace(*changes, f"data.name=npz:{tmp_path}/black.npz", "tuning.tokens=16"))
    assert [(e.name, e.shape) for e in task.selection.shared] == [("head.context", (16, 512))]
    assert task.network is task.model.head
    on_meta = task.model.to("meta")
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8, device="meta")
    labels = torch.zeros(2, dtype=torch.int64, device="meta")
    torch.nn.functional.cross_entropy(on_meta(images), labels).backward()
    assert {name for name, p in on_meta.named_parameters() if p.grad is not None} == {"head.context"}
