"""WireGrid: a foreign grid (SuperLink, Flower's simulation) made to look like one of ours.

* every node is asked once who it is (`query.hello`): its partition id and its code; nodes without a
  partition id get the lowest free one, and the map is sent with every later message;
* arrays travel packed, one flat array per dtype;
* replies are fetched as they arrive, so the display is live here, too;
* a reply is that of the node that was asked: what Flower says in the place of a node that failed or is gone
  has the SuperLink as its source.
"""

from __future__ import annotations

import math
import os
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count

from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import Grid

from fedsim import _flwr, messages, payload
from fedsim.engine.grid import DEFAULT_TIMEOUT
from fedsim.errors import UserError
from fedsim.version import code_digest

_UNSENT = "unsent-"  #: how ids of messages begin that Flower did not take

#: seconds between two looks for replies
POLL = 0.25


def node_wait() -> float:
    """Seconds that the server waits for its nodes (`FEDSIM_NODE_WAIT`, default 120).

    Raises:
        UserError: it is no number.
    """
    said = os.environ.get("FEDSIM_NODE_WAIT", "120")
    try:
        seconds = float(said)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise UserError(f"FEDSIM_NODE_WAIT = '{said}': must be a number of seconds, such as 120")
    return seconds


@dataclass(frozen=True)
class NodeMap:
    """Which node is which client."""

    nodes: dict[int, int]  #: partition id -> node id
    absent: frozenset[int] = frozenset()  #: clients that take no part in training

    def clients(self) -> Sequence[int]:
        """Partition ids of those that take part, ascending."""
        return sorted(set(self.nodes) - self.absent)

    def everyone(self) -> Sequence[int]:
        """All partition ids, ascending."""
        return sorted(self.nodes)

    def node(self, client: int) -> int:
        """Node id of a client."""
        return self.nodes[client]

    def client(self, node: int) -> int:
        """Partition id of a node."""
        return self._clients[node]

    @cached_property
    def _clients(self) -> dict[int, int]:
        return {node: client for client, node in self.nodes.items()}


