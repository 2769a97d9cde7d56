"""One send of a grid: who is who, the instructions, and what has come back so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import Message, MetricRecord, RecordDict

from fedsim import _flwr, messages
from fedsim.engine.folding import Fold, Left
from fedsim.messages import Folded, Replies
from fedsim.sums import TreeSum

FIRST_NODE = 1000


@dataclass(frozen=True)
class FixedRoster:
    """Clients 0 … size-1 at consecutive node ids; those in `absent` take no part in training."""

    size: int
    absent: frozenset[int] = frozenset()

    def clients(self) -> Sequence[int]:
        """Partition ids of those that take part."""
        return [c for c in range(self.size) if c not in self.absent] if self.absent else range(self.size)

    def everyone(self) -> Sequence[int]:
        """All partition ids."""
        return range(self.size)

    def node(self, client: int) -> int:
        """Node id of a client."""
        return FIRST_NODE + client

    def client(self, node: int) -> int:
        """Partition id of a node."""
        client = node - FIRST_NODE
        if not 0 <= client < self.size:
            raise ValueError(
                f"there is no node {node}; nodes are {FIRST_NODE} to {FIRST_NODE + self.size - 1}"
            )
        return client


class Exchange:
    """The instructions of one send and what has come back so far.

    Args:
        accepted: instructions in order of position.
        fold: how to sum the replies; None keeps them.
        roster: who is who.
        on_reply: called with every reply (of a folded one: with what is left of it).
    """

    def __init__(
        self,
        accepted: Sequence[Message],
        fold: Fold | None,
        roster: FixedRoster,
        on_reply: Callable[[Message], None] | None,
    ) -> None:
        self.accepted = accepted
        self.fold = fold
        self.sum = TreeSum()
        self._on_reply = on_reply
        self._roster = roster
        self._replies: dict[int, Message] = {}
        self._metrics: dict[int, Mapping[str, Any]] = {}
        self._refused: dict[int, str] = {}
        self._shapes: RecordDict | None = None  #: hollow arrays, the same for all good replies

    def client(self, position: int) -> int:
        """Partition id that the instruction at a position is for."""
        return self._roster.client(self.accepted[position].metadata.dst_node_id)

    def take(self, position: int, reply: Message) -> None:
        """A whole reply, where nothing is folded."""
        self._replies[position] = reply
        if self._on_reply is not None:
            self._on_reply(reply)

    def take_left(self, left: Left) -> None:
        """What is left of a reply, where they are folded."""
        if left.metrics is not None:
            self._metrics[left.position] = left.metrics
        if left.reply is not None and left.reason is not None:
            self._refused[self.client(left.position)] = left.reason
            self._replies[left.position] = left.reply
        if self._on_reply is not None:
            self._on_reply(self._usual(left) if left.reply is None else left.reply)

    def take_failed(self, position: int, reply: Message) -> None:
        """An error reply in a client's stead, where replies are folded."""
        reason = messages.complaint(reply, None)
        self.take_left(Left(position, None, reply, reason))

    def result(self) -> Replies:
        """Everything that came, in order of the instructions."""
        replies = Replies(self._replies[position] for position in sorted(self._replies))
        if self.fold is not None:
            metrics = {self.client(position): self._metrics[position] for position in sorted(self._metrics)}
            replies.folded = Folded(self.sum.total(), metrics, self._refused)
        return replies

    def _usual(self, left: Left) -> Message:
        """The hollow form of a reply that is nothing but metrics and the arrays that were asked for."""
        sent = self.accepted[left.position]
        if self._shapes is None:
            self._shapes = _flwr.hollow(RecordDict({messages.ARRAYS: sent.content[messages.ARRAYS]}))
        content = RecordDict(dict(self._shapes))
        content[messages.METRICS] = MetricRecord(left.metrics)
        return Message(content, reply_to=sent)
