"""Who has which samples: a function here is a name of `[partition]`, `partition` runs it once and caches.

    labels, groups ─ named function ─> positions per client ─ shots ─> few per class ─ pooled ─> one client

What is more than a cut is done by flwr-datasets' partitioners on a table of positions and labels alone.
Its rows are shuffled first by the run's seed, because some partitioners cut the table in order. Processes
that find the partition in the cache never import flwr_datasets (3 seconds).
"""

from __future__ import annotations

import logging
import os
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from io import BytesIO
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from fedsim import registry
from fedsim.data.store import cache_folder, cache_key, code_stamp
from fedsim.errors import UserError
from fedsim.files import write_atomic
from fedsim.ranges import Count, Positive

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

Integers = npt.NDArray[np.int64]

_VERSION = "1"


@dataclass(frozen=True)
class Table:
    """What a partition function may look at.

    Args:
        labels: label of each sample [n], int64.
        groups: natural owner of each sample [n], int64, or None.
        clients: number of clients to make.
        seed: every random choice follows from it.
    """

    labels: Integers
    groups: Integers | None
    clients: int
    seed: int


@dataclass(frozen=True)
class Partition:
    """Positions of all clients in one flat array: client i has `indices[offsets[i]:offsets[i + 1]]`.

    Args:
        indices: int64 [total], sorted within each client.
        offsets: int64 [clients + 1].
    """

    indices: Integers
    offsets: Integers

    @property
    def clients(self) -> int:
        """Number of clients."""
        return len(self.offsets) - 1

    def client(self, pid: int) -> Integers:
        """Sorted positions of one client (a view)."""
        return self.indices[self.offsets[pid] : self.offsets[pid + 1]]

    def sizes(self) -> Integers:
        """Number of samples of each client, int64 [clients]."""
        return np.diff(self.offsets)


