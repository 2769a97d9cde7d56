"""The vocabulary of the wire: actions, record keys, config keys, and who is which client.

A train instruction and its reply, in Flower's own convention, so that any Flower strategy drives our
clients and our strategies drive any Flower client:

    instruction  RecordDict{ "arrays": shared state, "config": {server-round, seed, lr-scale, ...} }
    reply        RecordDict{ "arrays": shared state, "metrics": {num-examples, loss, ...} }
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from fedsim._flwr import LazyArray, data_of, numpy_view
from fedsim.errors import UserError
from fedsim.sums import WeightedSum, Weighting

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
STRENGTH = "detach-strength"
HEAD_ONLY = "head-only"
RELEASED = "released"

#: how names of shared entries begin that a client may leave out: they are averaged over those that send them
OPTIONAL = "auxiliary."

# keys of the metric record
EXAMPLES = "num-examples"  #: training samples of the client, n_k
SECONDS = "seconds"
SAMPLES = "samples"  #: passes of a sample through the model (epochs count)
ROWS = "rows:"  #: + name of an array: samples behind each of its rows (rows that belong to classes)
SKIPPED = "steps_skipped"  #: share of the steps that fp16's loss scaling left out (only with fp16)

#: which metric a reply weighs; None: one
_WEIGHTS: dict[Weighting, str | None] = {"examples": EXAMPLES, "samples-seen": SAMPLES, "uniform": None}


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
            size = 2 if name in half else np.dtype(array.dtype).itemsize
            total += math.prod(array.shape) * size
    return total


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
    """Replies of one exchange, in order of their instructions; of a folded one, those that were refused."""

    folded: Folded | None = None

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


def weight_of(metrics: Mapping[str, Any], weighting: Weighting) -> float:
    """Weight of a reply in a mean.

    Args:
        metrics: of the reply.
        weighting: `examples` is n_k (FedAvg, arXiv 1602.05629), the training samples of the client, however
            many of them its steps took; `samples-seen` is how many passed through its model in this round
            (a sample counts in every epoch); `uniform` is one.
    """
    key = _WEIGHTS[weighting]
    return 1.0 if key is None else float(metrics[key])


def complaint(
    message: Message,
    like: Mapping[str, tuple[tuple[int, ...], str]] | None,
    weighting: Weighting = "examples",
) -> str | None:
    """Why a reply cannot be used, in words; None when it can.

    Args:
        message: the reply.
        like: expected arrays, name -> (shape, dtype); None skips the check of arrays.
        weighting: what the reply is going to weigh.
    """
    if message.has_error():
        return f"error: {message.error.reason}"
    metrics = message.content.get(METRICS)
    if not isinstance(metrics, MetricRecord):
        return f"no metric record named '{METRICS}'"
    for key in (EXAMPLES, _WEIGHTS[weighting] or EXAMPLES):
        count = metrics.get(key)
        if not isinstance(count, int | float) or not np.isfinite(count) or count < 0:
            return f"'{key}' is {count!r}, not a count"
    if like is None:
        return None
    return _array_complaint(message.content.get(ARRAYS), like) or _rows_complaint(metrics, like)


def _rows_complaint(metrics: MetricRecord, like: Mapping[str, tuple[tuple[int, ...], str]]) -> str | None:
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


def _array_complaint(arrays: object, like: Mapping[str, tuple[tuple[int, ...], str]]) -> str | None:
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
        try:
            values = numpy_view(array)
        except (TypeError, ValueError) as error:
            return f"'{name}' cannot be read: {error}"
        if tuple(values.shape) != shape:
            return f"'{name}' says shape {shape} but holds {tuple(values.shape)}"
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            return f"'{name}' holds NaN or infinity"
    return None


def shapes_of(record: ArrayRecord) -> dict[str, tuple[tuple[int, ...], str]]:
    """name -> (shape, dtype) of a record, the form `complaint` compares with."""
    return {name: (tuple(array.shape), array.dtype) for name, array in record.items()}


def by_client(replies: Iterable[Message], who: Roster) -> list[tuple[int, Message]]:
    """Replies with their client, in order of partition id."""
    pairs = [(who.client(message.metadata.src_node_id), message) for message in replies]
    return sorted(pairs, key=lambda pair: pair[0])
