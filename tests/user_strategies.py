"""Strategies that a user might write on Flower's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg, Strategy


class SignStep(FedAvg):
    """A server optimiser: every entry it sees moves by a fixed step, however little clients moved."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self.before = {name: array.numpy() for name, array in arrays.items()}
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        arrays, metrics = super().aggregate_train(server_round, replies)
        assert arrays is not None
        stepped: dict[str, Any] = {
            name: before + 0.5 * np.sign(arrays[name].numpy() - before)
            for name, before in self.before.items()
        }
        return ArrayRecord({name: Array(np.asarray(v)) for name, v in stepped.items()}), metrics


def private() -> Strategy:
    """Flower's differential privacy around FedAvg."""
    return DifferentialPrivacyServerSideFixedClipping(
        FedAvg(), noise_multiplier=0.1, clipping_norm=1.0, num_sampled_clients=4
    )