def partition(
    name: str,
    options: Mapping[str, Any],
    *,
    labels: Integers,
    groups: Integers | None,
    clients: int,
    shots: int | None,
    pooled: bool,
    seed: int,
) -> Partition:
    """Run the function behind `[partition] name`, then `shots`, then `pooled`; cached on disk.

    Args:
        name: `[partition] name`.
        options: its own keys.
        labels: int64 [n].
        groups: int64 [n] or None.
        clients: number of clients.
        shots: samples per class and client, drawn without replacement from the client's own (all of a
            class when it has fewer); None keeps everything.
        pooled: give the samples of all clients to a single one.
        seed: same inputs and seed, same partition.

    Raises:
        UserError: more clients than samples, a client without samples, more shots than any client has,
            or whatever the named function refuses.
    """
    if clients > len(labels):
        raise UserError(
            f"[partition] clients = {clients}, but there are {len(labels)} training samples; "
            f"give at most {len(labels)} clients"
        )
    function = registry.resolve("partitions", name)
    keys = {**function.fixed, **options}
    code = code_stamp(function.target)
    owners = b"" if groups is None else groups.tobytes()
    switches = [clients, shots, pooled, seed]
    key = cache_key(
        _VERSION, version("flwr-datasets"), version("numpy"), code, keys, switches, labels.tobytes(), owners
    )
    file = cache_folder("partitions") / f"{key}.npz"
    try:
        with np.load(file, allow_pickle=False) as found:
            return Partition(found["indices"], found["offsets"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # not there, or damaged: make it
        pass
    members = function.target(Table(labels, groups, clients, seed), **keys)
    _check(members, name, clients)
    if shots is not None:
        members = _few_shots(members, labels, shots, seed)
    if pooled:
        members = [np.concatenate(members)]
    offsets = np.cumsum([0, *map(len, members)], dtype=np.int64)
    made = Partition(np.concatenate([np.sort(own) for own in members]).astype(np.int64), offsets)
    buffer = BytesIO()
    np.savez(buffer, indices=made.indices, offsets=made.offsets)
    write_atomic(file, buffer.getvalue())
    return made


def _check(members: list[Integers], name: str, clients: int) -> None:
    """Refuse what a partition function (it may be a user's) must not return."""
    everything = np.concatenate(members) if members else np.empty(0, np.int64)
    if len(members) != clients or len(np.unique(everything)) != len(everything):
        raise UserError(
            f"[partition] '{name}' must return one array per client without common positions; "
            f"it returned {len(members)} arrays for {clients} clients"
        )
    empty = [str(pid) for pid, own in enumerate(members) if len(own) == 0]
    if empty:
        named = ", ".join(empty[:8]) + (", ..." if len(empty) > 8 else "")
        raise UserError(
            f"[partition] '{name}' leaves {len(empty)} of {clients} clients without data (client {named}); "
            "use fewer clients, a larger alpha or min_samples ≥ 1"
        )


def _few_shots(members: list[Integers], labels: Integers, shots: int, seed: int) -> list[Integers]:
    most = max((int(np.bincount(labels[own]).max()) for own in members if len(own)), default=0)
    if shots > most:
        raise UserError(
            f"[partition] shots = {shots}, but no client has more than {most} samples of a class; "
            f"give at most {most}, or fewer clients"
        )
    return [_few(own, labels, shots, seed, pid) for pid, own in enumerate(members)]


def _few(own: Integers, labels: Integers, shots: int, seed: int, pid: int) -> Integers:
    """At most `shots` samples of each class; depends on the client's own samples only."""
    rng = np.random.default_rng((seed, pid))
    own = rng.permutation(np.sort(own))
    kept = [own[labels[own] == label][:shots] for label in np.unique(labels[own])]
    return np.concatenate([np.empty(0, np.int64), *kept])


# ------------------------------------------------------------------------- names of [partition]


def iid(table: Table, /) -> list[Integers]:
    """Equal shares of the shuffled samples; every sample is used."""
    # the cut of flwr-datasets' IidPartitioner, without its 3 s import and 0.7 ms per client
    return np.array_split(np.random.default_rng(table.seed).permutation(len(table.labels)), table.clients)


def dirichlet(
    table: Table, /, *, alpha: Positive, min_samples: Count = 1, balanced: bool = False
) -> list[Integers]:
    """Each class is divided among the clients in proportions drawn from Dirichlet(alpha).

    Every sample is used. Draws are repeated, at most ten times, until every client has `min_samples`.

    Args:
        alpha: small: each class sits with few clients (0.1 is extreme); large: nearly iid.
        min_samples: samples that every client has at least.
        balanced: a client above the average size gets nothing of the classes that follow.
    """
    if not alpha > 0:
        raise UserError(f"[partition] alpha must be greater than 0 (got {alpha})")
    partitioner = _flower().DirichletPartitioner(
        num_partitions=table.clients,
        partition_by="label",
        alpha=float(alpha),
        min_partition_size=min_samples,
        self_balancing=balanced,
        shuffle=False,
        seed=table.seed,
    )
    fix = (
        f"no draw in ten gave each of {table.clients} clients min_samples = {min_samples} samples; "
        f"raise alpha (now {alpha}), lower min_samples, or use fewer clients"
    )
    return _run(table, partitioner, fix)


def pathological(table: Table, /, *, classes_per_client: Count = 2, overlap: bool = True) -> list[Integers]:
    """Every client has few classes.

    With overlap, a class may belong to several clients, who divide its samples equally. All classes are
    used if clients x classes_per_client allows it, so no sample is lost; else the samples of the
    classes that no client has are left out. Without overlap, the shuffled classes are dealt once:
    round(classes / clients) each (fewer where nothing would be left for the last client, who takes the
    rest), and every sample is used; `classes_per_client` then has no effect.

    Args:
        classes_per_client: number of classes of each client.
        overlap: whether two clients may have samples of the same class.
    """
    classes = np.unique(table.labels)
    if not overlap:
        return _disjoint_classes(table, classes)
    if classes_per_client > len(classes):
        raise UserError(
            f"[partition] classes_per_client = {classes_per_client}, but the training data have "
            f"{len(classes)} classes; give at most {len(classes)}"
        )
    if table.clients < len(classes):
        return _dealt_classes(table, classes, classes_per_client)
    # "random", the default of this partitioner, would drop the classes that nobody draws
    partitioner = _flower().PathologicalPartitioner(
        num_partitions=table.clients,
        partition_by="label",
        num_classes_per_partition=classes_per_client,
        class_assignment_mode="first-deterministic",
        shuffle=False,
        seed=table.seed,
    )
    fix = "a class has fewer samples than clients that share it; use fewer clients or classes_per_client"
    return _run(table, partitioner, fix)


def _dealt_classes(table: Table, classes: Integers, per_client: int) -> list[Integers]:
    """Fewer clients than classes: deal shuffled classes in turn, so that as many as possible are used."""
    order = np.random.default_rng(table.seed).permutation(classes)
    slots = np.resize(order, table.clients * per_client).reshape(table.clients, per_client)
    members: list[list[Integers]] = [[] for _ in range(table.clients)]
    for label, rows in zip(classes, _shuffled_by_label(table, classes), strict=True):
        owners = np.flatnonzero((slots == label).any(1))
        for owner, part in zip(owners, np.array_split(rows, max(len(owners), 1)), strict=False):
            members[owner].append(part)
    return [np.concatenate(parts) for parts in members]


def _disjoint_classes(table: Table, classes: Integers) -> list[Integers]:
    if table.clients > len(classes):
        raise UserError(
            f"[partition] overlap = false needs a class per client: {table.clients} clients, but "
            f"{len(classes)} classes in the training data; use fewer clients or overlap = true"
        )
    order = np.random.default_rng(table.seed).permutation(classes)
    most = (len(classes) - 1) // max(table.clients - 1, 1)  # leaves the last client a class
    each = min(round(len(classes) / table.clients), max(most, 1))
    starts = [pid * each for pid in range(table.clients)] + [len(classes)]
    return [
        np.flatnonzero(np.isin(table.labels, order[starts[pid] : starts[pid + 1]]))
        for pid in range(table.clients)
    ]


def _shuffled_by_label(table: Table, classes: Integers) -> list[Integers]:
    rng = np.random.default_rng(table.seed)
    return [rng.permutation(np.flatnonzero(table.labels == label)) for label in classes]


def shard(table: Table, /, *, shards_per_client: Count = 2) -> list[Integers]:
    """Samples sorted by class are cut into equal shards, and each client gets some at random.

    The split of FedAvg's paper (arXiv 1602.05629, section 3). A shard has
    floor(samples / (clients x shards_per_client)) samples; what does not fill a shard is left out
    (fewer than one sample per shard).

    Args:
        shards_per_client: number of shards of each client.
    """
    shards = table.clients * shards_per_client
    if shards > len(table.labels):
        raise UserError(
            f"[partition] {table.clients} clients with shards_per_client = {shards_per_client} need {shards} "
            f"samples, there are {len(table.labels)}; use fewer clients or shards"
        )
    partitioner = _flower().ShardPartitioner(
        num_partitions=table.clients,
        partition_by="label",
        num_shards_per_partition=shards_per_client,
        shuffle=False,
        seed=table.seed,
    )
    return _run(table, partitioner, "use fewer clients or shards_per_client")


def size_skew(
    table: Table, /, *, kind: Literal["linear", "square", "exponential"] = "linear"
) -> list[Integers]:
    """Clients differ in size only: client i (from 1) has a share proportional to i, i^2 or e^i.

    Every sample is used; what rounding leaves over goes to the last client, the largest.

    Args:
        kind: how sizes grow from client to client.
    """
    flower = _flower()
    partitioners = {
        "linear": flower.LinearPartitioner,
        "square": flower.SquarePartitioner,
        "exponential": flower.ExponentialPartitioner,
    }
    fix = (
        f'with kind = "{kind}" the smallest of {table.clients} clients would have no sample; '
        'use fewer clients or kind = "linear"'
    )
    return _run(table, partitioners[kind](num_partitions=table.clients), fix)


def natural(table: Table, /) -> list[Integers]:
    """Samples stay with their natural owner (the dataset's groups); every sample is used.

    With as many clients as groups, client i is the i-th smallest group. With fewer clients, whole groups
    are merged: from the largest on, each joins the client that has fewest samples so far.
    """
    if table.groups is None:
        raise UserError(
            "[partition] 'natural' needs natural owners and these data have none; give the .npz file a "
            "'groups' array, or choose another [partition] name"
        )
    _, group, sizes = np.unique(table.groups, return_inverse=True, return_counts=True)
    if table.clients > len(sizes):
        raise UserError(
            f"[partition] clients = {table.clients}, but the data have {len(sizes)} natural owners; "
            f"give at most {len(sizes)}"
        )
    owner = np.arange(len(sizes))
    if table.clients < len(sizes):
        loads = np.zeros(table.clients, np.int64)
        for number in np.argsort(-sizes, kind="stable"):
            owner[number] = np.argmin(loads)
            loads[owner[number]] += sizes[number]
    return [np.flatnonzero(owner[group] == pid) for pid in range(table.clients)]


# --------------------------------------------------------------------------------- flwr-datasets


def _flower() -> Any:
    """The module of partitioners, with telemetry, network and chatter off."""
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import datasets
        from flwr_datasets import partitioner
    datasets.disable_progress_bars()
    logging.getLogger("datasets").setLevel(logging.ERROR)
    return partitioner


def _run(table: Table, partitioner: Partitioner, fix: str) -> list[Integers]:
    """Positions per client, by a partitioner of flwr-datasets on the shuffled table of labels."""
    from datasets import Dataset

    order = np.random.default_rng(table.seed).permutation(len(table.labels))
    rows = Dataset.from_dict({"index": order, "label": table.labels[order]}).with_format("numpy")
    # these partitioners warn at each retry, then raise; NaN proportions must not become positions
    with warnings.catch_warnings(), np.errstate(invalid="raise", divide="raise", over="raise"):
        warnings.simplefilter("ignore")
        try:
            partitioner.dataset = rows
            parts = (partitioner.load_partition(pid)["index"] for pid in range(table.clients))
            return [np.asarray(part[:], np.int64) for part in parts]
        except (ValueError, FloatingPointError, ZeroDivisionError) as error:
            raise UserError(f"[partition] {fix}") from error
