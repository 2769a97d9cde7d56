"""The workers of a grid: started, watched, replaced. Nothing here polls: Ray wakes us for every event.

starting ──up──> idle <──report── busy (a call runs, one more waits behind it)
    └────────────── lost ───────────┘      a replacement is started, the calls go back
"""

from __future__ import annotations

import pickle
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from fedsim.engine import cluster, objects
from fedsim.engine.worker import Order, Report, Setup, Worker
from fedsim.errors import UserError

_DEPTH = 2  #: calls of a worker: one runs, one waits
_STARTS = 3  #: workers in a row that may die before they are up
_PATIENCE = 300.0  #: seconds that a worker may take to start while nothing else goes on
_LOOK = 5.0  #: seconds after which lost nodes are looked for while nothing else goes on

Job = TypeVar("Job")


@dataclass
class Given:
    """What a worker got in the present send and need not get again: numbers of contents and of parcels."""

    send: int = -1
    contents: set[int] = field(default_factory=set)
    parcels: set[int] = field(default_factory=set)


@dataclass(eq=False)
class Slot(Generic[Job]):
    """One worker; a `fresh` one stands in for a lost one, a `parked` one has served an earlier pool."""

    actor: Any
    ready: Any
    fresh: bool
    parked: bool
    up: bool = False
    given: Given = field(default_factory=Given)
    calls: deque[tuple[Any, Job]] = field(default_factory=deque)

    @property
    def awaited(self) -> Any:
        """The next thing that it will answer, or None."""
        return self.ready if not self.up else self.calls[0][0] if self.calls else None


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
    """

    def __init__(self, setup: Setup, workers: int | None, gpu_fraction: float) -> None:
        self.size = cluster.size(workers, setup.threads, gpu_fraction)
        self._fits = partial(cluster.room, setup.threads, gpu_fraction)
        self._wanted = cluster.resources(setup.threads, gpu_fraction)
        self._parked = _take_parked(self._wanted)
        self._setup = ray.put(setup)
        self._slots: list[Slot[Job]] = []
        self._failed_starts = 0
        self._quiet_since = time.monotonic()
        for _ in range(self.size):
            self._start(fresh=False)

    # ------------------------------------------------------------------------------ giving work

    def open_slots(self) -> list[Slot[Job]]:
        """Workers that can take a call, the idle ones first."""
        return sorted((s for s in self._slots if s.up and len(s.calls) < _DEPTH), key=lambda s: len(s.calls))

    @property
    def busy(self) -> bool:
        """True while calls are under way."""
        return any(slot.calls for slot in self._slots)

    def submit(self, slot: Slot[Job], job: Job, order: Order, parcels: Sequence[Any]) -> None:
        """Give a worker one more call."""
        slot.calls.append((slot.actor.run.remote(pickle.dumps(order, 5), *parcels), job))

    # -------------------------------------------------------------------------------- what happens

    def wait(self, timeout: float | None) -> Event[Job] | None:
        """The next event; None when `timeout` seconds, or a while without anything to do, pass before it.

        Raises:
            UserError: workers cannot be started.
        """
        awaited = {slot.awaited: slot for slot in self._slots if slot.awaited is not None}
        if not self.busy:
            timeout = _LOOK if timeout is None else min(_LOOK, timeout)
        done, _ = ray.wait(list(awaited), num_returns=1, timeout=timeout)
        if not done:
            self._look()
            return None
        slot, self._quiet_since = awaited[done[0]], time.monotonic()
        try:
            answered = ray.get(done[0])
        except RayTaskError as error:
            if slot.up:
                slot.given = Given()  # who knows how far it came
                return Event(slot.calls.popleft()[1], error=_last_line(error))
            return self._lost(slot, error)
        except RayError as error:
            return self._lost(slot, error)
        if not slot.up:
            slot.up, self._failed_starts = True, 0
            return Event()
        return Event(slot.calls.popleft()[1], objects.unpack(answered))

    def _lost(self, slot: Slot[Job], error: RayError) -> Event[Job]:
        if not slot.up and not slot.parked:
            self._failed_starts += 1
            if self._failed_starts >= _STARTS:
                raise UserError(f"workers die while they start: {_last_line(error)}") from error
        jobs = [job for _, job in slot.calls]
        self._drop(slot)
        self.refill(fresh=slot.up)
        return Event(jobs[0] if jobs else None, None, jobs[1:], _last_line(error))

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

    def abandon(self) -> None:
        """End the workers that are busy: nobody waits for their reports."""
        for slot in [slot for slot in self._slots if slot.calls]:
            self._drop(slot)

    def close(self, *, park: bool = False) -> None:
        """End all workers; `park` keeps the idle ones for the next pool of this process."""
        for slot in list(self._slots):
            if park and slot.up and not slot.calls:
                self._slots.remove(slot)
                self._parked.append(slot.actor)
            else:
                self._drop(slot)
        if park:
            _parking[_place(self._wanted)] = self._parked

    def _start(self, *, fresh: bool) -> None:
        parked = not fresh and bool(self._parked)
        actor = self._parked.pop() if parked else _new_worker(self._wanted)
        self._slots.append(Slot(actor, actor.equip.remote(self._setup), fresh, parked))

    def _drop(self, slot: Slot[Job]) -> None:
        self._slots.remove(slot)
        ray.kill(slot.actor, no_restart=True)


#: idle workers of earlier pools of this process, by what they take up
_parking: dict[tuple[Any, ...], list[Any]] = {}


def _place(wanted: dict[str, float]) -> tuple[Any, ...]:
    return (cluster.here(), *sorted(wanted.items()))


def _take_parked(wanted: dict[str, float]) -> list[Any]:
    """Idle workers of the wanted kind; the others are ended, for they take up room."""
    found = _parking.pop(_place(wanted), [])
    for place, actors in _parking.items():
        if place[0] == cluster.here():  # else they belong to a Ray that was shut down
            for actor in actors:
                ray.kill(actor, no_restart=True)
    _parking.clear()
    return found


def _new_worker(wanted: dict[str, float]) -> Any:
    kind: Any = ray.remote(Worker)
    return kind.options(max_restarts=0, max_task_retries=0, **wanted).remote()


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
