"""The workers of a grid: started, watched, replaced. One thread uses a pool; others may wake it.

starting ──up──> idle <──report── busy (a call runs, one more waits behind it)
    └────────────── lost ───────────┘      a replacement is started, the calls go back

Calls go over lines of our own, or, to workers on other machines and with very large contents, through Ray.
"""

from __future__ import annotations

import pickle
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, NamedTuple, Self, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from fedsim.engine import cluster, objects
from fedsim.engine import line as lines
from fedsim.engine.line import Bell, HungUp, Line
from fedsim.engine.output import Output
from fedsim.engine.sheet import Sheet, Stock, laid_out
from fedsim.engine.worker import Failed, Order, Report, Setup, Worker
from fedsim.errors import UserError

_DEPTH = 2  #: calls of a worker through Ray: one runs, one waits; over a line there is only one
_STARTS = 3  #: workers in a row that may die before they are up
_PATIENCE = 300.0  #: seconds that a worker may take to start while nothing else goes on
_ASKED = 10.0  #: seconds that Ray has to say why a worker ended
_LOOK = 5.0  #: seconds after which lost nodes are looked for while nothing else goes on
_SLICE = 0.1  #: seconds after which somebody who waits for Ray looks up: no bell interrupts that

Job = TypeVar("Job")


@dataclass
class Given:
    """What a worker got in the present send and need not get again: numbers of contents and of parcels."""

    send: int = -1
    contents: set[int] = field(default_factory=set)
    parcels: set[int] = field(default_factory=set)


class Process(NamedTuple):
    """A worker's process: Ray's handle, and what it prints (None where it is on another machine)."""

    actor: Any
    output: Output | None

    @classmethod
    def started(cls, wanted: dict[str, float], *, near: bool) -> Self:
        """A new one."""
        output = Output() if near else None
        kind: Any = ray.remote(Worker)
        options = kind.options(max_restarts=0, max_task_retries=0, **wanted)
        return cls(options.remote(["", ""] if output is None else output.paths), output)

    def end(self) -> None:
        """Kill it, if it still runs."""
        ray.kill(self.actor, no_restart=True)
        if self.output is not None:
            self.output.close()


@dataclass(eq=False)
class Slot(Generic[Job]):
    """One worker; a `fresh` one stands in for a lost one, a `parked` one has served an earlier pool.

    Attributes:
        worker: its process.
        ready: what it answers when it is up: where it listens, or None.
        line: to it, where there is one.
        serving: the call that ends with the line.
        calls: what it was given and has not answered, each with Ray's reference if it went through Ray.
        since: when the first of them began, on `time.monotonic`'s clock.
    """

    worker: Process
    ready: Any
    fresh: bool
    parked: bool
    up: bool = False
    line: Line | None = None
    serving: Any = None
    given: Given = field(default_factory=Given)
    calls: deque[tuple[Any, Job]] = field(default_factory=deque)
    since: float = 0.0

    @property
    def actor(self) -> Any:
        """Ray's handle."""
        return self.worker.actor

    @property
    def awaited(self) -> Any:
        """The next thing that it will answer through Ray, or None."""
        return self.ready if not self.up else self.calls[0][0] if self.calls else None

    def answered(self) -> Job:
        """The job that a report is on."""
        self.since = time.monotonic()
        return self.calls.popleft()[1]

    def hang_up(self) -> None:
        """Without a line the worker takes calls through Ray again."""
        if self.line is not None:
            self.line.close()
            self.line = None


@dataclass(frozen=True)
class Event(Generic[Job]):
    """What happened to a worker: it is up, a job is done, failed, or the worker is lost.

    Attributes:
        job: that is done, or that was running when the worker died or its call failed.
        report: of a job that is done.
        waiting: jobs behind it that a lost worker never began.
        error: why there is no report.
    """

    job: Job | None = None
    report: Report | None = None
    waiting: Sequence[Job] = ()
    error: str = ""


