"""The vocabulary of the wire: actions, record keys, config keys, and who is which client.

A train instruction and its reply, in Flower's own convention, so that any Flower strategy drives our
clients and our strategies drive any Flower client:

    instruction  RecordDict{ "arrays": shared state, "config": {server-round, seed, lr-scale, ...} }
    reply        RecordDict{ "arrays": shared state, "metrics": {num-examples, loss, ...} }
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, TypeAlias

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from fedsim._flwr import LazyArray, data_of, numpy_view
from fedsim.errors import UserError
from fedsim.sums import WeightedSum, Weighting

log = logging.getLogger("fedsim")

#: arrays by name -> (shape, dtype)
Shapes: TypeAlias = Mapping[str, tuple[tuple[int, ...], str]]

# message types
TRAIN = "train"
EVALUATE = "evaluate"
HELLO = "query.hello"
CHANNELS = "query.channel_statistics"
ASCENT = "train.ascent"
SECOND_MOMENTS = "query.second_moments"
AUDIT = "query.audit"

# records
ARRAYS = "arrays"
CONFIG = "config"
METRICS = "metrics"
MASKS = "masks"  #: layer -> bool [channels], True where a channel is pruned
PROBES = "probes"

# keys of the config record
ROUND = "server-round"
SEED = "seed"
LR_SCALE = "lr-scale"
EXPERIMENT = "experiment"
FROZEN = "frozen-digest"
PARTITION = "partition-id"
CODE = "code-digest"
ATTRIBUTES = "attributes"
RANGES = "value-ranges"
CLASSES = "classes"  #: names in the order of the labels
STRENGTH = "detach-strength"
HEAD_ONLY = "head-only"
RELEASED = "released"

#: how names of shared entries begin that a client may leave out: they are averaged over those that send them
OPTIONAL = "auxiliary."

# keys of the metric record
EXAMPLES = "num-examples"  #: training samples of the client, n_k
SECONDS = "seconds"
SAMPLES = "samples"  #: passes of a sample through the model (epochs count)
UNMEASURED = "_unmeasured"  #: after the name of a figure: clients that are left out of its mean
ROWS = "rows:"  #: + name of an array: samples behind each of its rows (rows that belong to classes)
SKIPPED = "steps_skipped"  #: share of the steps that fp16's loss scaling left out (only with fp16)


def arrays_of(values: Mapping[str, NDArray[Any]]) -> ArrayRecord:
    """numpy arrays -> ArrayRecord without serialising them (the arrays must not be written to later)."""
    record = ArrayRecord()
    for name, array in values.items():
        record[name] = LazyArray(array)
    return record


def views_of(record: ArrayRecord) -> dict[str, NDArray[Any]]:
    """ArrayRecord -> read-only numpy views by name."""
    return {name: numpy_view(array) for name, array in data_of(record).items()}


def nbytes(content: RecordDict, half: frozenset[str] = frozenset()) -> int:
    """Bytes of array values in a message's content: what travels, but for headers of some hundred bytes.

    Args:
        content: of an instruction or a reply.
        half: names that travel as bfloat16, two bytes a value.
    """
    total = 0
    for record in content.array_records.values():
        for name, array in record.items():
            size = 2 if name in half else _itemsize(array.dtype)
            total += math.prod(array.shape) * size
    return total


@cache
def _itemsize(dtype: str) -> int:
    """Bytes of a value; 0 where a client made up the dtype (its reply is refused later on)."""
    try:
        return np.dtype(dtype).itemsize
    except TypeError:
        return 0


def config_of(message: Message) -> ConfigRecord:
    """The config record of an instruction."""
    record = message.content.get(CONFIG)
    if not isinstance(record, ConfigRecord):
        raise ValueError(f"the instruction has no config record named '{CONFIG}'")
    return record


def reply(
    message: Message,
    arrays: ArrayRecord | None = None,
    metrics: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Message:
    """Answer an instruction."""
    content = RecordDict()
    if arrays is not None:
        content[ARRAYS] = arrays
    content[METRICS] = MetricRecord(dict(metrics or {}))
    if config is not None:
        content[CONFIG] = ConfigRecord(dict(config))
    return Message(content, reply_to=message)


@dataclass
class Folded:
    """What an engine made of the train replies of one round instead of handing them over.

    Attributes:
        total: Σ weight·arrays and Σ weight of the good replies (None: none weighs anything).
        metrics: metrics of the good replies by client, in order of client.
        refused: clients whose reply is not in the sum, and why.
    """

    total: WeightedSum | None
    metrics: dict[int, Mapping[str, Any]]
    refused: dict[int, str]


class Replies(list[Message]):
    """Replies of one exchange, in order of their instructions; of a folded one, those that were refused.

    Attributes:
        folded: what an engine made of the good ones.
        refused: clients whose reply the gate kept back, and why; None: these replies have not been there.
    """

    folded: Folded | None = None
    refused: dict[int, str] | None = None

    @property
    def answered(self) -> int:
        """Number of clients that answered."""
        return len(self) + (len(self.folded.metrics) if self.folded is not None else 0)


class Roster(Protocol):
    """Which node is which client. Our grids have one (`grid.roster`)."""

    def clients(self) -> Sequence[int]:
        """Partition ids that take part now, ascending."""

    def everyone(self) -> Sequence[int]:
        """All partition ids, also of clients that do not train (they are to be forgotten, say)."""

    def node(self, client: int) -> int:
        """Node id of a client."""

    def client(self, node: int) -> int:
        """Partition id of a node."""


@dataclass(frozen=True)
class _SortedNodes:
    """The roster of a foreign grid: the i-th smallest node id is client i."""

    nodes: tuple[int, ...]

    def clients(self) -> Sequence[int]:
        return range(len(self.nodes))

    def everyone(self) -> Sequence[int]:
        return self.clients()

    def node(self, client: int) -> int:
        return self.nodes[client]

    def client(self, node: int) -> int:
        return self.nodes.index(node)


def roster(grid: Grid) -> Roster:
    """The grid's own map of nodes and clients, or, for a stranger's grid, the order of its node ids."""
    own: Roster | None = getattr(grid, "roster", None)
    return own if own is not None else _SortedNodes(tuple(sorted(grid.get_node_ids())))


def sample_clients(
    available: Sequence[int], fraction: float, minimum: int, seed: int, stream: int
) -> list[int]:
    """Draw clients without replacement from a stream of its own; the same everywhere for the same seed.

    Args:
        available: partition ids, ascending.
        fraction: share of them to draw (rounded, at least `minimum`).
        minimum: fewest clients that may be drawn.
        seed: seed of the run.
        stream: number of the stream, usually the round.

    Returns:
        Partition ids in ascending order.

    Raises:
        UserError: fewer than `minimum` clients are there.
    """
    if len(available) < minimum:
        raise UserError(
            f"the strategy needs at least {minimum} clients but only {len(available)} are there; "
            "lower its min_clients or raise partition.clients"
        )
    size = max(minimum, round(len(available) * fraction))
    if size >= len(available):
        return list(available)
    rng = np.random.default_rng([seed, stream])
    chosen = rng.choice(len(available), size=size, replace=False, shuffle=False)
    return [available[i] for i in sorted(chosen.tolist())]


#: largest count of samples: beyond, float64 does not tell one from the next
_LARGEST = 2**53


def weight_of(metrics: Mapping[str, Any], weighting: Weighting) -> float:
    """Weight of a reply in a mean.

    Args:
        metrics: of the reply.
        weighting: `examples` is n_k (FedAvg, arXiv 1602.05629), the training samples of the client, however
            many of them its steps took; `samples-seen` is how many passed through its model in this round
            (a sample counts in every epoch); `uniform` is one.
    """
    return 1.0 if weighting == "uniform" else float(metrics[weight_key(weighting)])


def weight_key(weighting: Weighting) -> str:
    """Name of the metric that a reply needs for this weighting."""
    return SAMPLES if weighting == "samples-seen" else EXAMPLES


def complaint(message: Message, like: Shapes | None, weight: str = EXAMPLES) -> str | None:
    """Why a reply cannot be used, in words; None when it can.

    Args:
        message: the reply.
        like: expected arrays; None: there may be any, but they must be finite.
        weight: name of the metric that replies are weighted with.
    """
    if message.has_error():
        return f"error: {message.error.reason}"
    metrics = message.content.get(METRICS)
    if not isinstance(metrics, MetricRecord):
        return f"no metric record named '{METRICS}'"
    for key in dict.fromkeys((EXAMPLES, weight)):
        count = metrics.get(key)
        if not isinstance(count, int | float) or not 0 <= count <= _LARGEST:
            return f"'{key}' is {count!r}, not a count"
    found = {k: r for k, r in data_of(message.content).items() if isinstance(r, ArrayRecord)}
    reason = None
    if like is not None:
        reason = _array_complaint(found.pop(ARRAYS, None), like) or _rows_complaint(metrics, like)
    return reason or next(filter(None, map(_value_complaint, found.values())), None)


def _rows_complaint(metrics: MetricRecord, like: Shapes) -> str | None:
    for key in metrics:
        if not key.startswith(ROWS):
            continue
        shape, _ = like.get(key.removeprefix(ROWS), ((), ""))
        counts = np.asarray(metrics[key], dtype=np.float64)
        if (
            counts.shape != shape[:1]
            or counts.ndim != 1
            or not np.isfinite(counts).all()
            or (counts < 0).any()
        ):
            return f"'{key}' is no list of counts, one for each row"
    return None


def _array_complaint(arrays: object, like: Shapes) -> str | None:
    if not isinstance(arrays, ArrayRecord):
        return f"no array record named '{ARRAYS}'"
    found = data_of(arrays)
    if found.keys() != like.keys():
        needed = {name for name in like if not name.startswith(OPTIONAL)}
        missing, extra = sorted(needed - found.keys()), sorted(found.keys() - like.keys())
        if missing or extra:
            return f"wrong names (missing {missing[:3]}, unexpected {extra[:3]})"
    for name, array in found.items():
        shape, dtype = like[name]
        if tuple(array.shape) != shape or array.dtype != dtype:
            return f"'{name}' is {array.dtype}{tuple(array.shape)}, expected {dtype}{shape}"
    return _value_complaint(arrays)


def _value_complaint(arrays: ArrayRecord) -> str | None:
    for name, array in data_of(arrays).items():
        try:
            values = numpy_view(array)
        except ValueError as error:
            return f"'{name}' cannot be read: {error}"
        said, held = (array.dtype, tuple(array.shape)), (_name_of(values.dtype), values.shape)
        if said != held:
            return f"'{name}' says {said[0]}{said[1]} but holds {held[0]}{held[1]}"
        if values.dtype.kind in "fc" and not np.isfinite(values).all():
            return f"'{name}' holds NaN or infinity"
    return None


@cache
def _name_of(dtype: np.dtype[Any]) -> str:
    """`str(dtype)`, which takes numpy 20 microseconds."""
    return str(dtype)


def shapes_of(record: ArrayRecord) -> dict[str, tuple[tuple[int, ...], str]]:
    """name -> (shape, dtype) of a record, the form `complaint` compares with."""
    return {name: (tuple(array.shape), array.dtype) for name, array in record.items()}


def by_client(replies: Iterable[Message], who: Roster) -> list[tuple[int, Message]]:
    """Replies with their client, in order of partition id; a reply from none of the clients is left out."""
    pairs = []
    for message in replies:
        node = message.metadata.src_node_id
        try:
            pairs.append((who.client(node), message))
        except (LookupError, ValueError):  # an error reply of a SuperLink has the SuperLink as its source
            said = message.error.reason if message.has_error() else "a reply"
            log.warning("from node %d, which is none of the clients: %s", node, said)
    return sorted(pairs, key=lambda pair: pair[0])
