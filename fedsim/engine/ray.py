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

import os
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Annotated, Any

import ray
import ray.cloudpickle
from annotated_types import Ge, Le
from flwr.app import Error, Message, RecordDict
from flwr.clientapp import ClientApp

from fedsim import _flwr, messages
from fedsim.engine import cluster, objects
from fedsim.engine.blocks import Block, blocks
from fedsim.engine.exchange import Exchange
from fedsim.engine.grid import BaseGrid
from fedsim.engine.line import MOST
from fedsim.engine.pool import Event, Given, Pool
from fedsim.engine.sheet import Sheet
from fedsim.engine.worker import Item, Order, Setup
from fedsim.errors import UserError
from fedsim.ranges import Count, Positive

#: bytes; less is not worth shared memory: it goes with the first call that a worker gets in a send
_SMALL = 2 * 2**20
#: bytes; what clients send is expected to be as much as they get, and of more than this a worker does not
#: keep the replies, or the float64 sums, of a larger block; such contents go through Ray's store, which
#: has a limit and the disk beyond it; sheets have neither
_HEAVY = 16 * 2**20

_numbers = count()  #: of sends in this process


@dataclass(frozen=True)
class Job:
    """Some instructions for one call of a worker.

    Attributes:
        block: subtree of the sum that they are.
        positions: of the instructions.
        began: when a client that is tried alone was handed over, on `time.monotonic`'s clock.
        deaths: workers that died while this client was tried alone.
    """

    block: Block
    positions: Sequence[int]
    began: float | None = None
    deaths: int = 0


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
        setup = Setup(
            app=_pickled(client_app),
            num_clients=num_clients,
            run_config=self.run_config,
            path=tuple(entry or os.getcwd() for entry in sys.path),
            folder=os.getcwd(),
            environment={k: v for k, v in os.environ.items() if k.startswith("FEDSIM_")},
            threads=threads,
            timeout=timeout,
            memory=memory,
            hide_gpus=gpu_fraction == 0,
            torch=_torch_is_used(),
        )
        cluster.connect(address, threads * (workers or 1) if gpu_fraction == 0 else 1)
        self.pool: Pool[Job] = Pool(setup, workers, gpu_fraction, near=address is None and cluster.is_alone())

    def close(self) -> None:
        """End the workers, or keep them warm for the next simulation of this process."""
        self.pool.close(park=self.address is None)

    def _execute(self, exchange: Exchange, deadline: float | None) -> None:
        self.pool.refill()
        try:
            for wave in _waves(exchange):
                _Dispatch(self, exchange, wave, deadline).run()
        finally:
            self.pool.abandon()


class _Dispatch:
    """One pass over instructions of different clients."""

    def __init__(
        self, grid: RayGrid, exchange: Exchange, wave: Sequence[int], deadline: float | None
    ) -> None:
        self.grid = grid
        self.pool = grid.pool
        self.exchange = exchange
        self.wave = wave
        self.deadline = deadline
        self.cargo = _Cargo(grid, exchange, wave)
        # the one: an empty client costs something, too
        work = [1.0 + (0.0 if grid.work is None else grid.work[exchange.client(p)]) for p in wave]
        cut = blocks(work, self.pool.size, 64 if self.cargo.heaviest < _HEAVY else 1)
        self.jobs = deque(Job(b, [wave[i] for i in b.positions(len(wave))]) for b in cut)
        self.replays: deque[Job] = deque()

    def run(self) -> None:
        """Until everything is answered, or the deadline."""
        try:
            self._run()
        finally:
            self.cargo.close()

    def _run(self) -> None:
        while self.jobs or self.replays or self.pool.busy:
            self._hand_out_all()
            if self.replays and not self.jobs:
                self.pool.freshen()
            left = None if self.deadline is None else self.deadline - time.monotonic()
            if left is not None and left <= 0:
                return
            event = self.pool.wait(left)
            if event is not None:
                self._hand_out_all()  # nobody waits while a report is looked at
                self._take(event)

    def _hand_out_all(self) -> None:
        while self._hand_out():
            pass

    def _hand_out(self) -> bool:
        """Give every open worker one more job; False when there is nothing to give or nobody to take it."""
        gave = False
        for slot in self.pool.open_slots():
            if slot.fresh and self.replays:
                if slot.calls:
                    continue  # a client that is tried alone has its worker for itself
                job = replace(self.replays.popleft(), began=time.monotonic())
            elif self.jobs and not any(job.began is not None for _, job in slot.calls):
                job = self.jobs.popleft()
                slot.fresh = False
            else:
                continue
            self.pool.submit(slot, job, *self.cargo.order(job, slot.given))
            gave = True
        return gave

    def _take(self, event: Event[Job]) -> None:
        self.jobs.extendleft(reversed(event.waiting))
        job = event.job
        if job is None:
            return
        if event.report is None:
            self._failed(job, event.error)
            return
        for client, state in event.report.states.items():
            # a view of a report keeps all of it
            self.grid.keep(client, _flwr.owned(state) if messages.nbytes(state) < _SMALL else state)
        for position, reply in event.report.replies:
            self.exchange.take(position, reply)
        for left in event.report.left:
            self.exchange.take_left(left)
        if self.exchange.fold is not None:
            self.exchange.sum.add(event.report.total, job.block.index, job.block.level)

    def _failed(self, job: Job, why: str) -> None:
        if job.began is None:
            singles = zip(job.block.positions(len(self.wave)), job.positions, strict=True)
            self.replays.extend(Job(Block(0, index), [position]) for index, position in singles)
            return
        [position] = job.positions
        client = self.exchange.client(position)
        if time.monotonic() - job.began >= self.grid.timeout:
            reason = f"client {client}: no answer within {self.grid.timeout:g} s (engine.timeout)"
        elif job.deaths == 0:
            self.replays.append(replace(job, deaths=1))  # it may have been somebody else's doing
            return
        else:
            reason = f"client {client}: its worker died twice while it ran alone: {why}"
        error = Error(_flwr.ErrorCode.CLIENT_APP_CRASHED, reason)
        reply = Message(error, reply_to=self.exchange.accepted[position])
        if self.exchange.fold is None:
            self.exchange.take(position, reply)
        else:
            self.exchange.take_failed(position, reply)
            self.exchange.sum.add(None, job.block.index)


