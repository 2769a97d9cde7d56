"""SerialGrid: every client runs in this process, one after the other. The engine to debug with."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flwr.clientapp import ClientApp

from fedsim.engine.exchange import Exchange
from fedsim.engine.folding import Folder
from fedsim.engine.grid import BaseGrid, answer, generators_restored, seed_everything
from fedsim.ranges import Count


class SerialGrid(BaseGrid):
    """Runs clients in this process, in order of their messages.

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

    def _execute(self, exchange: Exchange, deadline: float | None) -> None:
        folder = None if exchange.fold is None else Folder(exchange.fold, exchange.sum)
        for position, message in enumerate(exchange.accepted):
            if deadline is not None and time.monotonic() > deadline:
                return
            client = exchange.client(position)
            with process_restored(self.threads):
                seed_everything(self.seed_of(message))
                reply, state = answer(
                    self.client_app,
                    message,
                    client,
                    self.roster.size,
                    self.states.get(client),
                    self.run_config,
                )
            self.keep(client, state)
            if folder is None:
                exchange.take(position, reply)
            else:
                exchange.take_left(folder.add(position, reply))


@contextmanager
def process_restored(threads: int) -> Iterator[None]:
    """Give back the generators and the thread count as they were, whatever a client does to them."""
    torch = sys.modules.get("torch")
    before = threads if torch is None else torch.get_num_threads()
    with generators_restored():
        if torch is not None and before != threads:
            torch.set_num_threads(threads)
        try:
            yield
        finally:
            if torch is not None and torch.get_num_threads() != before:
                torch.set_num_threads(before)
