"""The dispatcher of a RayGrid: one thread that gives instructions to workers and takes their reports.

    threads of the server ── exchanges ──> dispatcher ── calls ──> pool of workers
            └──<── what came, taken in the thread that waits ──<──┘

Whatever was pushed goes on while the server does something else, and several threads may send at the same
time. A client has one message at a time: a second one waits for the state that the first one leaves.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from queue import Empty, SimpleQueue
from threading import Condition, Thread

from flwr.app import Error, Message

from fedsim import _flwr, messages
from fedsim.engine.blocks import Block, blocks
from fedsim.engine.cargo import HEAVY, SMALL, Cargo
from fedsim.engine.exchange import Exchange
from fedsim.engine.grid import BaseGrid
from fedsim.engine.output import pass_on
from fedsim.engine.pool import Event, Pool, Slot
from fedsim.engine.worker import Report

#: seconds beyond a client's time after which a worker is ended that did not notice by itself
_GRACE = 10.0


@dataclass(frozen=True)
class Job:
    """Some instructions for one call of a worker.

    Attributes:
        load: that they belong to.
        block: subtree of the sum that they are.
        positions: of the instructions.
        began: when a client that is tried alone was handed over, on `time.monotonic`'s clock.
        deaths: workers that died while this client was tried alone.
    """

    load: Load
    block: Block
    positions: Sequence[int]
    began: float | None = None
    deaths: int = 0


class Load:
    """Instructions of one exchange to different clients that nothing keeps from being handed out.

    Args:
        exchange: the exchange.
        positions: of the instructions.
    """

    def __init__(self, exchange: Exchange, positions: Sequence[int]) -> None:
        self.exchange = exchange
        self.positions = positions
        self.cargo = Cargo(exchange, positions)
        self.jobs: deque[Job] = deque()
        self.replays: deque[Job] = deque()
        self.clients = {exchange.clients[position] for position in positions}  #: that have not answered

    def cut(self, work: Sequence[float] | None, workers: int) -> None:
        """Make jobs of it.

        Args:
            work: how much each client has; None: all the same.
            workers: that are to share it.
        """
        costs = [1.0 + (0.0 if work is None else work[self.exchange.clients[p]]) for p in self.positions]
        highest = 64 if self.cargo.heaviest < HEAVY and not self.exchange.singly else 1
        cut = blocks(costs, workers, 0 if self.exchange.singly else highest)
        count = len(self.positions)
        self.jobs.extend(Job(self, b, [self.positions[i] for i in b.positions(count)]) for b in cut)


class Dispatcher:
    """The thread, and what other threads say to it.

    Args:
        grid: whose clients run.
        pool: its workers; nobody else uses it before `close`.
        timeout: seconds that a client may take.
    """

    def __init__(self, grid: BaseGrid, pool: Pool[Job], timeout: float) -> None:
        self._grid = grid
        self._timeout = timeout
        self._pool = pool
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._news = Condition()
        self._waiting: list[tuple[Exchange, Sequence[int]]] = []
        self._active: list[Load] = []
        self._stopped = False
        self._thread = Thread(target=self._loop, name="fedsim-dispatcher", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------------- from other threads

    def submit(self, exchange: Exchange) -> None:
        """Begin with an exchange."""
        self._tell(lambda: self._waiting.append((exchange, range(len(exchange.accepted)))))

    def cancel(self, exchange: Exchange) -> None:
        """Nobody waits for an exchange any more; workers that are busy with it are ended."""
        self._tell(partial(self._give_up, exchange))

    def wait(self, exchanges: Sequence[Exchange], timeout: float | None = None) -> None:
        """Until there is something to collect, `timeout` seconds at most.

        Raises:
            RuntimeError: nothing comes any more, for the thread has ended.
        """
        with self._news:
            self._news.wait_for(lambda: self._stopped or any(e.news for e in exchanges), timeout)
            if self._stopped and not any(exchange.news or exchange.done for exchange in exchanges):
                raise RuntimeError("the simulation has ended: its grid takes no messages any more")

    def close(self) -> None:
        """End the thread; calls that are under way are not waited for."""
        self._tell(self._stop)
        self._thread.join()

    def _tell(self, command: Callable[[], None]) -> None:
        self._commands.put(command)
        self._pool.wake()

    # ------------------------------------------------------------------------------- the thread

    def _loop(self) -> None:
        while not self._stopped:
            try:
                self._obey()
                if not self._stopped:
                    self._step()
            except Exception as error:  # whoever waits raises it
                self._fail(error)
        for load in self._active:
            load.cargo.close()

    def _stop(self) -> None:
        with self._news:  # other threads of the server may still wait for replies
            self._stopped = True
            self._news.notify_all()

    def _obey(self) -> None:
        """Carry out commands; wait for one where nothing else is to be done."""
        idle = not self._active and not self._waiting
        with suppress(Empty):
            while not self._stopped:
                self._commands.get(block=idle)()
                idle = False

    def _step(self) -> None:
        self._admit()
        if not self._active:
            return
        self._hand_out_all()
        if any(load.replays for load in self._active) and not any(load.jobs for load in self._active):
            self._pool.freshen()
        left = min((end - time.monotonic() for end, _ in self._ends()), default=None)
        event = self._pool.wait(None if left is None else max(0.0, left))
        if event is not None:
            self._hand_out_all()  # nobody waits while a report is looked at
            self._take(event)
        for end, slot in self._ends():  # as they are now: a worker may just have died, or begun another job
            if time.monotonic() >= end:
                self._take(self._pool.end(slot, "it took too long"))
        for load in [load for load in self._active if not load.clients]:
            self._active.remove(load)
            load.cargo.close()

    def _admit(self) -> None:
        """Make loads of what waits, as far as its clients are free."""
        if not self._waiting:
            return
        busy = {client for load in self._active for client in load.clients}
        still: list[tuple[Exchange, Sequence[int]]] = []
        for exchange, positions in self._waiting:
            free: list[int] = []
            rest: list[int] = []
            for position in positions:
                client = exchange.clients[position]
                (rest if client in busy else free).append(position)
                busy.add(client)
            if rest and exchange.fold is not None:  # a sum is made of all positions
                free, rest = [], list(positions)
            if free and not self._begin(exchange, free):
                rest = list(positions)
            if rest:
                still.append((exchange, rest))
        self._waiting = still

    def _begin(self, exchange: Exchange, positions: Sequence[int]) -> bool:
        """Whether a load can begin now: a heavy one goes through Ray, once nothing is on the lines."""
        load = Load(exchange, positions)
        if not self._active:
            self._pool.take_lines(wanted=load.cargo.light)
        elif self._pool.lines and not load.cargo.light:
            return False
        self._pool.refill()
        load.cargo.load(self._pool)
        load.cut(self._grid.work, self._pool.size)
        self._active.append(load)
        return True

    def _hand_out_all(self) -> None:
        while self._hand_out():
            pass

    def _hand_out(self) -> bool:
        """Give every open worker one more job; False when there is nothing to give or nobody to take it."""
        gave = False
        for slot in self._pool.open_slots():
            job = self._next_job(slot)
            if job is not None:
                order, parcels = job.load.cargo.order(self._grid, job.positions, slot.given)
                self._pool.submit(slot, job, order, parcels)
                gave = True
        return gave

    def _next_job(self, slot: Slot[Job]) -> Job | None:
        alone = next((load for load in self._active if load.replays), None)
        if slot.fresh and alone is not None:
            if slot.calls:
                return None  # a client that is tried alone has its worker for itself
            return replace(alone.replays.popleft(), began=time.monotonic())
        load = next((load for load in self._active if load.jobs), None)
        if load is None or any(job.began is not None for _, job in slot.calls):
            return None
        slot.fresh = False
        return load.jobs.popleft()

    # ----------------------------------------------------------------------------- what comes back

    def _take(self, event: Event[Job]) -> None:
        for behind in reversed(event.waiting):
            self._again(behind)
        job, report = event.job, event.report
        if job is None or job.load not in self._active:
            return
        if report is None:
            self._failed(job, event.error)
            return
        for client, state in report.states.items():
            # a view of a report keeps all of it
            self._grid.keep(client, _flwr.owned(state) if messages.nbytes(state) < SMALL else state)
        self._post(job, partial(_hand_over, job, report))

    def _again(self, job: Job) -> None:
        if job.load in self._active:
            (job.load.jobs if job.began is None else job.load.replays).appendleft(job)

    def _failed(self, job: Job, why: str) -> None:
        load = job.load
        exchange = load.exchange
        if job.began is None:
            singles = zip(job.block.positions(len(load.positions)), job.positions, strict=True)
            load.replays.extend(Job(load, Block(0, index), [position]) for index, position in singles)
            return
        [position] = job.positions
        client = exchange.clients[position]
        taken = time.monotonic() - job.began
        if self._own_time(exchange) and taken >= exchange.timeout:  # type: ignore[operator]
            self._post(job, partial(exchange.take_late, position))
            return
        if taken >= self._timeout:
            reason = f"client {client}: no answer within {self._timeout:g} s (engine.timeout)"
        elif job.deaths == 0:
            load.replays.append(replace(job, deaths=1))  # it may have been somebody else's doing
            return
        else:
            reason = f"client {client}: its worker died twice while it ran alone: {why}"
        error = Error(_flwr.ErrorCode.CLIENT_APP_CRASHED, reason)
        reply = Message(error, reply_to=exchange.accepted[position])
        self._post(job, partial(exchange.take_failed, position, reply))

    def _post(self, job: Job, call: Callable[[], None]) -> None:
        exchange = job.load.exchange
        job.load.clients.difference_update(exchange.clients[position] for position in job.positions)
        with self._news:
            exchange.post(call)
            self._news.notify_all()

    # -------------------------------------------------------------------------------- giving up

    def _own_time(self, exchange: Exchange) -> bool:
        """Whether the server gives clients less time than the engine."""
        return exchange.timeout is not None and exchange.timeout < self._timeout

    def _ends(self) -> list[tuple[float, Slot[Job]]]:
        """When to end workers, that should have stopped a client that takes longer than the server allows."""
        found = []
        for slot, job in (
            self._pool.running() if any(self._own_time(a.exchange) for a in self._active) else ()
        ):
            if self._own_time(job.load.exchange):
                allowed = job.load.exchange.timeout * len(job.positions) + _GRACE  # type: ignore[operator]
                found.append((slot.since + allowed, slot))
        return found

    def _give_up(self, exchange: Exchange) -> None:
        self._waiting = [waiting for waiting in self._waiting if waiting[0] is not exchange]
        self._drop([load for load in self._active if load.exchange is exchange])
        if self._active:
            self._pool.refill()

    def _fail(self, error: Exception) -> None:
        exchanges = [*(load.exchange for load in self._active), *(exchange for exchange, _ in self._waiting)]
        self._waiting = []
        with suppress(Exception):  # the first error is the one to tell
            self._drop(list(self._active))
        self._active = []
        with self._news:
            for exchange in exchanges:
                exchange.fail(error)
            self._news.notify_all()

    def _drop(self, loads: Sequence[Load]) -> None:
        self._active = [load for load in self._active if load not in loads]
        for job in self._pool.abandon(lambda job: job.load in loads):
            self._again(job)
        for load in loads:
            load.cargo.close()


def _hand_over(job: Job, report: Report) -> None:
    """Take a report, in the thread that waits for it."""
    exchange = job.load.exchange
    for client, printed in report.printed:
        pass_on(client, printed)
    for position, reply in report.replies:
        exchange.take(position, reply)
    for left in report.left:
        exchange.take_left(left)
    for position in report.late:
        exchange.take_late(position)
    if exchange.fold is not None:
        exchange.sum.add(report.total, job.block.index, job.block.level)
