"""Data that a run must do without: the section [forget] of an experiment.

    training data of all clients ─┬─ partition                 what clients train on
                                  └─ forgotten.training        what they had and are to forget
    validation ─┬─ validation            classes that stay
                └─ forgotten.validation  forgotten classes

A forgotten client takes its whole share with it; the validation split, which is the server's, stays whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from fedsim.data.federated import FederatedData
from fedsim.data.partition import Partition
from fedsim.errors import UserError

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Forgotten:
    """What a run must do without.

    Attributes:
        classes: positions of forgotten classes.
        clients: forgotten clients.
        training: forgotten training samples, by client.
        validation: forgotten samples of the validation split, int64.
    """

    classes: tuple[int, ...]
    clients: tuple[int, ...]
    training: Partition
    validation: Integers

    def of_classes(self, labels: Integers) -> npt.NDArray[np.bool_]:
        """Which samples belong to forgotten classes, bool [n]."""
        return np.isin(labels, self.classes)


def without(
    data: FederatedData, classes: Sequence[int], clients: Sequence[int], *, relearn: bool = False
) -> FederatedData:
    """The data without some classes and clients; what is left out is in `forgotten`.

    Args:
        data: whole.
        classes: positions of classes.
        clients: partition ids.
        relearn: leave the training data whole; only say what is forgotten.
    """
    labels = np.asarray(data.arrays.train_y)
    whole = data.partition
    owner = np.repeat(np.arange(data.clients), whole.sizes())
    lost = np.isin(labels[whole.indices], classes) | np.isin(owner, clients)
    held = np.isin(labels[data.validation], classes)
    forgotten = Forgotten(
        classes=tuple(classes),
        clients=tuple(clients),
        training=_part(whole, lost),
        validation=data.validation[held],
    )
    return replace(
        data,
        partition=whole if relearn else _part(whole, ~lost),
        validation=data.validation[~held],
        forgotten=forgotten,
    )


def check(data: FederatedData, classes: Sequence[int], clients: Sequence[int]) -> None:
    """Raise UserError for what a federation cannot forget (a single node need not have any of it).

    Raises:
        UserError: an unknown client, a class without data, or nothing would be left.
    """
    names, count = data.arrays.classes, data.clients
    wrong = [client for client in clients if not 0 <= client < count]
    if wrong:
        raise UserError(f"[forget] clients: there is no {wrong[0]}; the {count} clients are 0 to {count - 1}")
    held = data.class_counts()
    absent = [c for c in classes if not held[:, c].any()]
    if absent:
        raise UserError(f"[forget] classes: no client has samples of class '{names[absent[0]]}'")
    held[list(clients)] = 0
    held[:, list(classes)] = 0
    if not held.any():
        raise UserError("[forget] leaves no training data at all; forget fewer classes or clients")


def _part(whole: Partition, chosen: npt.NDArray[np.bool_]) -> Partition:
    """Some positions of a partition, each still with its client."""
    before = np.concatenate([[0], np.cumsum(chosen)])
    return Partition(whole.indices[chosen], before[whole.offsets].astype(np.int64))
