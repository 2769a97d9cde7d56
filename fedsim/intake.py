"""What the round loop does with replies: the gate, the strategy, and saying what was left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from flwr.app import ArrayRecord, Message
from flwr.serverapp.strategy import Strategy

from fedsim import messages
from fedsim.averaging import WeightedAverage, shortage, weighted_metrics
from fedsim.errors import listed, listed_clients
from fedsim.evaluation import unmeasured
from fedsim.gate import admit, alike
from fedsim.messages import Replies, Roster
from fedsim.server_step import ServerStep
from fedsim.strategy_state import innermost

#: metrics of good replies by client
Rows: TypeAlias = Mapping[int, Mapping[str, Any]]


class Intake:
    """Takes in the replies of a run's exchanges.

    Args:
        step: the training half of any Flower strategy.
        who: which node is which client.
        notice: is told what the user should know.
    """

    def __init__(self, step: ServerStep, who: Roster, notice: Callable[[str], None]) -> None:
        inner = innermost(step.strategy)
        self.step = step
        self.strategy = step.strategy
        self.who = who
        self.notice = notice
        #: a strategy that is not ours need not get along with replies that differ, or that weigh nothing
        self.theirs = not isinstance(inner, WeightedAverage)
        self.weight = (
            messages.weight_key(inner.weighting)
            if isinstance(inner, WeightedAverage)
            else str(getattr(inner, "weighted_by_key", messages.EXAMPLES))
        )
        self._said: set[object] = set()

    def admitted(self, number: int, out: Sequence[Message], received: Replies) -> Replies:
        """The replies that pass the gate (`refused` says which do not).

        What an engine summed up was checked there. Answers to a strategy's own questions are checked where
        they are read: nobody else knows what they must hold.
        """
        asked = [self.who.client(message.metadata.dst_node_id) for message in out]
        answered = {client for client, _ in messages.by_client(received, self.who)}
        answered |= set(received.folded.metrics if received.folded is not None else ())
        if silent := [client for client in asked if client not in answered]:
            self.notice(f"round {number}: no answer in time from {listed_clients(silent)}")
        kinds = {message.metadata.message_type for message in out}
        if received.folded is not None or kinds not in ({messages.TRAIN}, {messages.EVALUATE}):
            return received
        shapes = self._shapes(out) if messages.TRAIN in kinds else [None] * len(out)
        weight = self.weight if self.theirs or messages.TRAIN in kinds else messages.EXAMPLES
        return admit(received, dict(zip(asked, shapes, strict=True)), self.who, weight)

    def rows(self, replies: Replies) -> dict[int, Mapping[str, Any]]:
        """Metrics of the good replies by client; nothing where replies did not go through the gate."""
        if replies.folded is not None:
            return dict(replies.folded.metrics)
        if replies.refused is None:
            return {}
        return {
            self.who.client(message.metadata.src_node_id): message.content.metric_records[messages.METRICS]
            for message in replies
        }

    def trained(self, number: int, replies: Replies) -> tuple[ArrayRecord | None, Mapping[str, Any] | None]:
        """What the strategy makes of the replies to a train message.

        Raises:
            NotEnoughReplies: a strategy that is not ours has none to work with.
        """
        rows = self.rows(replies)
        self.name_left_out(number, rows, _not_finite)
        arrays: ArrayRecord | None
        metrics: Mapping[str, Any] | None
        if not self.theirs or replies.refused is None:
            arrays, metrics = self.step.aggregate_train(number, replies, self.who)
        elif not rows:
            raise shortage(f"round {number}: no usable reply", replies.refused, [])
        else:
            arrays, metrics = self._trained_by_theirs(number, replies, rows)
        if arrays is None and rows and not self._weighs(rows):
            self.notice(f"round {number}: '{self.weight}' is 0 at every client, so the state stays as it was")
        elif arrays is None and rows and self.theirs:
            self.notice(f"round {number}: {type(self.strategy).__name__} leaves the state as it was")
        if arrays is not None and "state" not in self._said and (odd := _broken(arrays)):
            self._said.add("state")
            self.notice(
                f"round {number}: {type(self.strategy).__name__} made NaN or infinity of finite replies, in "
                f"{listed(odd)}: lower its step size, or check its aggregate_train"
            )
        return arrays, metrics

    def evaluated(self, number: int, replies: Replies) -> list[Mapping[str, Any]]:
        """Tell the strategy what clients measured; their metrics in order of client."""
        rows = self.rows(replies)
        self.name_left_out(number, rows, unmeasured)
        if not self.theirs:
            self.strategy.aggregate_evaluate(number, replies)
        elif self._weighs(rows):
            self.strategy.aggregate_evaluate(number, self._alike(replies, rows))
        return [rows[client] for client in sorted(rows)]

    def name_left_out(
        self, number: int, rows: Rows, why: Callable[[Mapping[str, Any]], Sequence[str]]
    ) -> None:
        """Say which clients are left out of means, and why: once for each client and reason."""
        found: dict[str, list[int]] = {}
        for client, row in rows.items():
            for reason in why(row):
                if (client, reason) not in self._said:
                    self._said.add((client, reason))
                    found.setdefault(reason, []).append(client)
        for reason, clients in found.items():
            self.notice(f"round {number}: {listed_clients(sorted(clients))} left out of the mean: {reason}")

    # ------------------------------------------------------------------------------- internals

    def _shapes(self, out: Sequence[Message]) -> list[messages.Shapes | None]:
        """What arrays the replies must have."""
        own = getattr(self.strategy, "reply_shapes", None)
        if own is not None:
            return [own(message) for message in out]
        sent = [message.content.get(messages.ARRAYS) for message in out]
        found = {id(record): messages.shapes_of(record) for record in sent if isinstance(record, ArrayRecord)}
        return [found.get(id(record)) for record in sent]

    def _trained_by_theirs(
        self, number: int, replies: Replies, rows: Rows
    ) -> tuple[ArrayRecord | None, Mapping[str, Any] | None]:
        own = weighted_metrics(list(rows.values()))
        if not self._weighs(rows):
            return None, own
        arrays, metrics = self.step.aggregate_train(number, self._alike(replies, rows), self.who)
        if metrics is None:
            return arrays, None
        spoilt = {key for key, value in metrics.items() if not is_finite(value)}
        kept = {k: v for k, v in own.items() if k.removesuffix(messages.UNMEASURED) in spoilt}
        return arrays, {**metrics, **kept}

    def _alike(self, replies: Replies, rows: Rows) -> Replies:
        same, odd = alike(replies, list(rows))
        for name, said in odd.items():
            if name not in self._said:
                self._said.add(name)
                self.notice(f"{type(self.strategy).__name__} is not shown '{name}': {said}")
        return same

    def _weighs(self, rows: Rows) -> bool:
        return any(row[self.weight] for row in rows.values())


def averaged_by_flower(strategy: Strategy) -> bool:
    """Whether Flower's own code makes the new state."""
    return type(strategy).aggregate_train.__module__.startswith("flwr.")


def _broken(arrays: ArrayRecord) -> list[str]:
    """Names of arrays that hold NaN or infinity."""
    values = messages.views_of(arrays)
    return [name for name, v in values.items() if v.dtype.kind == "f" and not np.isfinite(v).all()]


def is_finite(value: Any) -> bool:
    """Whether a metric holds neither NaN nor infinity."""
    if isinstance(value, float):
        return math.isfinite(value)
    return all(map(is_finite, value)) if isinstance(value, list) else True


def _not_finite(row: Mapping[str, Any]) -> list[str]:
    """Why metrics of training are left out of their mean (`diagnosis` speaks of the loss)."""
    return [
        f"{key} holds {'NaN or infinity' if isinstance(value, list) else value}"
        for key, value in row.items()
        if key != "loss" and not is_finite(value)
    ]
