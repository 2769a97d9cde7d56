"""Who has which samples, computed once per machine and cached as positions.

    labels, groups ─ named function ─> positions per client ─ shots ─> few per class ─ pooled ─> one client

The functions behind the names of `[partition]` are in `partitioners`. Processes that find the partition in
the cache never import flwr_datasets (3 seconds).
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt

from fedsim import registry
from fedsim.data.store import cache_folder, cache_key, cache_writing, code_stamp
from fedsim.errors import UserError
from fedsim.files import write_atomic

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
        attributes: codes of the categorical attributes by name, int64 [n] (-1: not known).
    """

    labels: Integers
    groups: Integers | None
    clients: int
    seed: int
    attributes: Mapping[str, Integers] = field(default_factory=dict)


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
    attributes: Mapping[str, Integers] | None = None,
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
        attributes: codes of categorical attributes by name, int64 [n].

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
    code = [code_stamp(function.target), code_stamp(partition)]
    owners = b"" if groups is None else groups.tobytes()
    switches = [clients, shots, pooled, seed]
    known = dict(attributes or {})
    codes = [part for name in sorted(known) for part in (name, known[name].tobytes())]
    versions = [_VERSION, _partitioners_version(), version("numpy")]
    key = cache_key(*versions, code, keys, switches, labels.tobytes(), owners, *codes)
    file = cache_folder("partitions") / f"{key}.npz"
    try:
        with np.load(file, allow_pickle=False) as found:
            return Partition(found["indices"], found["offsets"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # not there, or damaged: make it
        pass
    members = function.target(Table(labels, groups, clients, seed, known), **keys)
    _check(members, name, clients)
    if shots is not None:
        members = _few_shots(members, labels, shots, seed)
    if pooled:
        members = [np.concatenate(members)]
    offsets = np.cumsum([0, *map(len, members)], dtype=np.int64)
    made = Partition(np.concatenate([np.sort(own) for own in members]).astype(np.int64), offsets)
    buffer = BytesIO()
    np.savez(buffer, indices=made.indices, offsets=made.offsets)
    with cache_writing(file):
        write_atomic(file, buffer.getvalue())
    return made


def _partitioners_version() -> str:
    """Version of flwr-datasets; empty without it, which `iid` and other plain cuts do not need."""
    try:
        return version("flwr-datasets")
    except PackageNotFoundError:
        return ""


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
