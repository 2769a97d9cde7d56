"""The clients of the benchmark, as a plain Flower app: the same code runs on every engine.

    lenet, cnn   1,000 users with 50 images 3x32x32 each (random, fixed by the user's number), a cohort of 50,
                 one local epoch, batches of 10, SGD 0.1
    noop         n clients that send back what they got

What a user of any framework would do for speed is done: a model is built once in a process, data are
memory-mapped.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg, Strategy
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


# ------------------------------------------------------------------------------- training


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


def train_user(model: nn.Module, user: int) -> float:
    """One epoch on one user's images; returns the mean loss."""
    x = torch.from_numpy(images()[user].astype(np.float32) / 255)
    y = torch.arange(SAMPLES) % 10
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


# --------------------------------------------------------------------------------- Flower


def client_app(workload: Workload) -> ClientApp:
    """The client of a workload."""
    app = ClientApp()
    name = workload.model

    @app.train()
    def train(message: Message, context: Context) -> Message:
        record = message.content["arrays"]
        loss = 0.0
        if name is not None:
            torch.set_num_threads(1)
            model = resident(name)
            model.load_state_dict(record.to_torch_state_dict())
            loss = train_user(model, int(context.node_config["partition-id"]))
            record = ArrayRecord(model.state_dict())
        metrics = MetricRecord({"num-examples": SAMPLES, "loss": loss})
        return Message(RecordDict({"arrays": record, "metrics": metrics}), reply_to=message)

    return app


def server_app(
    workload: Workload,
    rounds: int,
    done: Callable[[Sequence[float]], None],
    make: Callable[..., Strategy] = FedAvg,
    prepare: Callable[[Grid], Any] = lambda grid: None,
) -> ServerApp:
    """A server that times its rounds.

    Args:
        workload: what a round is.
        rounds: how many.
        done: called with the seconds of each round.
        make: the strategy's class, with the arguments of Flower's FedAvg.
        prepare: called with the grid first.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        prepare(grid)
        ends = [time.perf_counter()]
        strategy = make(
            fraction_train=workload.cohort / workload.clients,
            fraction_evaluate=0.0,
            min_train_nodes=workload.cohort,
            min_available_nodes=workload.clients,
        )

        def finished(number: int, arrays: ArrayRecord) -> MetricRecord:
            if number == 0:
                ends[0] = time.perf_counter()
            else:
                ends.append(time.perf_counter())
            return MetricRecord()

        strategy.start(
            grid=grid,
            initial_arrays=ArrayRecord({k: _array(v) for k, v in workload.initial().items()}),
            num_rounds=rounds,
            train_config=ConfigRecord(),
            evaluate_fn=finished,
        )
        done(np.diff(ends).tolist())

    return app


def _array(values: np.ndarray) -> Any:
    from flwr.app import Array

    return Array(values)
