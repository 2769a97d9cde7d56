"""FedEraser: replay a run without some clients, at a fraction of the local work (Liu et al., IWQoS 2021).

The server kept U_k^t, the update of client k in round t. Beginning at the run's own start, round by round,

    t = 1   M ← M + Σ_k p_k U_k^1                       recorded: nothing of the lost clients is in the start
    t > 1   M ← M + Σ_k p_k ‖U_k^t‖ · Û_k / ‖Û_k‖       Û_k: what client k changes now, in fewer local steps

over the remaining clients k of the recorded cohort; p_k is their share of the examples. After public
re-implementations, not the paper's text; norms are taken tensor by tensor, BatchNorm's statistics are
averaged as clients send them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from numpy.typing import NDArray

from fedsim import checkpoints, messages
from fedsim.averaging import WeightedAverage
from fedsim.errors import UserError
from fedsim.ranges import Count
from fedsim.sums import TreeSum, WeightedSum
from fedsim.task import Task

Arrays = dict[str, NDArray[Any]]


class FedEraser(WeightedAverage):
    """Replay recorded updates without the forgotten clients (FedEraser; `fedsim forget --method federaser`).

    Args:
        updates: folder with the recorded updates of a run.
        targets: clients to forget.
        every: replay every so many recorded rounds.
    """

    #: each replays a recorded one
    counts_rounds: ClassVar[bool] = True
    transient: ClassVar[tuple[str, ...]] = (*WeightedAverage.transient, "_files", "_recorded", "_trained")

    def __init__(self, updates: str, targets: list[int], every: Count = 1) -> None:
        super().__init__()
        self.updates, self.targets, self.every = updates, targets, every
        self._files = sorted(Path(updates).glob("round-*.safetensors"))[::every]
        self._recorded: dict[int, Any] = {}
        self._trained: frozenset[str] = frozenset()

    def begin(self, task: Task) -> ArrayRecord:
        """The state that the recorded run began with."""
        if not self._files:
            raise UserError(f"strategy.updates: '{self.updates}' holds no recorded updates")
        self._trained = frozenset(name for name, _ in task.model.named_parameters())
        start: ArrayRecord = checkpoints.load(Path(self.updates) / "start.safetensors")["arrays"]
        return start

    @property
    def alone(self) -> bool:
        """The first round asks nobody."""
        return True

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Ask the remaining clients of the recorded cohort."""
        recorded = checkpoints.load(self._files[server_round - 1])["clients"]
        self._recorded = {client: row for client, row in recorded.items() if client not in self.targets}
        out = super().configure_train(server_round, arrays, config, grid)
        who = messages.roster(grid)
        if server_round == 1:
            return []
        return [message for message in out if who.client(message.metadata.dst_node_id) in self._recorded]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The recorded updates as they are, or in the direction in which clients go now."""
        if not self._recorded:  # a cohort of none but the forgotten
            return None, MetricRecord({})
        if server_round > 1:
            return super().aggregate_train(server_round, replies)
        like = self._current().arrays
        steps = [(row["update"], float(row["examples"])) for _, row in sorted(self._recorded.items())]
        return messages.arrays_of(_moved(messages.views_of(like), steps)), MetricRecord({})

    def combine(
        self, server_round: int, replies: Sequence[tuple[int, Message]], like: ArrayRecord
    ) -> Arrays | None:
        """Calibrated updates on top of the state sent out."""
        before = messages.views_of(like)
        steps = []
        for client, message in replies:
            now = messages.views_of(message.content.array_records[messages.ARRAYS])
            update = {k: now[k] - before[k] for k in self._recorded[client]["update"]}
            calibrated = {
                k: self._scaled(k, u, self._recorded[client]["update"][k]) for k, u in update.items()
            }
            metrics = message.content.metric_records[messages.METRICS]
            steps.append((calibrated, self.weight(client, metrics)))
        return _moved(before, steps)

    def _scaled(self, name: str, now: NDArray[Any], recorded: NDArray[Any]) -> NDArray[Any]:
        """The direction of `now`, as long as `recorded`."""
        length = float(np.linalg.norm(now))
        if name not in self._trained or length == 0:
            return now
        return np.asarray(now * (float(np.linalg.norm(recorded)) / length))


def _moved(before: Arrays, steps: Sequence[tuple[Arrays, float]]) -> Arrays:
    """State plus the weighted mean of some updates; entries that are not updated (counters) stay."""
    tree = TreeSum()
    for position, (update, weight) in enumerate(steps):
        tree.add(WeightedSum.of(update, weight), position)
    total = tree.total()
    if total is None or total.weight == 0:
        return before
    mean = total.mean({name: before[name].dtype.str for name in total.arrays})
    return {k: (v + mean[k]).astype(v.dtype) if k in mean else v for k, v in before.items()}
