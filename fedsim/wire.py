"""WireGrid: a foreign grid (SuperLink, Flower's simulation) made to look like one of ours.

* every node is asked once who it is (`query.hello`): its partition id and its code; nodes without a
  partition id get the lowest free one, and the map is sent with every later message;
* arrays travel packed, one flat array per dtype;
* replies are fetched as they arrive, so the display is live here, too.
"""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedsim import _flwr, messages, payload
from fedsim.engine.grid import DEFAULT_TIMEOUT
from fedsim.errors import UserError
from fedsim.version import code_digest

#: seconds between two looks for replies
POLL = 0.25


def node_wait() -> float:
    """Seconds that the server waits for its nodes (`FEDSIM_NODE_WAIT`, default 120)."""
    return float(os.environ.get("FEDSIM_NODE_WAIT", "120"))


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
        """Pack and push."""
        return self.inner.push_messages(self._outgoing(messages))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pull and unpack."""
        return [_unpacked(message) for message in self.inner.pull_messages(message_ids)]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push messages and wait for their replies, at most `timeout` seconds (default one hour)."""
        deadline = time.monotonic() + (DEFAULT_TIMEOUT if timeout is None else timeout)
        waiting = dict.fromkeys(self.push_messages(messages))
        replies: list[Message] = []
        while waiting and time.monotonic() < deadline:
            for reply in self.pull_messages(list(waiting)):
                waiting.pop(reply.metadata.reply_to_message_id, None)
                replies.append(reply)
                if self.on_reply is not None:
                    self.on_reply(reply)
            if waiting:
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
            node = reply.metadata.src_node_id
            if reply.has_error():
                raise UserError(f"node {node} did not answer hello: {reply.error.reason}")
            said = messages.config_of(reply)
            if said[messages.CODE] != code_digest():
                raise UserError(
                    f"node {node} runs fedsim {said[messages.CODE]!s}, the server {code_digest()}; "
                    "install the same version on both"
                )
            who = int(said[messages.PARTITION])  # type: ignore[arg-type]
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


def _unpacked(message: Message) -> Message:
    """The reply as its client meant it, or an error reply if it cannot be unpacked."""
    if message.has_error():
        return message
    try:
        content = payload.unpack(message.content)
    except (ValueError, KeyError, TypeError, zlib.error) as error:
        return _flwr.with_error(message, f"its packed arrays cannot be read: {error}")
    return _flwr.with_content(message, content)