class _Cargo:
    """The contents of one exchange on their way: arrays that several clients get are shared memory."""

    def __init__(self, grid: RayGrid, exchange: Exchange, wave: Sequence[int]) -> None:
        self.grid = grid
        self.exchange = exchange
        self._number = next(_numbers)
        numbers: dict[int, int] = {}
        contents: list[RecordDict] = []
        self._content: dict[int, int] = {}
        for position in wave:
            content = exchange.accepted[position].content
            if id(content) not in numbers:
                numbers[id(content)] = len(contents)
                contents.append(content)
            self._content[position] = numbers[id(content)]
        self._rounds = [grid.round_of(content) for content in contents]
        self._templates, parcels = objects.disassemble(contents)
        self._needs = [objects.parcels_of(template) for template in self._templates]
        sizes = [sum(values.nbytes for values in parcel) for parcel in parcels]
        #: bytes of the largest content
        self.heaviest = max(sum(sizes[number] for number in needs) for needs in self._needs)
        clients = Counter(number for content in self._content.values() for number in self._needs[content])
        large = {number for number, size in enumerate(sizes) if size >= _SMALL}
        shared = {number for number in large if clients[number] > 1}
        lines = grid.pool.take_lines(wanted=len(shared) <= MOST and self.heaviest < _HEAVY)
        apart = shared if lines else large
        put = grid.pool.shared if lines else ray.put
        self._parcels = {n: parcel for n, parcel in enumerate(parcels) if n not in apart}
        self._apart: dict[int, Any] = {n: put(parcels[n]) for n in sorted(apart)}
        #: what a line brings for several clients a worker keeps, what Ray brings comes with every call
        self._passing = large - shared if lines else apart

    def order(self, job: Job, given: Given) -> tuple[Order, list[Any]]:
        """What a worker needs for a job, less what it was given before, and the parcels that go beside it."""
        if given.send != self._number:
            given.send, given.contents, given.parcels = self._number, set(), set()
        items, states = [], {}
        for position in job.positions:
            message = self.exchange.accepted[position]
            client, content = self.exchange.client(position), self._content[position]
            seed = self.grid.seed_for(message, self._rounds[content])
            items.append(Item(position, client, seed, content, _flwr.metadata_row(message)))
            if client in self.grid.states:
                states[client] = self.grid.states[client]
        contents = {item.content for item in items}
        needed = {number for content in contents for number in self._needs[content]}
        templates = {number: self._templates[number] for number in contents - given.contents}
        new = needed - given.parcels
        parcels = {number: self._parcels[number] for number in new if number in self._parcels}
        apart = sorted(new - set(parcels))
        passing = new & self._passing
        given.contents |= contents
        given.parcels |= new - passing
        order = Order(self._number, items, templates, parcels, apart, passing, states, self.exchange.fold)
        return order, [self._apart[number] for number in apart]

    def close(self) -> None:
        """Give up what is shared; who uses it still has it."""
        for parcel in self._apart.values():
            if isinstance(parcel, Sheet):
                parcel.give_back()


def _waves(exchange: Exchange) -> list[list[int]]:
    """Positions of different clients: a second message to a client waits for its first one's state."""
    seen: dict[int, int] = {}
    waves: list[list[int]] = []
    for position in range(len(exchange.accepted)):
        client = exchange.client(position)
        number = seen.get(client, 0)
        seen[client] = number + 1
        if number == len(waves):
            waves.append([])
        waves[number].append(position)
    return waves


def _torch_is_used() -> bool:
    """Workers then import torch before the first client, so that its generator is seeded already."""
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