class Pool(Generic[Job]):
    """A fixed number of workers.

    Args:
        setup: what they are started with.
        workers: how many; None for as many as fit.
        gpu_fraction: share of a GPU of each.
        near: all of them are on this machine.
    """

    def __init__(self, setup: Setup, workers: int | None, gpu_fraction: float, *, near: bool) -> None:
        self.size = cluster.size(workers, setup.threads, gpu_fraction)
        self._fits = partial(cluster.room, setup.threads, gpu_fraction)
        self._wanted = cluster.resources(setup.threads, gpu_fraction)
        self._parked = _take_parked(self._wanted)
        self._setup = ray.put(setup)
        self._slots: list[Slot[Job]] = []
        self._failed_starts = 0
        self._bell = Bell()  #: rings when a worker answers through Ray that it is up, and for `wake`
        self._rung = self._woken = False
        self._near = self._lines = near and lines.POSSIBLE
        self._stock = Stock()
        self._quiet_since = time.monotonic()
        for _ in range(self.size):
            self._start(fresh=False)

    # ------------------------------------------------------------------------------ giving work

    def open_slots(self) -> list[Slot[Job]]:
        """Workers that can take a call, the idle ones first."""
        found = [s for s in self._slots if s.up and len(s.calls) < (1 if s.line is not None else _DEPTH)]
        return sorted(found, key=lambda slot: len(slot.calls))

    @property
    def busy(self) -> bool:
        """True while calls are under way."""
        return any(slot.calls for slot in self._slots)

    @property
    def lines(self) -> bool:
        """Whether workers are called over lines."""
        return self._lines

    def running(self) -> list[tuple[Slot[Job], Job]]:
        """The workers that are busy and the job of each that goes on."""
        return [(slot, slot.calls[0][1]) for slot in self._slots if slot.calls]

    def take_lines(self, *, wanted: bool) -> None:
        """Call workers over lines, or through Ray, from now on; nobody is busy.

        Args:
            wanted: over lines, to workers that are on this machine.
        """
        self._lines = wanted and self._near
        for slot in self._slots:
            if not self._lines:
                slot.hang_up()
            elif slot.up and slot.line is None:
                slot.up, slot.ready = False, self._told(slot.actor.listen.remote())

    def shared(self, parcel: objects.Parcel) -> Sheet:
        """What workers with lines are to have in common; the caller gives it back.

        Raises:
            OSError: there is no memory for it.
        """
        return self._stock.written(laid_out(objects.pack(parcel)))

    def submit(self, slot: Slot[Job], job: Job, order: Order, parcels: Sequence[Any]) -> None:
        """Give a worker one more call; of one that is gone `wait` will tell.

        Args:
            slot: the worker.
            job: what the call is for.
            order: the call.
            parcels: the order's: sheets where the worker has a line, or else Ray's references.
        """
        if not slot.calls:
            slot.since = time.monotonic()
        if slot.line is None:
            slot.calls.append((slot.actor.run.remote(pickle.dumps(order, 5), *parcels), job))
            return
        slot.calls.append((None, job))
        with suppress(HungUp):
            slot.line.send(objects.pack(order), parcels)

    # -------------------------------------------------------------------------------- what happens

    def wait(self, timeout: float | None) -> Event[Job] | None:
        """The next event; None after `timeout` seconds, a while without anything to do, or a `wake`.

        Raises:
            UserError: workers cannot be started.
        """
        if not self.busy:
            timeout = _LOOK if timeout is None else min(_LOOK, timeout)
        until = None if timeout is None else time.monotonic() + timeout
        while True:
            left = None if until is None else max(0.0, until - time.monotonic())
            slot = self._next(left)
            if slot is not None:
                self._quiet_since = time.monotonic()
                return self._heard(slot) if slot.up and slot.line is not None else self._answered(slot)
            if self._woken:
                self._woken = False
                return None
            if left == 0:
                self._look()
                return None

    def wake(self) -> None:
        """Let `wait` return, from another thread."""
        self._woken = True
        self._bell.ring()

    def _next(self, timeout: float | None) -> Slot[Job] | None:
        """A worker that has something to say; None: perhaps none has."""
        near = {slot.line: slot for slot in self._slots if slot.line is not None}
        if near:
            if not self._rung:
                heard, self._rung = lines.wait(list(near), self._bell, timeout)
                if heard:
                    return near[heard[0]]
            timeout = 0
        timeout = _SLICE if timeout is None else min(timeout, _SLICE)
        awaited = {slot.awaited: slot for slot in self._slots if slot.awaited is not None}
        done = ray.wait(list(awaited), num_returns=1, timeout=timeout)[0] if awaited else ()
        self._rung = bool(done)  # there may be more
        return awaited[done[0]] if done else None

    def _heard(self, slot: Slot[Job]) -> Event[Job]:
        """Something came over a worker's line, if only its end."""
        try:
            packed, _ = slot.line.receive()  # type: ignore[union-attr]
        except HungUp as error:
            return self._lost(slot, _why_it_ended(slot.serving) or str(error))
        job = slot.answered()
        found = objects.unpack(packed)
        if isinstance(found, Failed):
            slot.given = Given()  # who knows how far it came
            return Event(job, error=_last_line(found.error))
        return Event(job, found)

    def _answered(self, slot: Slot[Job]) -> Event[Job]:
        """A worker is up, or answered through Ray."""
        try:
            answer = ray.get(slot.awaited)
        except RayTaskError as error:
            if slot.up:
                slot.given = Given()
                return Event(slot.answered(), error=_last_line(str(error)))
            return self._lost(slot, _last_line(str(error)))
        except RayError as error:
            return self._lost(slot, _last_line(str(error)))
        if slot.up:
            return Event(slot.answered(), objects.unpack(answer))
        if self._lines and answer is None:
            slot.ready = self._told(slot.actor.listen.remote())
            return Event()
        if self._lines:
            slot.serving = slot.actor.serve.remote()
            try:
                slot.line = Line.to(answer)
            except OSError:
                return self._lost(slot, _why_it_ended(slot.serving))
        slot.up, self._failed_starts = True, 0
        return Event()

    def _lost(self, slot: Slot[Job], why: str) -> Event[Job]:
        last = slot.worker.output.last() if slot.worker.output is not None else ""
        if last:
            why = f"{why} Its last output: {last}"
        if not slot.up and not slot.parked:
            self._failed_starts += 1
            if self._failed_starts >= _STARTS:
                raise UserError(f"workers die while they start: {why}")
        jobs = [job for _, job in slot.calls]
        self._drop(slot)
        self.refill(fresh=slot.up)
        return Event(jobs[0] if jobs else None, None, jobs[1:], why)

    def _look(self) -> None:
        """Nothing runs and no worker came up for a while: is there still a node for those that start?"""
        if self.busy:
            return
        if time.monotonic() - self._quiet_since > _PATIENCE:
            raise UserError(f"Ray started no worker within {_PATIENCE:.0f} s; its nodes are full or lost")
        self._trim()

    # ------------------------------------------------------------------------ starting and ending

    def refill(self, *, fresh: bool = False) -> None:
        """Start workers until there are as many as there should be and can be.

        Raises:
            UserError: there is no room for any.
        """
        if len(self._slots) < self.size:
            for _ in range(min(self.size, self._fits()) - len(self._slots)):
                self._start(fresh=fresh)
        if not self._slots:
            raise UserError("all nodes of the Ray cluster that could run a worker are gone")

    def _trim(self) -> None:
        """Give up on workers that start but have no place, since their node is gone."""
        starting = [slot for slot in self._slots if not slot.up]
        for slot in starting[: max(0, len(self._slots) - self._fits())]:
            self._drop(slot)

    def freshen(self) -> None:
        """Make sure that a fresh worker is there or starts, at the price of an idle one."""
        if any(slot.fresh for slot in self._slots):
            return
        idle = next((slot for slot in self._slots if slot.up and not slot.calls), None)
        if idle is not None:
            self._drop(idle)
            self._start(fresh=True)

    def end(self, slot: Slot[Job], why: str) -> Event[Job]:
        """End a worker that takes too long."""
        return self._lost(slot, why)

    def abandon(self, given_up: Callable[[Job], bool]) -> list[Job]:
        """End the workers that have jobs whose reports nobody waits for; returns their other jobs."""
        others = []
        for slot in list(self._slots):
            jobs = [job for _, job in slot.calls]
            if any(given_up(job) for job in jobs):
                self._drop(slot)
                others += [job for job in jobs if not given_up(job)]
        return others

    def close(self, *, park: bool = False) -> None:
        """End all workers; `park` keeps the idle ones for the next pool of this process."""
        for slot in list(self._slots):
            if park and slot.up and not slot.calls:
                slot.hang_up()
                self._slots.remove(slot)
                self._parked.append(slot.worker)
            else:
                self._drop(slot)
        if park:
            _parking[_kind(self._wanted)] = self._parked
        self._bell.close()
        self._stock.close()

    def _start(self, *, fresh: bool) -> None:
        self._quiet_since = time.monotonic()
        parked = not fresh and bool(self._parked)
        worker = self._parked.pop() if parked else Process.started(self._wanted, near=self._near)
        ready = self._told(worker.actor.equip.remote(self._setup, near=self._lines))
        self._slots.append(Slot(worker, ready, fresh, parked))

    def _told(self, ready: Any) -> Any:
        """The same reference; the bell rings when it is answered."""
        ready.future().add_done_callback(self._bell.ring)
        return ready

    def _drop(self, slot: Slot[Job]) -> None:
        slot.hang_up()
        self._slots.remove(slot)
        slot.worker.end()


#: idle workers of earlier pools of this process, by what they take up
_parking: dict[tuple[Any, ...], list[Process]] = {}


def _kind(wanted: dict[str, float]) -> tuple[Any, ...]:
    return (cluster.here(), *sorted(wanted.items()))


def _take_parked(wanted: dict[str, float]) -> list[Process]:
    """Idle workers of the wanted kind; the others are ended, for they take up room."""
    found = _parking.pop(_kind(wanted), [])
    for place, workers in _parking.items():
        if place[0] == cluster.here():  # else they belong to a Ray that was shut down
            for worker in workers:
                worker.end()
    _parking.clear()
    return found


def _why_it_ended(serving: Any) -> str:
    """What Ray says of a worker whose line is cut (nothing if it does not know within seconds)."""
    try:
        ray.get(serving, timeout=_ASKED)
    except RayError as error:
        return _last_line(str(error))
    return ""


def _last_line(text: str) -> str:
    found = [line.strip() for line in text.splitlines() if line.strip()]
    return found[-1] if found else "no reason is known"
