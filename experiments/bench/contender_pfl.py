"""pfl-research, Apple's simulator, on one workload; prints what contender.py prints.

    python -m venv pfl-venv && pfl-venv/bin/pip install torch pfl==0.6.0
    FEDSIM_PFL_PYTHON=pfl-venv/bin/python fedsim bench lenet cnn
    pfl-venv/bin/python experiments/bench/contender_pfl.py {lenet|cnn} ROUNDS       alone

The environment is its own, because pfl pins old versions (attrs < 24, absl-py < 2); fedsim and Flower are not
needed. Give it the torch that fedsim has, or the ratios compare two versions of torch.

    torchrun ─> 2 processes, one thread and one resident model each, half of the cohort ─> all-reduce ─> step

What pfl offers for speed is taken: a user's samples as tensors in memory (its data loaders are slower for so
few), no evaluation after the first round, no weighting (all users have as many images), no metrics printed.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import sys
import time
from typing import Any

import numpy as np
import torch
import workloads
from torch import nn
from torch.nn import functional

PROCESSES = 2


class Task(nn.Module):
    """A model as pfl wants it: with its loss and its metrics."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy, a scalar."""
        return functional.cross_entropy(self.net(x), y)

    @torch.no_grad()
    def metrics(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, Any]:
        """The loss without dropout; called in rounds with evaluation."""
        from pfl.metrics import Weighted

        self.eval()
        total = self.loss(x, y).item() * len(y)
        self.train()
        return {"loss": Weighted(total, len(y))}


def launch() -> None:
    """Become torchrun, which starts this file in every process; on the CPU and the loopback interface."""
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    switches = {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PFL_PYTORCH_DEVICE": "cpu",
        "GLOO_SOCKET_IFNAME": loopback,
    }
    options = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(PROCESSES)]
    command = [sys.executable, "-m", "torch.distributed.run", *options, __file__, *sys.argv[1:]]
    os.execve(sys.executable, command, {**os.environ, **switches})


def main(name: str, rounds: int) -> None:
    """Run this process's part; the first prints."""
    torch.set_num_threads(1)
    np.random.seed(0)  # pfl draws its own seeds from this one, which must agree between the processes
    workloads.images()
    started = time.perf_counter()
    times = seconds_per_round(name, rounds)
    start = time.perf_counter() - started - sum(times)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if torch.distributed.get_rank() == 0:
        print(json.dumps({"rounds": times, "start": start, "peak": peak}), flush=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # gloo's threads now and then abort an ordinary exit


def seconds_per_round(name: str, rounds: int) -> list[float]:
    """Times of `rounds` rounds; the first includes an evaluation of the cohort."""
    # pfl joins the processes when it is imported: here, where it counts as start-up
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.pytorch import PyTorchTensorDataset
    from pfl.data.sampling import MinimizeReuseUserSampler
    from pfl.hyperparam.base import NNTrainHyperParams
    from pfl.metrics import Metrics
    from pfl.model.pytorch import PyTorchModel

    class Clock(TrainingProcessCallback):  # type: ignore[misc]
        def on_train_begin(self, *, model: Any) -> Metrics:
            ends.append(time.perf_counter())
            return Metrics()

        def after_central_iteration(
            self, aggregate_metrics: Metrics, model: Any, *, central_iteration: int
        ) -> tuple[bool, Metrics]:
            ends.append(time.perf_counter())
            return False, Metrics()

    def user_dataset(user: int) -> PyTorchTensorDataset:
        x, y = workloads.samples(user)
        order = torch.randperm(len(y))
        return PyTorchTensorDataset((x[order], y[order]), user_id=str(user))

    ends: list[float] = []
    workload = workloads.WORKLOADS[name]
    assert workload.model is not None
    task = Task(workloads.resident(workload.model))
    users = np.random.default_rng(0).permutation(workload.clients)
    data = FederatedDataset(user_dataset, MinimizeReuseUserSampler(users.tolist()))
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=rounds,
            evaluation_frequency=rounds,
            train_cohort_size=workload.cohort,
            val_cohort_size=None,
        ),
        backend=SimulatedBackend(training_data=data, val_data=data),
        model=PyTorchModel(task, torch.optim.SGD, torch.optim.SGD(task.parameters(), lr=1.0)),
        model_train_params=NNTrainHyperParams(
            local_batch_size=workloads.BATCH, local_num_epochs=1, local_learning_rate=workloads.RATE
        ),
        callbacks=[Clock()],
        send_metrics_to_platform=False,
    )
    return np.diff(ends).tolist()  # type: ignore[no-any-return]


if __name__ == "__main__":
    if "TORCHELASTIC_RUN_ID" in os.environ:
        main(sys.argv[1], int(sys.argv[2]))
    else:
        launch()
