"""Waits for nodes that will never come: here all nodes exist from the beginning."""

from __future__ import annotations

import threading
import time

from fedsim.errors import UserError

_TIMES = 10
_SECONDS = 30.0
_WORK = 0.01  #: seconds of computing between two questions that are no mere wait any more


def in_vain(nodes: int, what: str) -> UserError:
    """What to say of such a wait."""
    there = "1 node" if nodes == 1 else f"{nodes} nodes"
    return UserError(
        f"{what}, but there will never be more than {there}: start with more (num_clients, or fedsim run "
        "--clients N) or let the server ask for fewer (min_available_nodes, min_available_clients)"
    )


class Patience:
    """Notices a server that does nothing but ask for its nodes, again and again.

    Only in the thread that it is made in, the server app's: others may watch the nodes as long as they like.

    Args:
        nodes: how many there are.
    """

    def __init__(self, nodes: int) -> None:
        self._nodes = nodes
        self._server = threading.get_ident()
        self._times = 0
        self._since = self._worked = 0.0

    def asked(self) -> None:
        """The server asks for its nodes.

        Raises:
            UserError: as it has been doing for half a minute, without computing anything in between.
        """
        if threading.get_ident() != self._server:
            return
        now, worked = time.monotonic(), time.thread_time()
        if self._times == 0:
            self._since, self._worked = now, worked
        self._times += 1
        long = self._times >= _TIMES and now - self._since >= _SECONDS
        if long and worked - self._worked < _WORK * self._times:
            raise in_vain(self._nodes, f"the server has waited {now - self._since:.0f} s for more nodes")

    def over(self) -> None:
        """The server does something else."""
        self._times = 0
