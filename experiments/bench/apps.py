"""The workloads as a plain Flower app: the same code runs on every engine that takes one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg, Strategy
from workloads import SAMPLES, Workload, resident, train_user


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
            initial_arrays=ArrayRecord({k: Array(v) for k, v in workload.initial().items()}),
            num_rounds=rounds,
            train_config=ConfigRecord(),
            evaluate_fn=finished,
        )
        done(np.diff(ends).tolist())

    return app
