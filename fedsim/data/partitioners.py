"""The names of `[partition]`: each function deals out a `Table`, positions per client come back.

What is more than a cut is done by flwr-datasets' partitioners on a table of positions and labels alone.
Its rows are shuffled first by the run's seed, because some partitioners cut the table in order.
"""

from __future__ import annotations

import logging
import os
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fedsim.data.partition import Integers, Table
from fedsim.errors import UserError, nearest
from fedsim.ranges import Count, Positive

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner


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


def attribute_skew(
    table: Table, /, *, attribute: str, alpha: Positive, min_samples: Count = 1
) -> list[Integers]:
    """Each value of an attribute is divided among the clients in proportions drawn from Dirichlet(alpha).

    `dirichlet` with an attribute in the place of the label: clients differ in who their samples are of, not
    in what they show. Samples whose value is not known are dealt as a value of their own.

    Args:
        attribute: name of a categorical attribute of the data.
        alpha: small: each value sits with few clients; large: nearly iid.
        min_samples: samples that every client has at least.
    """
    if attribute not in table.attributes:
        raise UserError(f'[partition] attribute = "{attribute}": {nearest(attribute, table.attributes)}')
    codes = table.attributes[attribute]
    return dirichlet(replace(table, labels=codes - codes.min()), alpha=alpha, min_samples=min_samples)


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
        try:
            import datasets
            from flwr_datasets import partitioner
        except ModuleNotFoundError as error:
            raise UserError(
                f"[partition] flwr-datasets makes this partition, and Python module '{error.name}' is not "
                'installed: pip install "flwr-datasets>=0.6,<0.7", or choose [partition] name = "iid"'
            ) from error
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
