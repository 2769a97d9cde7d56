"""RayGrid: clients run in warm worker processes, on this machine or on the nodes of a Ray cluster.

    driver   contents ─ one copy per distinct array, send and node ──────────┐
             instructions ─ blocks, the largest first ─> workers ─ reports ─> driver
                                                            └ replies, or their sum where they are folded

The result has the bits of SerialGrid's for any number of workers: seeds come from (run seed, round,
client), sums follow one fixed tree, and replies are handed over in order of their instructions. When a
worker dies its block is replayed client by client on a fresh worker, from the state that the clients had
before the block; only a client that is running when two more workers die is blamed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import ray.cloudpickle
from annotated_types import Ge, Le
from flwr.clientapp import ClientApp

from fedsim.engine import cluster
from fedsim.engine.dispatch import Dispatcher, Job
from fedsim.engine.exchange import Exchange
from fedsim.engine.grid import BaseGrid
from fedsim.engine.pool import Pool
from fedsim.engine.surroundings import Surroundings
from fedsim.engine.worker import Setup
from fedsim.errors import UserError
from fedsim.ranges import Count, Positive

#: seconds that a pull waits for the first reply, so that a server that only pulls leaves its core to others
_MOMENT = 0.05
#: seconds after which a wait looks up: another thread may have collected the last reply, which nobody tells
_LOOK = 1.0


class RayGrid(BaseGrid):
    """Runs clients in parallel worker processes that Ray starts.

    Args:
        workers: worker processes (default: one per core, or as many as the GPUs hold).
        threads: torch threads of a worker; results are bit-equal only for equal threads.
        address: of an existing Ray cluster (`auto` finds the one of this machine; default: an own one).
        gpu_fraction: share of one GPU that a worker gets; 0 runs clients on the CPU.
        timeout: seconds that one client may take for one message before it counts as hanging (its worker is
            then ended by SIGALRM, which clients must leave alone).
        memory: GiB that one client may allocate beyond an idle worker's (default: no limit).
    """

    def __init__(
        self,
        client_app: ClientApp,
        num_clients: int,
        seed: int = 0,
        run_config: dict[str, Any] | None = None,
        /,
        *,
        workers: Count | None = None,
        threads: Count = 1,
        address: str | None = None,
        gpu_fraction: Annotated[float, Ge(0), Le(1)] = 0.0,
        timeout: Positive = 3600.0,
        memory: Positive | None = None,
    ) -> None:
        super().__init__(client_app, num_clients, seed, run_config)
        self.timeout = timeout
        self.address = address
        app = _pickled(client_app)
        cluster.connect(address, threads * (workers or 1) if gpu_fraction == 0 else 1)
        near = address is None and cluster.is_alone()
        setup = Setup(
            app=app,
            num_clients=num_clients,
            run_config=self.run_config,
            surroundings=Surroundings.here(near=near),
            threads=threads,
            timeout=timeout,
            memory=memory,
            hide_gpus=gpu_fraction == 0,
            torch=_torch_is_used(),
        )
        self.pool: Pool[Job] = Pool(setup, workers, gpu_fraction, near=near)
        self._dispatcher = Dispatcher(self, self.pool, timeout)

    def close(self) -> None:
        """End the workers, or keep them warm for the next simulation of this process."""
        self._dispatcher.close()
        self.pool.close(park=self.address is None)

    def _start(self, exchange: Exchange) -> None:
        if exchange.accepted:
            self._dispatcher.submit(exchange)

    def _finish(self, exchange: Exchange) -> None:
        try:
            while not exchange.done:
                self._dispatcher.wait([exchange], _LOOK)
                exchange.collect()
        except BaseException:
            self._dispatcher.cancel(exchange)
            raise

    def _advance(self, exchanges: Sequence[Exchange]) -> None:
        self._dispatcher.wait(exchanges, _MOMENT)


def _torch_is_used() -> bool:
    """Workers then import torch while they start, not while the first client runs."""
    return "torch" in sys.modules


def _pickled(client_app: ClientApp) -> bytes:
    try:
        pickled: bytes = ray.cloudpickle.dumps(client_app)
    except Exception as error:
        raise UserError(
            f"the client app cannot be sent to worker processes ({error}); keep open files, locks and the "
            "like out of it, or run it with the serial engine"
        ) from error
    return pickled
