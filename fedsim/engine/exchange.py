"""One send of a grid: who is who, the instructions, and what has come back so far."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

from flwr.app import Message, MetricRecord, RecordDict

from fedsim import _flwr, messages
from fedsim.engine.folding import Fold, Left
from fedsim.engine.tally import Tally
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

    An engine that works in threads of its own posts what comes; whoever waits for it takes it in his.

    Args:
        accepted: instructions in order of position.
        clients: partition id that each is for.
        turns: how many instructions each of these clients has had, this one included.
        fold: how to sum the replies; None keeps them.
        tally: what is counted about replies.
        timeout: seconds that each client has from when it begins; None: no limit.
        singly: each reply is wanted as soon as it is there.
        on_reply: called with every reply (of a folded one: with what is left of it).
    """

    def __init__(
        self,
        accepted: Sequence[Message],
        clients: Sequence[int],
        turns: Sequence[int],
        fold: Fold | None,
        tally: Tally,
        *,
        timeout: float | None = None,
        singly: bool = False,
        on_reply: Callable[[Message], None] | None = None,
    ) -> None:
        self.accepted = accepted
        self.clients = clients
        self.turns = turns
        self.fold = fold
        self.timeout = timeout
        self.singly = singly
        self.sum = TreeSum()
        self._tally = tally
        self._on_reply = on_reply
        self._open = len(accepted)
        self._posted: deque[Callable[[], None]] = deque()
        self._collecting = Lock()
        self._error: BaseException | None = None
        self._rounds: dict[int, Any] = {}
        self._replies: dict[int, Message] = {}
        self._metrics: dict[int, Mapping[str, Any]] = {}
        self._refused: dict[int, str] = {}
        self._shapes: RecordDict | None = None  #: hollow arrays, the same for all good replies

    def round_of(self, position: int) -> Any:
        """The round that an instruction says it belongs to, or else its client's turn."""
        content = self.accepted[position].content
        if id(content) not in self._rounds:
            said = (record.get(messages.ROUND) for record in content.config_records.values())
            self._rounds[id(content)] = next((number for number in said if number is not None), None)
        found = self._rounds[id(content)]
        return self.turns[position] if found is None else found

    # ------------------------------------------------------------------- from an engine's thread

    def post(self, *calls: Callable[[], None]) -> None:
        """Leave calls of the methods below to whoever waits."""
        self._posted.extend(calls)

    def fail(self, error: BaseException) -> None:
        """Nothing more comes."""
        self._error = error

    @property
    def news(self) -> bool:
        """Whether `collect` has something to do."""
        return bool(self._posted) or self._error is not None

    def collect(self) -> None:
        """Take what was posted.

        Raises:
            BaseException: what the engine failed with.
        """
        with self._collecting:
            while self._posted:
                self._posted.popleft()()
        if self._error is not None:
            raise self._error

    # ---------------------------------------------------------------------------- what has come

    @property
    def done(self) -> bool:
        """Whether every client has answered or is too late."""
        return self._open == 0

    def take(self, position: int, reply: Message) -> None:
        """A whole reply, where nothing is folded."""
        self._replies[position] = self._arrived(position, reply)

    def take_left(self, left: Left) -> None:
        """What is left of a reply, where they are folded."""
        if left.metrics is not None:
            self._metrics[left.position] = left.metrics
        reply = left.reply
        if reply is None and self._on_reply is not None:
            reply = self._usual(left)
        if reply is None:
            self._open -= 1
            self._tally.answered(self.accepted[left.position])
            return
        self._arrived(left.position, reply)
        if left.reply is not None and left.reason is not None:
            self._refused[self.clients[left.position]] = left.reason
            self._replies[left.position] = left.reply

    def take_failed(self, position: int, reply: Message) -> None:
        """An error reply in a client's stead."""
        if self.fold is None:
            self.take(position, reply)
            return
        self.sum.add(None, position)
        self.take_left(Left(position, None, reply, messages.complaint(reply, None)))

    def take_late(self, position: int) -> None:
        """A client took too long: there is no reply."""
        self._open -= 1
        self._tally.late(self.accepted[position], self.clients[position])

    def result(self) -> Replies:
        """Everything that came, in order of the instructions."""
        replies = Replies(self._replies[position] for position in sorted(self._replies))
        if self.fold is not None:
            metrics = {self.clients[position]: self._metrics[position] for position in sorted(self._metrics)}
            replies.folded = Folded(self.sum.total(), metrics, self._refused)
        return replies

    def pull(self, position: int) -> Message | None:
        """Hand out one reply, if it is there."""
        return self._replies.pop(position, None)

    def _arrived(self, position: int, reply: Message) -> Message:
        sent = self.accepted[position]
        self._open -= 1
        _flwr.set_message_id(reply, f"{sent.metadata.message_id}-reply")
        if reply.has_error():
            self._tally.failed(sent, reply.error.reason or "")
        else:
            self._tally.answered(sent)
        if self._on_reply is not None:
            self._on_reply(reply)
        return reply

    def _usual(self, left: Left) -> Message:
        """The hollow form of a reply that is nothing but metrics and the arrays that were asked for."""
        sent = self.accepted[left.position]
        if self._shapes is None:
            self._shapes = _flwr.hollow(RecordDict({messages.ARRAYS: sent.content[messages.ARRAYS]}))
        content = RecordDict(dict(self._shapes))
        content[messages.METRICS] = MetricRecord(left.metrics)
        return Message(content, reply_to=sent)
