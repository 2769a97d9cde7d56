"""What all our engines share: a Flower Grid whose clients live where the engine puts them.

Node ids are a function of the partition id (`node = FIRST_NODE + partition`), so the same seed gives the
same cohorts on every engine, and all nodes exist before the server app starts. An engine implements
`_start`, `_finish` and `_advance`. Everything else, down to seeds and error replies, is here.
Any method may be called from any thread.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from threading import Lock
from typing import Any

from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp

from fedsim import _flwr
from fedsim.engine.answering import is_empty
from fedsim.engine.exchange import FIRST_NODE, Exchange, FixedRoster
from fedsim.engine.folding import Fold, fold_of
from fedsim.engine.tally import Tally
from fedsim.engine.waiting import Patience
from fedsim.messages import Replies
from fedsim.seeding import derive_seed
from fedsim.sums import Weighting

#: seconds after which an unanswered round ends, as in Flower
DEFAULT_TIMEOUT = 3600.0


class BaseGrid(_flwr.BareGrid):
    """A Grid over `num_clients` simulated clients of one ClientApp.

    Args:
        client_app: the app that answers messages.
        num_clients: number of nodes.
        seed: seed of the run; every message gets its own stream from (seed, round, client).
        run_config: what clients find in `context.run_config`.
    """

    def __init__(
        self, client_app: ClientApp, num_clients: int, seed: int = 0, run_config: dict[str, Any] | None = None
    ) -> None:
        self.client_app = client_app
        self.roster = FixedRoster(num_clients)
        self.seed = seed
        self.run_config = dict(run_config or {})
        #: state of clients that keep any, by partition id
        self.states: dict[int, RecordDict] = {}
        #: called with every reply as it arrives
        self.on_reply: Callable[[Message], None] | None = None
        #: train replies may be summed up with these weights instead of being kept (None: not)
        self.folding: Weighting | None = None
        #: how much work each client has, by partition id (its samples, say); None: all the same
        self.work: Sequence[float] | None = None
        #: what came back, for the closing line
        self.tally = Tally()
        self._run = _flwr.Run.create_empty(run_id=1)
        self._ids = count(1)
        self._turns: Counter[int] = Counter()  #: messages that each client has had
        self._accepting = Lock()
        self._pushed: dict[str, tuple[Exchange, int]] = {}  #: whose replies were not pulled yet
        self._patience = Patience(num_clients)

    # ------------------------------------------------------------------------ Flower's Grid

    def set_run(self, run: _flwr.Run) -> None:
        """Set the run this grid belongs to."""
        self._run = run

    @property
    def run(self) -> _flwr.Run:
        """The run this grid belongs to."""
        return self._run

    def get_node_ids(self) -> Iterable[int]:
        """Ids of the nodes that take part, ascending.

        Raises:
            UserError: the server asks for nothing else for so long that it must be waiting for more nodes.
        """
        self._patience.asked()
        if self.roster.absent:
            return [self.roster.node(client) for client in self.roster.clients()]
        return range(FIRST_NODE, FIRST_NODE + self.roster.size)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Accept messages; the replies wait until they are pulled.

        Each message is delivered as it is now. When clients get to it is the engine's affair, but not later
        than what is sent next, and than the end of the simulation.
        """
        exchange = self._accept(messages, pushed=True)
        ids = [message.metadata.message_id for message in exchange.accepted]
        for position, message_id in enumerate(ids):
            self._pushed[message_id] = exchange, position
        self._start(exchange)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Replies:
        """The replies that are there, each once, in the order of their ids; does not wait for others.

        Where none is there the engine may get on with what was pushed. For an id that is unknown, or whose
        reply was pulled before, there is an error reply, as from Flower.
        """
        self._patience.over()
        ids = list(dict.fromkeys(message_ids))
        unknown = [self._unknown(message_id) for message_id in ids if message_id not in self._pushed]
        replies = self._pulled(ids)
        if not replies and len(unknown) < len(ids):
            asked = [self._pushed.get(message_id) for message_id in ids]  # another thread may pull them, too
            self._advance(list(dict.fromkeys(found[0] for found in asked if found is not None)))
            replies = self._pulled(ids)
        return Replies([*replies, *unknown])

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Replies:
        """Run messages and return their replies, in the order of the messages.

        Args:
            messages: instructions.
            timeout: seconds that each client has, from when it begins; who takes longer is left out. With 0
                the messages are delivered and nobody waits.
        """
        if timeout is not None and timeout <= 0:
            self.push_messages(messages)
            return Replies()
        exchange = self._accept(messages, timeout=timeout)
        self._start(exchange)
        self._finish(exchange)
        return exchange.result()

    def deliver(self) -> None:
        """Let clients answer whatever was pushed."""
        pushed = list(self._pushed.values())  # at once: other threads may be pulling
        for exchange in dict.fromkeys(exchange for exchange, _ in pushed):
            self._finish(exchange)

    # ------------------------------------------------------------------------ for engines

    @abstractmethod
    def _start(self, exchange: Exchange) -> None:
        """Begin with instructions, after those that came before; does not wait."""

    @abstractmethod
    def _finish(self, exchange: Exchange) -> None:
        """Wait until an exchange that was started is done; give it up if that fails."""

    @abstractmethod
    def _advance(self, exchanges: Sequence[Exchange]) -> None:
        """Get a little further with exchanges that were started."""

    def close(self) -> None:
        """Give back whatever runs the clients; the grid is not used afterwards."""

    def _accept(
        self, outgoing: Iterable[Message], *, pushed: bool = False, timeout: float | None = None
    ) -> Exchange:
        """An exchange of messages to nodes that are there."""
        self._patience.over()
        accepted, clients, turns = [], [], []
        contents: dict[int, RecordDict] = {}
        outgoing = list(outgoing)
        with self._accepting:
            for message in outgoing:
                node = message.metadata.dst_node_id
                client = node - FIRST_NODE
                if not 0 <= client < self.roster.size:
                    self.tally.no_node(node, range(FIRST_NODE, FIRST_NODE + self.roster.size))
                    continue
                _flwr.set_message_id(message, str(next(self._ids)))
                content = message.content
                if pushed:  # the server may change it before a client gets it
                    if id(content) not in contents:
                        contents[id(content)] = _flwr.private_copy(content)
                    content = contents[id(content)]
                # with metadata of its own: the server may send the same message again
                accepted.append(_flwr.posted(message, content))
                clients.append(client)
                self._turns[client] += 1
                turns.append(self._turns[client])
        fold: Fold | None = None if pushed else fold_of(accepted, self.folding)
        limit = None if timeout is None or math.isinf(timeout) else timeout
        return Exchange(
            accepted,
            clients,
            turns,
            fold,
            self.tally,
            timeout=limit,
            singly=pushed,
            on_reply=None if pushed else self.on_reply,
        )

    def _pulled(self, ids: Iterable[str]) -> list[Message]:
        """The replies that are there."""
        found = []
        for message_id in ids:
            exchange, position = self._pushed.get(message_id, (None, 0))
            if exchange is None:
                continue
            exchange.collect()
            reply = exchange.pull(position)
            if reply is not None:
                self._pushed.pop(message_id, None)
                found.append(reply)
                if self.on_reply is not None:
                    self.on_reply(reply)
        return found

    def _unknown(self, message_id: str) -> Message:
        """What Flower answers about an id that it does not know, or no longer."""
        reason = f"no message '{message_id}' is known, or its reply was pulled before"
        return _flwr.unavailable(message_id, self._run.run_id, reason)

    def keep(self, client: int, state: RecordDict) -> None:
        """Remember the state that a client left behind."""
        if is_empty(state):
            self.states.pop(client, None)
        else:
            self.states[client] = state

    def seed_of(self, exchange: Exchange, position: int) -> int:
        """Seed of an instruction from (run seed, round, kind, client), the same on every engine."""
        kind = exchange.accepted[position].metadata.message_type
        return derive_seed(self.seed, exchange.round_of(position), kind, exchange.clients[position])
