"""What strategies that are not ours see of the state: its parameters.

A server optimiser (FedAdam, say) steps every entry that it is given. A running variance of BatchNorm is no
parameter: such a step makes it negative. Krum measures distances over all entries, and a counter of batches
outweighs every parameter. So entries that are no parameters pass such a strategy by.

    arrays ─┬─ parameters ─> configure_train ─> instructions ─┬─> clients
            └─ statistics ────────────────────────────────────┘
    replies ┬─ parameters ─> aggregate_train ─────────────────────────────┬─> arrays
            └─ statistics ─> weighted mean over the replies that it used ─┘
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import (
    Bulyan,
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
    FedMedian,
    FedTrimmedAvg,
    Strategy,
)
from numpy.typing import NDArray

from fedsim import messages
from fedsim.errors import UserError
from fedsim.sums import TreeSum

#: rules that take no step and treat every coordinate by itself: statistics are safe with them
_BY_COORDINATE = {cls.aggregate_train for cls in (FedAvg, FedMedian, FedTrimmedAvg)}
_NOISY = (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
)


class ServerStep:
    """The training half of a strategy; all but parameters passes it by, where it would change that.

    Args:
        strategy: any; one with `whole_state = True` looks after statistics itself, as ours do.
        statistics: names of shared entries that are no parameters.

    Raises:
        UserError: the strategy adds noise, which statistics cannot bear and must not be sent without.
    """

    def __init__(self, strategy: Strategy, statistics: frozenset[str]) -> None:
        self.strategy = strategy
        own = getattr(strategy, "whole_state", False)
        safe = own or type(strategy).aggregate_train in _BY_COORDINATE
        self.statistics = frozenset() if safe else statistics
        if self.statistics and isinstance(strategy, _NOISY):
            raise UserError(
                f"{type(strategy).__name__} adds noise to all that clients send, and '{min(statistics)}' "
                "is no parameter: noise breaks it, and without noise it would tell of the data; use a "
                "model without BatchNorm, or keep such entries with the clients: [payload] personal = "
                '["*running_*", "*num_batches*"]'
            )

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """The strategy's instructions, with the whole state in them."""
        self._sent = arrays
        seen = arrays if not self.statistics else _without(arrays, self.statistics)
        out = list(self.strategy.configure_train(server_round, seen, config, grid))
        if not self.statistics:
            return out
        contents = {id(message.content): message.content for message in out}  # most share one
        whole = {key: self._completed(content) for key, content in contents.items()}
        for message in out:
            message.content = whole[id(message.content)]
        return out

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message], who: messages.Roster
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """What the strategy makes of the parameters, and the mean of everything else."""
        if not self.statistics:
            return _aggregated(self.strategy, server_round, replies)
        replies = list(replies)
        left: dict[int, tuple[int, Mapping[str, NDArray[Any]]]] = {}  # content -> position, statistics
        for position, (_, message) in enumerate(messages.by_client(replies, who)):
            record = message.content.get(messages.ARRAYS) if message.has_content() else None
            if isinstance(record, ArrayRecord) and self.statistics <= record.keys():
                rest = _without(record, self.statistics)
                values = messages.views_of(ArrayRecord({name: record[name] for name in self.statistics}))
                message.content = RecordDict({**message.content, messages.ARRAYS: rest})
                left[id(message.content)] = position, values
        with _noted(self.strategy) as used:
            arrays, metrics = _aggregated(self.strategy, server_round, replies)
        if arrays is None:
            return None, metrics
        chosen = used if used else [message.content for message in replies if message.has_content()]
        found = self._mean([(*left[id(content)], content) for content in chosen if id(content) in left])
        return ArrayRecord({**arrays, **messages.arrays_of(found)}), metrics

    def _completed(self, content: RecordDict) -> RecordDict:
        record = content.get(messages.ARRAYS)
        if not isinstance(record, ArrayRecord):
            return content
        whole = ArrayRecord({name: record.get(name, array) for name, array in self._sent.items()})
        return RecordDict({**content, messages.ARRAYS: whole})

    def _mean(
        self, replies: Sequence[tuple[int, Mapping[str, NDArray[Any]], RecordDict]]
    ) -> dict[str, NDArray[Any]]:
        """Of (position, statistics, content): the mean, or the median where a strategy mistrusts clients."""
        if isinstance(self.strategy, Bulyan):
            return {n: np.median([values[n] for _, values, _ in replies], axis=0) for n in self.statistics}
        key = getattr(self.strategy, "weighted_by_key", messages.EXAMPLES)
        tree = TreeSum()
        for position, values, content in replies:
            weight = content.metric_records[messages.METRICS][key]
            tree.add_leaf(values, float(weight), position)  # type: ignore[arg-type]
        total = tree.total()
        if total is None:
            return {name: messages.views_of(self._sent)[name] for name in self.statistics}
        return total.mean({name: self._sent[name].dtype for name in self.statistics})


def _aggregated(
    strategy: Strategy, server_round: int, replies: Iterable[Message]
) -> tuple[ArrayRecord | None, MetricRecord | None]:
    """What the strategy returns, if it has the form that Flower asks for."""
    found: object = strategy.aggregate_train(server_round, replies)
    match found:
        case (ArrayRecord() | None as arrays, MetricRecord() | None as metrics):
            return arrays, metrics
    raise UserError(
        f"round {server_round}: {type(strategy).__name__}.aggregate_train returned {type(found).__name__}; "
        "it must return two values: an ArrayRecord or None, and a MetricRecord or None"
    )


def _without(record: ArrayRecord, names: frozenset[str]) -> ArrayRecord:
    return ArrayRecord({name: array for name, array in record.items() if name not in names})


@contextmanager
def _noted(strategy: Any) -> Iterator[list[RecordDict]]:
    """Which replies a strategy of Flower used: those whose metrics it averages."""
    used: list[RecordDict] = []
    plain = getattr(strategy, "train_metrics_aggr_fn", None)
    if plain is None:
        yield used
        return

    def noting(contents: list[RecordDict], key: str) -> MetricRecord:
        used.extend(contents)
        found: MetricRecord = plain(contents, key)
        return found

    strategy.train_metrics_aggr_fn = noting
    try:
        yield used
    finally:
        strategy.train_metrics_aggr_fn = plain
