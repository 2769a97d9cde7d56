"""What all our engines share: a Flower Grid whose clients live where the engine puts them.

Node ids are a function of the partition id (`node = FIRST_NODE + partition`), so the same seed gives the
same cohorts on every engine, and all nodes exist before the server app starts. An engine implements
`_execute`: run the messages of an exchange and hand their replies to it. Everything else, down to
seeding and error replies, is here.
"""

from __future__ import annotations

import hashlib
import random
import sys
import time
import traceback
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import count
from typing import Any

import numpy as np
from flwr.app import Error, Message, RecordDict
from flwr.clientapp import ClientApp

from fedsim import _flwr, messages
from fedsim.engine.exchange import FIRST_NODE, Exchange, FixedRoster
from fedsim.engine.folding import fold_of
from fedsim.messages import Replies
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
        self._run = _flwr.Run.create_empty(run_id=1)
        self._ids = count(1)
        self._sends = 0
        self._pending: dict[str, Message] = {}

    # ------------------------------------------------------------------------ Flower's Grid

    def set_run(self, run: _flwr.Run) -> None:
        """Set the run this grid belongs to."""
        self._run = run

    @property
    def run(self) -> _flwr.Run:
        """The run this grid belongs to."""
        return self._run

    def get_node_ids(self) -> Iterable[int]:
        """Ids of the nodes that take part, ascending."""
        if self.roster.absent:
            return [self.roster.node(client) for client in self.roster.clients()]
        return range(FIRST_NODE, FIRST_NODE + self.roster.size)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Accept messages; they are executed when their replies are asked for."""
        ids = []
        for message in self._accept(messages):
            self._pending[message.metadata.message_id] = message
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Replies:
        """Execute accepted messages and return their replies, each once."""
        wanted = [self._pending.pop(i) for i in message_ids if i in self._pending]
        return self._replies(wanted, None)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Replies:
        """Run messages and return their replies; after `timeout` seconds the missing ones are left out."""
        return self._replies(self._accept(messages), timeout)

    # ------------------------------------------------------------------------ for engines

    @abstractmethod
    def _execute(self, exchange: Exchange, deadline: float | None) -> None:
        """Run the instructions and hand over their replies, in any order; stop at the deadline.

        Args:
            exchange: the instructions; `exchange.sum` gets the sums of a folded one.
            deadline: on `time.monotonic`'s clock, or None.
        """

    def close(self) -> None:
        """Give back whatever runs the clients; the grid is not used afterwards."""

    def _accept(self, outgoing: Iterable[Message]) -> list[Message]:
        accepted = []
        for message in outgoing:
            self.roster.client(message.metadata.dst_node_id)  # raises for an unknown node
            _flwr.set_message_id(message, str(next(self._ids)))
            accepted.append(message)
        self._sends += 1
        return accepted

    def _replies(self, accepted: list[Message], timeout: float | None) -> Replies:
        deadline = None if timeout is None else time.monotonic() + timeout
        exchange = Exchange(accepted, fold_of(accepted, self.folding), self.roster, self.on_reply)
        self._execute(exchange, deadline)
        return exchange.result()

    def keep(self, client: int, state: RecordDict) -> None:
        """Remember the state that a client left behind."""
        if is_empty(state):
            self.states.pop(client, None)
        else:
            self.states[client] = state

    def seed_of(self, message: Message) -> int:
        """Seed of one message from (run seed, round, kind, client), the same on every engine."""
        return self.seed_for(message, self.round_of(message.content))

    def round_of(self, content: RecordDict) -> Any:
        """The round that a content says it belongs to, or the number of this send."""
        server_round: Any = self._sends
        for record in content.config_records.values():
            server_round = record.get(messages.ROUND, server_round)
        return server_round

    def seed_for(self, message: Message, server_round: Any) -> int:
        """Seed of a message of a round that is known."""
        metadata = message.metadata
        client = self.roster.client(metadata.dst_node_id)
        return derive_seed(self.seed, server_round, metadata.message_type, client)


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from anything printable."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def seed_everything(seed: int) -> None:
    """Seed `random`, numpy and, where it is imported, torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch = sys.modules.get("torch")
    if torch is None:
        return
    if _has_accelerator():
        torch.manual_seed(seed)
    else:
        # torch.manual_seed would keep a formatted stack for a device that is not there: 0.7 ms a call
        torch.default_generator.manual_seed(seed)


@contextmanager
def generators_restored() -> Iterator[None]:
    """Give back the generators of `random`, numpy and torch's CPU as they were."""
    torch = sys.modules.get("torch")
    python, legacy = random.getstate(), np.random.get_state()
    generator = None if torch is None else torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)
        if torch is not None and generator is not None:
            torch.set_rng_state(generator)


@cache
def _has_accelerator() -> bool:
    return bool(sys.modules["torch"].accelerator.is_available())


def answer(
    client_app: ClientApp,
    message: Message,
    client: int,
    num_clients: int,
    state: RecordDict | None,
    run_config: dict[str, Any],
) -> tuple[Message, RecordDict]:
    """Let one client answer one message, in this process.

    Returns:
        The reply, an error reply with the traceback if the client raised, and the client's state after
        it (the state before it if the client raised).
    """
    before = state if state is not None else RecordDict()
    node = message.metadata.dst_node_id
    context = _flwr.context(
        run_id=message.metadata.run_id,
        node_id=node,
        node_config={"partition-id": client, "num-partitions": num_clients},
        state=_flwr.private_copy(before),
        run_config=dict(run_config),
    )
    delivered = _flwr.with_content(message, _flwr.private_copy(message.content))
    try:
        with _flwr.lazy_codec():
            reply = client_app(delivered, context)
            if not isinstance(reply, Message):
                raise TypeError(f"the client app returned {type(reply).__name__}, not a Message")
            if reply.has_content():
                reply = _flwr.with_content(reply, _flwr.sendable(reply.content))
            after = _flwr.sendable(context.state)
    except (Exception, SystemExit) as error:
        trace = "".join(traceback.format_exception(error)).rstrip()
        reason = f"client {client}: {type(error).__name__}: {error}\n{trace}"
        code = _flwr.ErrorCode.CLIENT_APP_RAISED_EXCEPTION
        _release_gpu(error)
        return Message(Error(code, reason), reply_to=message), before
    return reply, after


def _release_gpu(error: BaseException) -> None:
    """After a GPU ran out of memory, give back what torch keeps cached: the next client needs it."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()


def is_empty(state: RecordDict) -> bool:
    """True when a client keeps nothing."""
    return not any(len(record) for record in state.values())
