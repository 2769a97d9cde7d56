"""Weighted averaging that gives the same bits for any number of workers, and the strategy built on it.

A mean is a sum of `weight * values` and of `weight`, both float64, divided and cast once at the end.
Floating-point sums depend on their order, so the order is fixed: one binary tree over the positions of
the cohort (clients in order of partition id). A leaf whose reply is missing or refused is skipped; it
does not shift its neighbours. An aligned block of 2^k positions is one subtree, so a worker may sum its
own block and the result stays bit-identical.

        ((0+1)+(2+3)) + ((4+5)+(6+·))          7 clients; client 7 would join at the dot
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from fedsim import messages
from fedsim.errors import NotEnoughReplies, UserError
from fedsim.ranges import Count, Fraction, Share


@dataclass
class WeightedSum:
    """Σ weight·values and Σ weight of some clients (one element of an algebra with `+`)."""

    arrays: dict[str, NDArray[Any]]
    weight: float
    largest: dict[str, NDArray[Any]] = field(default_factory=dict)  #: integer entries: their maximum
    rows: dict[str, NDArray[Any]] = field(
        default_factory=dict
    )  #: entries whose rows have weights: their sums

    @classmethod
    def of(
        cls,
        values: Mapping[str, NDArray[Any]],
        weight: float,
        rows: Mapping[str, NDArray[Any]] | None = None,
    ) -> WeightedSum:
        """A leaf. Integer entries (counters of BatchNorm, say) are not averaged: the maximum is kept.

        Args:
            values: name -> array.
            weight: of all of them, but for
            rows: name -> weights of the rows of that array, float64 [rows].
        """
        rows = rows or {}
        floating = {k: v for k, v in values.items() if v.dtype.kind in "fc"}
        return cls(
            arrays={
                k: np.multiply(v, _per_row(rows[k], v) if k in rows else weight, dtype=np.float64)
                for k, v in floating.items()
            },
            weight=float(weight),
            largest={k: v for k, v in values.items() if k not in floating},
            rows={k: np.array(v) for k, v in rows.items()},
        )

    def add(self, other: WeightedSum) -> WeightedSum:
        """`self + other`, into the buffers of `self` (both are given up by the caller)."""
        for name, values in other.arrays.items():
            self.arrays[name] += values
        self.weight += other.weight
        self.largest = {k: np.maximum(v, other.largest[k]) for k, v in self.largest.items()}
        for name, weights in other.rows.items():
            self.rows[name] += weights
        return self

    def mean(
        self, dtypes: Mapping[str, str], old: Mapping[str, NDArray[Any]] | None = None
    ) -> dict[str, NDArray[Any]]:
        """The weighted mean, cast once to the given dtypes, in their order.

        Args:
            dtypes: name -> dtype.
            old: where rows have weights of their own: what a row without any weight stays at.
        """
        old = old or {}
        return {name: self._mean(name, old).astype(dtype) for name, dtype in dtypes.items()}

    def _mean(self, name: str, old: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        if name in self.largest:
            return self.largest[name]
        total = self.arrays[name]
        if name not in self.rows:
            return np.asarray(total / self.weight)
        weights = _per_row(self.rows[name], total)
        return np.where(weights > 0, total / np.where(weights > 0, weights, 1), old[name])


def _per_row(weights: NDArray[Any], array: NDArray[Any]) -> NDArray[Any]:
    """Weights [rows] in the shape that multiplies the rows of an array."""
    return weights.reshape(-1, *[1] * (array.ndim - 1))


class TreeSum:
    """Adds leaves in order of position along the fixed binary tree, holding O(log n) partial sums."""

    def __init__(self) -> None:
        self._stack: list[tuple[int, WeightedSum | None]] = []

    def push(self, leaf: WeightedSum | None, level: int = 0) -> None:
        """Add the next subtree of 2^level positions (None: nothing there)."""
        while self._stack and self._stack[-1][0] == level:
            leaf = _plus(self._stack.pop()[1], leaf)
            level += 1
        self._stack.append((level, leaf))

    def total(self) -> WeightedSum | None:
        """The sum of everything pushed."""
        result: WeightedSum | None = None
        while self._stack:
            result = _plus(self._stack.pop()[1], result)
        return result


def _plus(left: WeightedSum | None, right: WeightedSum | None) -> WeightedSum | None:
    if left is None or right is None:
        return left if right is None else right
    return left.add(right)


def weighted_metrics(replies: Sequence[MetricRecord]) -> MetricRecord:
    """Example-weighted mean of every metric that all replies have; `num-examples` is summed.

    Lists are averaged element by element; a metric whose lists differ in length is left out.
    """
    weights = np.array([float(m[messages.EXAMPLES]) for m in replies])  # type: ignore[arg-type]
    total = float(weights.sum())
    if total == 0:
        weights, total = np.ones(len(replies)), float(len(replies))
    found: dict[str, Any] = {}
    for key in replies[0]:
        if key == messages.EXAMPLES or key.startswith(messages.ROWS) or not all(key in m for m in replies):
            continue
        if len({np.shape(m[key]) for m in replies}) > 1:
            continue
        stacked = np.array([m[key] for m in replies], dtype=np.float64)
        found[key] = (np.tensordot(weights, stacked, axes=1) / total).tolist()
    found[messages.EXAMPLES] = round(sum(float(m[messages.EXAMPLES]) for m in replies))  # type: ignore[arg-type, misc]
    return MetricRecord(found)


class WeightedAverage(Strategy):
    """Federated averaging: the example-weighted mean of what clients send (FedAvg, arXiv 1602.05629).

    The base of our strategies. Override `client_config` to tell clients something, `weight` to weigh
    them otherwise, or `combine` to replace the mean.

    Args:
        fraction: share of the clients that train in a round.
        min_clients: fewest clients in a round.
        min_replies: fewest usable replies; fewer end the run with the reason of every client (the run
            can be resumed).
        fraction_evaluate: share of the clients that evaluate when clients are asked to.
        weighting: `examples` weighs a client by the samples it trained on, `uniform` by one.
    """

    #: attributes that live within one round only and are not part of a checkpoint
    transient: ClassVar[tuple[str, ...]] = ("_round",)
    #: sections of the experiment file this strategy brings along; the file's own keys win
    defaults: ClassVar[dict[str, dict[str, Any]]] = {}

    def __init__(
        self,
        fraction: Share = 1.0,
        min_clients: Count = 1,
        min_replies: Count = 1,
        fraction_evaluate: Fraction = 1.0,
        weighting: Literal["examples", "uniform"] = "examples",
    ) -> None:
        self.fraction = fraction
        self.min_clients = min_clients
        self.min_replies = min_replies
        self.fraction_evaluate = fraction_evaluate
        self.weighting = weighting
        self._round: _Round | None = None

    # ---------------------------------------------------------------- what a method overrides

    def client_config(self, server_round: int, client: int) -> Mapping[str, Any]:
        """Extra keys of the config record for one client (default: none; then all share one record)."""
        return {}

    def weight(self, client: int, metrics: MetricRecord) -> float:
        """Weight of one reply in the mean."""
        return float(metrics[messages.EXAMPLES]) if self.weighting == "examples" else 1.0  # type: ignore[arg-type]

    def row_weights(self, client: int, metrics: MetricRecord) -> dict[str, NDArray[Any]]:
        """Weights of the rows of arrays whose rows belong to classes, float64 [rows]: the client's weight,
        shared out by its samples of each class. A client does not dilute what it has no data for.
        """
        found = {}
        for key in metrics:
            if key.startswith(messages.ROWS):
                counts = np.asarray(metrics[key], dtype=np.float64)
                weight = self.weight(client, metrics)
                found[key.removeprefix(messages.ROWS)] = weight * counts / max(counts.sum(), 1)
        return found

    def combine(
        self, server_round: int, replies: Sequence[tuple[int, Message]], like: ArrayRecord
    ) -> dict[str, NDArray[Any]] | None:
        """New shared state from valid replies, sorted by client; None keeps the old one.

        Args:
            server_round: number of the round.
            replies: (client, reply) pairs.
            like: the arrays sent out, for names, order and dtypes.
        """
        position = {client: i for i, client in enumerate(self._current().cohort)}
        tree, at = TreeSum(), 0
        rows = self._rows(replies, like)
        for (client, message), own in zip(replies, rows, strict=True):
            for _ in range(position[client] - at):
                tree.push(None)
            at = position[client] + 1
            weight = self.weight(client, _metrics(message))
            values = messages.views_of(_arrays(message))
            tree.push(WeightedSum.of(values, weight, own) if weight > 0 else None)
        total = tree.total()
        if total is None:
            return None
        return total.mean({name: array.dtype for name, array in like.items()}, messages.views_of(like))

    # ----------------------------------------------------------------------- Flower's Strategy

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Sample clients and address the shared state to them."""
        return self._configure(messages.TRAIN, server_round, arrays, config, grid, self.fraction)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Ask clients to evaluate the shared state with their personal parts."""
        if self.fraction_evaluate == 0:
            return []
        return self._configure(messages.EVALUATE, server_round, arrays, config, grid, self.fraction_evaluate)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check replies, average the good ones, name the others in `self.refused`."""
        current = self._current()
        good = self._valid(replies, messages.shapes_of(current.arrays), server_round)
        values = self.combine(server_round, good, current.arrays)
        metrics = weighted_metrics([_metrics(message) for _, message in good])
        return (None if values is None else messages.arrays_of(values)), metrics

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Example-weighted mean of the clients' metrics."""
        good = self._valid(replies, None, server_round)
        return weighted_metrics([_metrics(message) for _, message in good])

    def summary(self) -> None:
        """Flower calls this before its own loop; fedsim prints its own header."""

    # ------------------------------------------------------------------------------- internals

    def _rows(
        self, replies: Sequence[tuple[int, Message]], like: ArrayRecord
    ) -> list[dict[str, NDArray[Any]]]:
        """Row weights of every reply; one that says nothing of rows that others weigh weighs them alike."""
        found = [self.row_weights(client, _metrics(message)) for client, message in replies]
        names = {name for own in found for name in own}
        for own, (client, message) in zip(found, replies, strict=True):
            for name in names - own.keys():
                count = like[name].shape[0]
                own[name] = np.full(count, self.weight(client, _metrics(message)) / count)
        return found

    def _configure(
        self,
        kind: str,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,
        grid: Grid,
        fraction: float,
    ) -> list[Message]:
        who = messages.roster(grid)
        # training and evaluation draw from streams of their own
        stream = 2 * server_round + (kind != messages.TRAIN)
        seed = int(config.get(messages.SEED, 0))  # type: ignore[arg-type]
        cohort = messages.sample_clients(who.clients(), fraction, self.min_clients, seed, stream)
        config[messages.ROUND] = server_round
        self._round = _Round(cohort, arrays, who)
        shared = RecordDict({messages.ARRAYS: arrays, messages.CONFIG: config})
        out = []
        for client in cohort:
            extra = self.client_config(server_round, client)
            content = shared
            if extra:
                content = RecordDict(
                    {messages.ARRAYS: arrays, messages.CONFIG: ConfigRecord({**config, **extra})}
                )
            out.append(Message(content, message_type=kind, dst_node_id=who.node(client)))
        return out

    def _valid(
        self,
        replies: Iterable[Message],
        like: Mapping[str, tuple[tuple[int, ...], str]] | None,
        server_round: int,
    ) -> list[tuple[int, Message]]:
        current = self._current()
        good: list[tuple[int, Message]] = []
        refused: dict[int, str] = {}
        asked = set(current.cohort)
        for client, message in messages.by_client(replies, current.who):
            reason = messages.complaint(message, like)
            if client not in asked:
                reason = "it was not asked, or it answered twice"
            asked.discard(client)
            if reason is None:
                good.append((client, message))
            else:
                refused[client] = reason
        current.refused = refused
        if len(good) < self.min_replies:
            silent = sorted(set(current.cohort) - {c for c, _ in good} - set(refused))
            raise NotEnoughReplies(_too_few(server_round, len(good), self.min_replies, refused, silent))
        return good

    @property
    def refused(self) -> dict[int, str]:
        """Clients whose last reply could not be used, and why."""
        return {} if self._round is None else self._round.refused

    def _current(self) -> _Round:
        if self._round is None:
            raise UserError("aggregate_train was called before configure_train")
        return self._round


@dataclass
class _Round:
    """What a strategy remembers between `configure` and `aggregate` of one round (never checkpointed)."""

    cohort: list[int]
    arrays: ArrayRecord
    who: messages.Roster
    refused: dict[int, str] = field(default_factory=dict)


def _arrays(message: Message) -> ArrayRecord:
    record = message.content[messages.ARRAYS]
    assert isinstance(record, ArrayRecord)
    return record


def _metrics(message: Message) -> MetricRecord:
    record = message.content[messages.METRICS]
    assert isinstance(record, MetricRecord)
    return record


def _too_few(
    server_round: int, good: int, needed: int, refused: Mapping[int, str], silent: Sequence[int]
) -> str:
    first = f"round {server_round}: {good} usable replies, the strategy needs {needed} (min_replies)"
    if any("NaN" in reason for reason in refused.values()):
        first += "; training diverges: lower client.lr or set client.clip"
    lines = [first]
    lines += [f"  client {client}: {reason.splitlines()[0]}" for client, reason in list(refused.items())[:5]]
    if len(refused) > 5:
        lines.append(f"  and {len(refused) - 5} more")
    if silent:
        lines.append(f"  no answer from clients {silent[:10]}")
    return "\n".join(lines)