class WireGrid(_flwr.BareGrid):
    """Wraps a foreign grid.

    Args:
        inner: the grid that Flower gave to the server app.
        clients: how many nodes there must be.
        half: names that travel as bfloat16.
    """

    def __init__(self, inner: Grid, clients: int, half: frozenset[str] = frozenset()) -> None:
        self.inner = inner
        self.half = half
        self.on_reply: Callable[[Message], None] | None = None
        self.roster = NodeMap({})
        #: message id -> node, of what was sent and is not answered
        self._asked: dict[str, int] = {}
        self._numbers = count(1)
        #: by message id: error replies to what Flower did not take
        self._unsent: dict[str, Message] = {}
        self.roster = NodeMap(self._hello(clients))

    def set_run(self, run: _flwr.Run) -> None:
        """Set the run of the wrapped grid."""
        self.inner.set_run(run)

    @property
    def run(self) -> _flwr.Run:
        """The run of the wrapped grid."""
        return self.inner.run

    def get_node_ids(self) -> Iterable[int]:
        """Ids of the nodes that said hello."""
        return [self.roster.node(client) for client in self.roster.clients()]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Pack and push; for a message that Flower does not take, an error reply waits to be pulled."""
        ready = self._outgoing(messages)
        taken = list(self.inner.push_messages(ready))
        if len(taken) != len(ready):  # it leaves out those that it did not take; their ids it set itself
            there = set(taken)
            taken = [m.metadata.message_id if m.metadata.message_id in there else "" for m in ready]
        ids = []
        for message, given in zip(ready, taken, strict=True):
            message_id = given or self._not_taken(message)
            self._asked[message_id] = message.metadata.dst_node_id
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pull and unpack."""
        wanted = list(message_ids)
        replies = [self._unsent.pop(i) for i in wanted if i in self._unsent]
        if sent := [i for i in wanted if not i.startswith(_UNSENT)]:
            replies += map(_unpacked, self.inner.pull_messages(sent))
        return [self._of_its_node(reply) for reply in replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push messages and wait for their replies, at most `timeout` seconds (default one hour)."""
        deadline = time.monotonic() + (DEFAULT_TIMEOUT if timeout is None else timeout)
        waiting = dict.fromkeys(self.push_messages(messages))
        replies: list[Message] = []
        while waiting and time.monotonic() < deadline:
            pulled = self.pull_messages(list(waiting))
            came = [reply for reply in pulled if reply.metadata.reply_to_message_id in waiting]
            for reply in came:
                waiting.pop(reply.metadata.reply_to_message_id, None)
                replies.append(reply)
                if self.on_reply is not None:
                    self.on_reply(reply)
            if waiting and not came:
                time.sleep(POLL)
        return replies

    def _outgoing(self, outgoing: Iterable[Message]) -> list[Message]:
        # a list: Flower's grid goes over the messages twice
        ready: list[Message] = []
        packed: dict[int, RecordDict] = {}
        for message in outgoing:
            content = message.content
            if id(content) not in packed:
                packed[id(content)] = payload.pack(content, self.half)
            own = RecordDict(dict(packed[id(content)].items()))
            config = own.get(messages.CONFIG)
            if isinstance(config, ConfigRecord) and self.roster.nodes:
                who = self.roster.client(message.metadata.dst_node_id)
                own[messages.CONFIG] = ConfigRecord({**config, messages.PARTITION: who})
            ready.append(_flwr.with_content(message, own))
        return ready

    def _not_taken(self, message: Message) -> str:
        """Keep an error reply to a message that Flower did not take; its id."""
        message_id = f"{_UNSENT}{next(self._numbers)}"
        _flwr.set_message_id(message, message_id)
        node = message.metadata.dst_node_id
        reason = f"node {node} is gone, or the message was too large: Flower did not take it"
        self._unsent[message_id] = Message(Error(_flwr.ErrorCode.NODE_UNAVAILABLE, reason), reply_to=message)
        return message_id

    def _of_its_node(self, reply: Message) -> Message:
        node = self._asked.pop(reply.metadata.reply_to_message_id, None)
        if node is not None:
            _flwr.set_source(reply, node)
        return reply

    # ------------------------------------------------------------------------------- hello

    def _hello(self, clients: int) -> dict[int, int]:
        nodes = self._wait_for(clients)
        asked = [
            Message(
                RecordDict({messages.CONFIG: ConfigRecord({messages.CODE: code_digest()})}),
                message_type=messages.HELLO,
                dst_node_id=node,
            )
            for node in nodes
        ]
        claimed: dict[int, int] = {}
        nameless: list[int] = []
        for reply in self.send_and_receive(asked, timeout=node_wait()):
            node, who = reply.metadata.src_node_id, _partition_of(reply)
            if who < 0:
                nameless.append(node)
            elif who in claimed:
                raise UserError(f"nodes {claimed[who]} and {node} both say partition-id {who}")
            else:
                claimed[who] = node
        if len(claimed) + len(nameless) < clients:
            silent = sorted(set(nodes) - set(claimed.values()) - set(nameless))
            raise UserError(f"nodes {silent} did not answer hello within {node_wait():.0f} s")
        free = iter(sorted(set(range(clients)) - set(claimed)))
        claimed |= {next(free): node for node in sorted(nameless)}
        if sorted(claimed) != list(range(clients)):
            raise UserError(f"nodes say partition ids {sorted(claimed)}, expected 0 to {clients - 1}")
        return claimed

    def _wait_for(self, clients: int) -> list[int]:
        deadline = time.monotonic() + node_wait()
        nodes = sorted(self.inner.get_node_ids())
        while len(nodes) < clients and time.monotonic() < deadline:
            time.sleep(POLL)
            nodes = sorted(self.inner.get_node_ids())
        if len(nodes) != clients:
            raise UserError(
                f"{len(nodes)} nodes are connected but the experiment has partition.clients = {clients}; "
                f'simulation: flwr run . --federation-config "num-supernodes={clients}"; '
                f"real nodes: start {clients} SuperNodes or override partition.clients={len(nodes)}"
            )
        return nodes


def _partition_of(reply: Message) -> int:
    """What a node says to hello: its partition id, -1 where it has none.

    Raises:
        UserError: it failed, or is no node of ours.
    """
    node = reply.metadata.src_node_id
    if reply.has_error():
        raise UserError(f"node {node} did not answer hello: {reply.error.reason}")
    config = reply.content.get(messages.CONFIG)
    said = config if isinstance(config, ConfigRecord) else {}
    code, who = said.get(messages.CODE), said.get(messages.PARTITION)
    if not isinstance(code, str):
        raise UserError(f"node {node} runs another client app; install fedsim {code_digest()} on it")
    if code != code_digest():
        raise UserError(
            f"node {node} runs fedsim {code}, the server {code_digest()}; install the same version on both"
        )
    if isinstance(who, bool) or not isinstance(who, int):
        raise UserError(
            f"node {node} says partition-id {who!r}, which is no whole number; start it with "
            '--node-config "partition-id=0"'
        )
    return who


def _unpacked(message: Message) -> Message:
    """The reply as its client meant it, or an error reply if it cannot be unpacked."""
    if message.has_error():
        return message
    try:
        content = payload.unpack(message.content)
    except (ValueError, KeyError, TypeError, zlib.error) as error:
        return _flwr.with_error(message, f"its packed arrays cannot be read: {error}")
    return _flwr.with_content(message, content)
