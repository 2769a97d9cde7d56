"""A worker: one process that keeps the client app and answers blocks of messages.

It holds no state of clients: what a client keeps comes with its block and goes back with the result, so a
worker can be replaced at any moment and its block replayed.
"""

from __future__ import annotations

import gc
import os
import pickle
import resource
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import ray.cloudpickle
from flwr.app import Message, RecordDict

from fedsim import _flwr
from fedsim.engine import objects
from fedsim.engine.answering import answer, is_empty
from fedsim.engine.folding import Fold, Folder, Left
from fedsim.engine.line import Door, HungUp
from fedsim.engine.output import Capture
from fedsim.engine.process import keep_freed_memory
from fedsim.engine.sheet import Views
from fedsim.engine.surroundings import Surroundings
from fedsim.seeding import seed_everything, use_threads
from fedsim.sums import WeightedSum


@dataclass(frozen=True)
class Setup:
    """What every worker is started with.

    Args:
        app: the client app, pickled by value where it cannot be imported.
        num_clients: number of nodes.
        run_config: what clients find in `context.run_config`.
        surroundings: the driver's.
        threads: torch threads.
        timeout: seconds after which a client counts as hanging.
        memory: GiB that a client may allocate beyond what the idle worker has, or None.
        hide_gpus: the worker has no share of any GPU.
        torch: import torch before the first client.
    """

    app: bytes
    num_clients: int
    run_config: dict[str, Any]
    surroundings: Surroundings
    threads: int
    timeout: float
    memory: float | None
    hide_gpus: bool
    torch: bool


class Item(NamedTuple):
    """One instruction of a block."""

    position: int
    client: int
    seed: int
    content: int  #: number of its template
    metadata: tuple[Any, ...]


@dataclass(frozen=True)
class Order:
    """One call: the instructions of a block, with what the worker needs and does not have yet.

    Attributes:
        send: number of the send that it belongs to; a worker forgets what earlier ones brought.
        items: the instructions.
        templates: contents that this worker has not seen in this send.
        parcels: that it has not got in this send.
        apart: numbers of more of them, which come beside the order.
        passing: numbers of those that it need not keep for the next order of this send.
        states: of the clients that have any.
        fold: how to sum the replies, or None.
        timeout: seconds that each client has, or None.
    """

    send: int
    items: Sequence[Item]
    templates: Mapping[int, objects.Template]
    parcels: Mapping[int, objects.Parcel]
    apart: Sequence[int]
    passing: Set[int]
    states: Mapping[int, RecordDict]
    fold: Fold | None
    timeout: float | None


@dataclass
class Report:
    """What a call gives back."""

    replies: list[tuple[int, Message]] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)  #: of a folded block
    late: list[int] = field(default_factory=list)  #: positions of clients that took too long
    total: WeightedSum | None = None
    states: dict[int, RecordDict] = field(default_factory=dict)  #: of clients that had or have any
    printed: list[tuple[int, list[str]]] = field(default_factory=list)  #: by clients that printed anything


@dataclass(frozen=True)
class Failed:
    """What comes back over a line where a call went wrong, not a client."""

    error: str


