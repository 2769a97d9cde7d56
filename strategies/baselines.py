"""The two ends between which federated learning lies, through the same code as everything else."""

from __future__ import annotations

from typing import Any, ClassVar

from fedsim.averaging import WeightedAverage


class LocalOnly(WeightedAverage):
    """Every client trains alone: everything is personal, nothing is aggregated.

    Accuracy is the mean over clients, each with its own model.
    """

    defaults: ClassVar[dict[str, dict[str, Any]]] = {"payload": {"personal": ["*"]}}


class Centralised(WeightedAverage):
    """One client holds the data of all clients: what federated learning would reach without a federation."""

    defaults: ClassVar[dict[str, dict[str, Any]]] = {"partition": {"pooled": True}}
