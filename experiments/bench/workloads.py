"""What the benchmark's clients do, in plain PyTorch: every contender trains these models on these users.

    lenet, cnn   1,000 users with 50 images 3x32x32 each (random, fixed by the user's number), a cohort of 50,
                 one local epoch, batches of 10, SGD 0.1
    noop         n clients that send back what they got

What a user of any framework would do for speed is done: a model is built once in a process, data are
memory-mapped.

Imports no framework of federated learning: `contender_pfl.py` runs where only pfl is installed.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

USERS, SAMPLES, BATCH, RATE = 1000, 50, 10, 0.1


@dataclass(frozen=True)
class Workload:
    """What one round is.

    Attributes:
        model: `lenet`, `cnn`, or None for clients that do nothing.
        clients: registered nodes.
        cohort: of them in each round.
        numbers: float32 values that travel when there is no model.
    """

    model: str | None
    clients: int
    cohort: int
    numbers: int = 256

    def initial(self) -> dict[str, np.ndarray]:
        """The state that the first round starts from."""
        if self.model is None:
            return {"values": np.zeros(self.numbers, np.float32)}
        return {name: value.numpy().copy() for name, value in resident(self.model).state_dict().items()}


WORKLOADS = {
    "lenet": Workload("lenet", USERS, 50),
    "cnn": Workload("cnn", USERS, 50),
    **{f"noop-{n}": Workload(None, n, n) for n in (100, 1_000, 10_000, 100_000)},
    "noop-1MB": Workload(None, 100, 100, numbers=2**18),
    "noop-100MB": Workload(None, 50, 50, numbers=25 * 2**20),
    "noop-of-million": Workload(None, 1_000_000, 1_000),
}


def lenet() -> nn.Module:
    """62,006 parameters."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


def cnn() -> nn.Module:
    """1,626,442 parameters."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25),
        nn.Flatten(), nn.Linear(64 * 14 * 14, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10),
    )  # fmt: skip


@cache
def resident(name: str) -> nn.Module:
    """The one model of this process; the same initial weights everywhere."""
    torch.manual_seed(0)
    return {"lenet": lenet, "cnn": cnn}[name]()


@cache
def images() -> np.ndarray:
    """Images of all users, uint8 [users, samples, 3, 32, 32], memory-mapped."""
    file = Path(tempfile.gettempdir()) / f"fedsim-bench-{USERS}x{SAMPLES}.npy"
    if not file.exists():
        made = np.random.default_rng(0).integers(0, 256, (USERS, SAMPLES, 3, 32, 32), np.uint8)
        part = file.with_suffix(f".{os.getpid()}.npy")
        np.save(part, made)
        part.replace(file)
    return np.load(file, mmap_mode="r")


def samples(user: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of one user, float32 [samples, 3, 32, 32] in 0 to 1, and labels, int64 [samples]."""
    return torch.from_numpy(images()[user].astype(np.float32) / 255), torch.arange(SAMPLES) % 10


def train_user(model: nn.Module, user: int) -> float:
    """One epoch on one user's images; returns the mean loss."""
    x, y = samples(user)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    total = 0.0
    for rows in torch.randperm(SAMPLES).split(BATCH):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
        total += loss.item() * len(rows)
    return total / SAMPLES
