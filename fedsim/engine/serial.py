"""SerialGrid: every client runs in this process, one after the other. The engine to debug with."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from threading import Lock
from typing import Any

from flwr.clientapp import ClientApp

from fedsim.engine.answering import answer
from fedsim.engine.exchange import Exchange
from fedsim.engine.folding import Folder
from fedsim.engine.grid import BaseGrid
from fedsim.ranges import Count
from fedsim.seeding import generators_restored, seed_everything, threads_restored


class SerialGrid(BaseGrid):
    """Runs clients in this process, in the order in which their messages were pushed or sent.

    What was pushed waits until its replies are asked for (each pull that finds none runs the next client),
    until something is sent, or for the end. Threads of the server wait for each other, since the generators
    belong to the process; a client's time is measured while it runs, so waiting costs it nothing.

    Args:
        threads: torch threads while clients run; results are bit-equal only for equal threads.
    """

    def __init__(
        self,
        client_app: ClientApp,
        num_clients: int,
        seed: int = 0,
        run_config: dict[str, Any] | None = None,
        /,
        *,
        threads: Count = 1,
    ) -> None:
        super().__init__(client_app, num_clients, seed, run_config)
        self.threads = threads
        self._running, self._queueing = Lock(), Lock()
        #: exchange, position, where the replies are folded
        self._waiting: deque[tuple[Exchange, int, Folder | None]] = deque()

    def _start(self, exchange: Exchange) -> None:
        folder = None if exchange.fold is None else Folder(exchange.fold, exchange.sum)
        with self._queueing:
            self._waiting.extend((exchange, position, folder) for position in range(len(exchange.accepted)))

    def _finish(self, exchange: Exchange) -> None:
        try:
            while not exchange.done:
                with self._running:
                    if not exchange.done:
                        self._run_next()
        except BaseException:
            with self._running, self._queueing:
                self._waiting = deque(waiting for waiting in self._waiting if waiting[0] is not exchange)
            raise

    def _advance(self, exchanges: Sequence[Exchange]) -> None:
        with self._running:
            if not all(exchange.done for exchange in exchanges):
                self._run_next()

    def _run_next(self) -> None:
        """Run the client whose message has waited longest."""
        exchange, position, folder = self._waiting[0]
        client = exchange.clients[position]
        with threads_restored(self.threads), generators_restored():
            seed_everything(self.seed_of(exchange, position))
            reply, state = answer(
                self.client_app,
                exchange.accepted[position],
                client,
                self.roster.size,
                self.states.get(client),
                self.run_config,
                exchange.timeout,
            )
        self._waiting.popleft()
        self.keep(client, state)
        if reply is None:
            exchange.take_late(position)
        elif folder is None:
            exchange.take(position, reply)
        else:
            exchange.take_left(folder.add(position, reply))
