"""Folding: replies are checked and summed where they are made, so that nobody holds all of them.

Only for a strategy that declares `reduction = "weighted-mean"`, and only for its train messages. What is
left of a good reply is *hollow*: its metrics, and the names, shapes and dtypes of its arrays, which is
all that hooks and byte counts look at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from flwr.app import ArrayRecord, Message

from fedsim import _flwr, messages
from fedsim.sums import TreeSum, Weighting


@dataclass(frozen=True)
class Fold:
    """How to sum the replies of one exchange.

    Args:
        weighting: what a reply weighs.
        like: names, shapes and dtypes that a reply must have.
    """

    weighting: Weighting
    like: Mapping[str, tuple[tuple[int, ...], str]]


def fold_of(accepted: Sequence[Message], weighting: Weighting | None) -> Fold | None:
    """The fold of an exchange, or None where replies must come whole.

    That is: nobody asked for a fold, a message is not a plain `train`, two messages go to one client, or
    not all messages carry one and the same array record.
    """
    if weighting is None or not accepted:
        return None
    first = accepted[0].content.get(messages.ARRAYS)
    if not isinstance(first, ArrayRecord):
        return None
    if any(
        m.metadata.message_type != messages.TRAIN or m.content.get(messages.ARRAYS) is not first
        for m in accepted
    ):
        return None
    if len({m.metadata.dst_node_id for m in accepted}) < len(accepted):
        return None
    return Fold(weighting, messages.shapes_of(first))


class Left(NamedTuple):
    """What is left of one reply of a folded exchange."""

    position: int
    metrics: dict[str, Any] | None  #: of a good reply
    reply: Message | None  #: hollow; None for a good reply that is nothing but metrics and arrays
    reason: str | None  #: why the reply is not in the sum


@dataclass
class Folder:
    """Checks and sums replies in one process.

    Args:
        fold: how.
        tree: where the sum grows.
        start: position that is the tree's first leaf.
    """

    fold: Fold
    tree: TreeSum = field(default_factory=TreeSum)
    start: int = 0

    def add(self, position: int, reply: Message) -> Left:
        """Take in one reply; what cannot be used is a hole in the tree."""
        reason = messages.complaint(reply, self.fold.like, messages.weight_key(self.fold.weighting))
        metrics = None
        if reason is None:
            metrics = dict(reply.content[messages.METRICS].items())
            record = reply.content[messages.ARRAYS]
            assert isinstance(record, ArrayRecord)
            weight = messages.weight_of(metrics, self.fold.weighting)
            self.tree.add_leaf(messages.views_of(record), weight, position - self.start)
        else:
            self.tree.add(None, position - self.start)
        if metrics is not None and len(reply.content) == 2:
            return Left(position, metrics, None, None)
        return Left(position, metrics, _flwr.hollow_message(reply), reason)
