"""The yardstick: a hand-written PyTorch loop over the same users, two processes with one thread each.

    parent   weights (shared memory) ─> 2 workers, half of the cohort each ─> weighted sums ─> parent: mean

No framework, no messages, nothing pickled but a list of user numbers.
"""

from __future__ import annotations

import time
from multiprocessing import get_context
from multiprocessing.connection import Connection

import numpy as np
import torch
import workloads
from torch.nn.utils import parameters_to_vector, vector_to_parameters


def seconds_per_round(name: str, rounds: int, processes: int) -> list[float]:
    """Times of `rounds` rounds."""
    workload = workloads.WORKLOADS[name]
    assert workload.model is not None
    context = get_context("spawn")
    model = workloads.resident(workload.model)
    shared = parameters_to_vector(model.parameters()).detach().share_memory_()
    sums = [torch.zeros_like(shared).share_memory_() for _ in range(processes)]
    pipes, workers = [], []
    for number in range(processes):
        ours, theirs = context.Pipe()
        worker = context.Process(
            target=_work, args=(workload.model, shared, sums[number], theirs), daemon=True
        )
        worker.start()
        pipes.append(ours)
        workers.append(worker)
    for pipe in pipes:
        pipe.recv()  # ready
    times = []
    rng = np.random.default_rng(0)
    for _ in range(rounds):
        started = time.perf_counter()
        cohort = rng.choice(workload.clients, workload.cohort, replace=False)
        for pipe, part in zip(pipes, np.array_split(cohort, processes), strict=True):
            pipe.send(part.tolist())
        for pipe in pipes:
            pipe.recv()
        shared.copy_(torch.stack(sums).sum(0) / (workload.cohort * workloads.SAMPLES))
        times.append(time.perf_counter() - started)
    for pipe, worker in zip(pipes, workers, strict=True):
        pipe.send(None)
        worker.join()
    return times


def _work(name: str, shared: torch.Tensor, total: torch.Tensor, pipe: Connection) -> None:
    torch.set_num_threads(1)
    model = workloads.resident(name)
    pipe.send("ready")
    while (users := pipe.recv()) is not None:
        total.zero_()
        for user in users:
            vector_to_parameters(shared.clone(), model.parameters())
            workloads.train_user(model, user)
            total.add_(parameters_to_vector(model.parameters()).detach(), alpha=workloads.SAMPLES)
        pipe.send("done")