class Worker:
    """The body of the Ray actor.

    Args:
        output: where its process prints to, as `Capture` takes it.
    """

    def __init__(self, output: Sequence[str] = ()) -> None:
        self._output = Capture(output)
        self._surroundings: Surroundings | None = None
        self._born = time.time()
        self._send = -1
        self._templates: dict[int, objects.Template] = {}
        self._parcels: dict[int, objects.Parcel] = {}
        self._door: Door | None = None

    def equip(self, setup: Setup, *, near: bool) -> str | None:
        """Get ready for a simulation, the first one or a later one.

        Args:
            setup: of the simulation.
            near: there is to be a line to the driver.

        Returns:
            Of `listen`; None without a line.

        Raises:
            RuntimeError: a module that this process imported has been edited since, or importing the app
                would end the process.
        """
        if edited := _edited_since(self._born):
            raise RuntimeError(f"{edited} was edited")
        setup.surroundings.adopt(self._surroundings)
        self._surroundings = setup.surroundings
        if setup.hide_gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        self.setup = setup
        if setup.torch:
            import torch

            torch.set_num_threads(setup.threads)
        try:
            self.app = ray.cloudpickle.loads(setup.app)
        except SystemExit as error:  # Ray would take it for an orderly end, and nobody would learn why
            raise RuntimeError(f"a module of the app calls sys.exit({error.code}) at import") from error
        if setup.memory is None:
            keep_freed_memory()
        if gc.get_freeze_count():  # of an earlier simulation, whose app can go now
            gc.unfreeze()
            gc.collect()
        gc.freeze()
        return self.listen() if near else None

    def listen(self) -> str:
        """Put up a door for a line to the driver; its path."""
        if self._door is not None:
            self._door.close()
        self._door = Door()
        return self._door.path

    def serve(self) -> None:
        """Answer what comes through the door until the driver hangs up."""
        if self._door is None:
            return
        for line, message, sheets in self._door.orders():
            packed = self._served(message, sheets)
            del message, sheets  # which go back with the report
            with suppress(HungUp):
                line.send(packed)
            del packed

    def _served(self, message: Views, sheets: Sequence[Views]) -> objects.Packed:
        """The report on an order that came over a line."""
        head, buffers = message
        try:
            order: Order = pickle.loads(head, buffers=[buffer.toreadonly() for buffer in buffers])
            report: Report | Failed = self._run(order, [objects.unpack(sheet) for sheet in sheets])
        except Exception:
            signal.setitimer(signal.ITIMER_REAL, 0)  # nobody hangs: the order could not be read
            report = Failed(traceback.format_exc())
        return objects.pack(report)

    def run(self, packed: bytes, *parcels: objects.Parcel) -> objects.Packed:
        """Answer the messages of a block, one after the other: a packed Order in, a packed Report out."""
        return objects.pack(self._run(pickle.loads(packed), parcels))

    def _run(self, order: Order, parcels: Sequence[objects.Parcel]) -> Report:
        contents = self._contents(order, parcels)
        report = Report()
        self._output.taken()  # what the start printed, the driver printed itself when it imported the app
        folder = None if order.fold is None else Folder(order.fold, start=order.items[0].position)
        with _flwr.lazy_codec():  # once for all of them
            for item in order.items:
                message = _flwr.message_of(item.metadata, contents[item.content])
                state = order.states.get(item.client)
                reply, after = self._answer(item, message, state, order.timeout)
                if printed := self._output.taken():
                    report.printed.append((item.client, printed))
                if state is not None or not is_empty(after):
                    report.states[item.client] = after
                if reply is None:
                    report.late.append(item.position)
                elif folder is not None:
                    report.left.append(folder.add(item.position, reply))
                else:
                    report.replies.append((item.position, reply))
        signal.setitimer(signal.ITIMER_REAL, 0)
        if folder is not None:
            report.total = folder.tree.total()
        return report

    def _contents(self, order: Order, apart: Sequence[objects.Parcel]) -> dict[int, RecordDict]:
        if order.send != self._send:
            self._send, self._templates, self._parcels = order.send, {}, {}
        self._templates.update(order.templates)
        there = {**self._parcels, **order.parcels, **dict(zip(order.apart, apart, strict=True))}
        self._parcels = {number: there[number] for number in there.keys() - order.passing}
        numbers = {item.content for item in order.items}
        return {number: objects.assemble(self._templates[number], there) for number in numbers}

    def _answer(
        self, item: Item, message: Message, state: RecordDict | None, timeout: float | None
    ) -> tuple[Message | None, RecordDict]:
        setup = self.setup
        # a client that hangs ends this process, even where it holds the GIL: the signal has no handler
        signal.setitimer(signal.ITIMER_REAL, setup.timeout)
        use_threads(setup.threads)
        seed_everything(item.seed)
        with limited(setup.memory):
            return answer(self.app, message, item.client, setup.num_clients, state, setup.run_config, timeout)


@contextmanager
def limited(memory: float | None) -> Iterator[None]:
    """Let this process allocate at most `memory` GiB more (private memory: shared arrays do not count)."""
    if memory is None:
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (_private_bytes() + int(memory * 2**30), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _private_bytes() -> int:
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmData:"):
                return int(line.split()[1]) * 1024
    return 0


def _edited_since(moment: float) -> str | None:
    """A module of this process, other than installed ones, whose file is newer than a moment."""
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if not file or file.startswith((sys.prefix, sys.base_prefix)):
            continue
        with suppress(OSError):
            if os.stat(file).st_mtime > moment:
                return str(file)
    return None
