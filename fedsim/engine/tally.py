"""What a simulation counts about replies, and what it says of them in the end."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from threading import Lock

from flwr.app import Message

from fedsim import messages
from fedsim.errors import NotEnoughReplies

log = logging.getLogger("fedsim")


@dataclass
class _Count:
    """Messages of one kind."""

    asked: int = 0
    unanswered: int = 0  #: by an error reply, or too late


@dataclass
class Tally:
    """Messages that were answered, by type.

    Attributes:
        first: what is known about the first failure.
        unknown: nodes that a message was for and that are not there, with the number of messages.
    """

    kinds: dict[str, _Count] = field(default_factory=dict)
    first: str | None = None
    unknown: dict[int, int] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    def answered(self, sent: Message) -> None:
        """A client answered."""
        with self._lock:
            self._kind(sent).asked += 1

    def failed(self, sent: Message, reason: str) -> None:
        """A client, or the engine in its stead, answered with an error."""
        self._unanswered(sent, reason)

    def late(self, sent: Message, client: int) -> None:
        """A client took longer than the server allowed."""
        self._unanswered(sent, f"client {client}: no reply within the server's timeout")

    def no_node(self, node: int, there: range) -> None:
        """A message is for a node that is not there, which is left out as Flower does."""
        if not self.unknown:
            log.warning(
                "there is no node %d (nodes are %d to %d); messages to unknown nodes are left out",
                node,
                there.start,
                there.stop - 1,
            )
        self.unknown[node] = self.unknown.get(node, 0) + 1

    def close(self) -> None:
        """Say in one line what went wrong in a simulation that has ended.

        Raises:
            NotEnoughReplies: no message at all, or none of those to train, was answered.
        """
        for action, what in (("", "messages"), (messages.TRAIN, "messages to train")):
            count = self._total(action)
            if count.asked and count.unanswered == count.asked:
                said = f"no client did its work: all {count.asked} {what} failed; the first says: "
                reason = self.first or ""
                raise NotEnoughReplies(said + _first_line(reason)) from RuntimeError(reason)
        if self.losses():
            log.warning("the run has ended, but %s", self.losses())

    def losses(self) -> str:
        """Messages that failed and messages that reached nobody, in words; nothing if there are none."""
        total = self._total()
        parts = []
        if total.unanswered:
            failed = f"{total.unanswered} of {total.asked} messages failed"
            parts.append(f"{failed}; the first says: {_first_line(self.first or '')}")
        if self.unknown:
            parts.append(f"{sum(self.unknown.values())} messages went to nodes that are not there")
        return "; ".join(parts)

    def _total(self, action: str = "") -> _Count:
        """Messages of all kinds, or of one action (`train`, `train.NAME`)."""
        counts = [count for kind, count in self.kinds.items() if action in ("", kind.partition(".")[0])]
        return _Count(sum(count.asked for count in counts), sum(count.unanswered for count in counts))

    def _unanswered(self, sent: Message, reason: str) -> None:
        with self._lock:
            count = self._kind(sent)
            count.asked += 1
            count.unanswered += 1
            if self.first is None:
                self.first = reason

    def _kind(self, sent: Message) -> _Count:
        kind = sent.metadata.message_type
        if kind not in self.kinds:
            self.kinds[kind] = _Count()
        return self.kinds[kind]


def _first_line(text: str) -> str:
    return text.splitlines()[0] if text else "nothing"
