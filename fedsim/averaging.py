"""Weighted averaging that gives the same bits for any number of workers: the base of our strategies.

The sum is taken along one fixed binary tree (`fedsim/sums.py`): here, when replies come whole, or on
the way to here by an engine that folds (`reduction`), with the same result.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from fedsim import messages
from fedsim.errors import NotEnoughReplies, UserError, listed_clients
from fedsim.gate import admit
from fedsim.ranges import Count, Fraction, Share
from fedsim.sums import TreeSum, Weighting


def weighted_metrics(replies: Sequence[Mapping[str, Any]]) -> MetricRecord:
    """Example-weighted mean of every metric that all replies have; `num-examples` is summed.

    Lists are averaged element by element; a metric whose lists differ in length is left out. A reply whose
    metric is not finite is left out of that metric's mean, and counted in `..._unmeasured`; the mean of none
    is NaN.
    """
    weights = np.array([float(m[messages.EXAMPLES]) for m in replies])
    found: dict[str, Any] = {}
    for key in replies[0]:
        if key == messages.EXAMPLES or key.startswith(messages.ROWS) or not all(key in m for m in replies):
            continue
        if len({np.shape(m[key]) for m in replies}) > 1:
            continue
        stacked = np.array([m[key] for m in replies], dtype=np.float64)
        finite = np.isfinite(stacked.reshape(len(replies), -1)).all(1)
        found[key] = _mean(stacked[finite], weights[finite]).tolist()
        if not finite.all():
            found[key + messages.UNMEASURED] = int((~finite).sum())
    found[messages.EXAMPLES] = round(sum(float(m[messages.EXAMPLES]) for m in replies))
    return MetricRecord(found)


def _mean(stacked: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weighted mean over the first axis, the plain one where nothing weighs anything; NaN of nothing."""
    if not len(stacked):
        return np.full(stacked.shape[1:], np.nan)
    if not weights.any():
        weights = np.ones(len(stacked))
    return np.asarray(np.tensordot(weights, stacked, axes=1) / weights.sum())


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
        weighting: `examples` weighs a client by its training samples n_k, also where `client.steps` takes
            fewer of them in a round; `samples-seen` by the samples that its steps took in the round (in every
            epoch anew); `uniform` by one.
    """

    #: what an engine may do with the replies on their way here: sum them up (None: nothing)
    reduction: ClassVar[Literal["weighted-mean"] | None] = "weighted-mean"
    #: it averages entries that are no parameters (statistics of BatchNorm) by itself
    whole_state: ClassVar[bool] = True
    #: attributes that live within one round only and are not part of a checkpoint
    transient: ClassVar[tuple[str, ...]] = ("_round",)
    #: sections of the experiment file this strategy brings along; the file's own keys win
    defaults: ClassVar[dict[str, dict[str, Any]]] = {}
    #: of these sections the name in `defaults` is part of the method: the file's may not be another one
    tied: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        fraction: Share = 1.0,
        min_clients: Count = 1,
        min_replies: Count = 1,
        fraction_evaluate: Fraction = 1.0,
        weighting: Weighting = "examples",
    ) -> None:
        self.fraction = fraction
        self.min_clients = min_clients
        self.min_replies = min_replies
        self.fraction_evaluate = fraction_evaluate
        self.weighting = weighting
        self._round: _Round | None = None

    def __init_subclass__(cls, **options: Any) -> None:
        """A method that looks at single replies must get them: it loses `reduction` unless it says so."""
        super().__init_subclass__(**options)
        looks = {"weight", "combine", "aggregate_train", "reply_shapes"} & set(vars(cls))
        if looks and "reduction" not in vars(cls):
            cls.reduction = None

    # ---------------------------------------------------------------- what a method overrides

    def client_config(self, server_round: int, client: int) -> Mapping[str, Any]:
        """Extra keys of the config record for one client (default: none; then all share one record)."""
        return {}

    def weight(self, client: int, metrics: MetricRecord) -> float:
        """Weight of one reply in the mean (an engine that folds uses `weighting` instead)."""
        return messages.weight_of(metrics, self.weighting)

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
        tree = TreeSum()
        rows = self._rows(replies, like)
        old = messages.views_of(like)
        for (client, message), own in zip(replies, rows, strict=True):
            weight = self.weight(client, _metrics(message))
            values = {**messages.views_of(_arrays(message))}
            values |= {name: np.zeros_like(old[name]) for name in old.keys() - values.keys()}
            tree.add_leaf(values, weight, position[client], own)
        total = tree.total()
        if total is None:
            return None
        return total.mean({name: array.dtype for name, array in like.items()}, old)

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
        folded = getattr(replies, "folded", None)
        if folded is not None:
            return self._adopt(server_round, folded)
        good = self._valid(replies, messages.shapes_of(current.arrays), server_round)
        values = self.combine(server_round, good, current.arrays)
        metrics = weighted_metrics([_metrics(message) for _, message in good])
        return (None if values is None else messages.arrays_of(values)), metrics

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Example-weighted mean of the clients' metrics; None when no client was asked."""
        if not self.fraction_evaluate:
            return None
        good = self._valid(replies, None, server_round)
        return weighted_metrics([_metrics(message) for _, message in good])

    def summary(self) -> None:
        """Flower calls this before its own loop; fedsim prints its own header."""

    # ------------------------------------------------------------------------------- internals

    def _rows(
        self, replies: Sequence[tuple[int, Message]], like: ArrayRecord
    ) -> list[dict[str, NDArray[Any]]]:
        """Row weights of every reply; one that says nothing of rows that others weigh weighs them alike.

        Rows of an entry that a client left out weigh nothing.
        """
        found = [self.row_weights(client, _metrics(message)) for client, message in replies]
        names = {name for own in found for name in own}
        names |= {name for name in like if name.startswith(messages.OPTIONAL)}
        for own, (client, message) in zip(found, replies, strict=True):
            sent = _arrays(message)
            for name in names - own.keys():
                count = like[name].shape[0]
                each = self.weight(client, _metrics(message)) / count if name in sent else 0.0
                own[name] = np.full(count, each)
        return found

    def _adopt(
        self, server_round: int, folded: messages.Folded
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The mean of a round that the engine summed up; it applied the checks of `_valid`."""
        current = self._current()
        current.refused = dict(folded.refused)
        self._require(server_round, folded.metrics)
        metrics = weighted_metrics(list(folded.metrics.values()))
        if folded.total is None:
            return None, metrics
        dtypes = {name: array.dtype for name, array in current.arrays.items()}
        return messages.arrays_of(folded.total.mean(dtypes)), metrics

    def _require(self, server_round: int, good: Collection[int]) -> None:
        """End the run when too few clients (`good`) sent something usable."""
        if len(good) >= self.min_replies:
            return
        refused = self.refused
        silent = sorted(set(self._current().cohort) - set(good) - set(refused))
        needed = f"the strategy needs {self.min_replies} (min_replies)"
        raise shortage(f"round {server_round}: {len(good)} usable replies, {needed}", refused, silent)

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
        like: messages.Shapes | None,
        server_round: int,
    ) -> list[tuple[int, Message]]:
        """Good replies in order of client; those that have not been through the gate go through it here."""
        current = self._current()
        refused = getattr(replies, "refused", None)
        if refused is None:
            weight = messages.EXAMPLES if like is None else messages.weight_key(self.weighting)
            replies = admit(replies, dict.fromkeys(current.cohort, like), current.who, weight)
            refused = replies.refused
        current.refused = dict(refused or {})
        good = messages.by_client(replies, current.who)
        self._require(server_round, [client for client, _ in good])
        return good

    @property
    def refused(self) -> dict[int, str]:
        """Clients whose last reply could not be used, and why."""
        return {} if self._round is None else self._round.refused

    def _current(self) -> _Round:
        if self._round is None:
            raise UserError("aggregate_train was called before configure_train")
        return self._round


def weighting_of(strategy: Strategy) -> Weighting | None:
    """How an engine may sum up the strategy's train replies; None: it must hand over every one of them."""
    if isinstance(strategy, WeightedAverage) and strategy.reduction == "weighted-mean":
        return strategy.weighting
    return None


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


def shortage(first: str, refused: Mapping[int, str], silent: Sequence[int]) -> NotEnoughReplies:
    """What ends a run that has too few replies.

    Args:
        first: what is missing.
        refused: clients whose replies cannot be used, and why.
        silent: clients that did not answer.
    """
    if any("NaN" in reason for reason in refused.values()):
        first += "; training diverges: lower client.lr or set client.clip"
    lines = [first]
    lines += [f"  client {client}: {reason.splitlines()[0]}" for client, reason in list(refused.items())[:5]]
    if len(refused) > 5:
        lines.append(f"  and {len(refused) - 5} more")
    if silent:
        lines.append(f"  no answer from {listed_clients(silent)}")
    return NotEnoughReplies("\n".join(lines))
