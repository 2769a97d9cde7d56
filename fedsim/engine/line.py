"""A line of the driver's own to a worker on the same machine: orders and reports go over it without Ray.

    start:  how many sheets come along, how many bytes follow (0: the message is the last sheet), int64
    bytes:  a message as `sheet.laid_out` has it

A Ray call takes milliseconds of two busy cores, a line a tenth of one. A large message, and what several
workers are to have, is a sheet: shared memory, written once and mapped by whoever gets its descriptor. Ray
starts the workers and ends them. Linux only (`POSSIBLE`): sockets there have names that are no files, and say
who is at the other end. Who hangs up, or dies, is noticed at once, and sheets end with who holds them.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
import threading
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing import connection
from queue import SimpleQueue

import numpy as np

from fedsim.engine.objects import Packed
from fedsim.engine.sheet import Sheet, Views, laid_out, taken_apart, write

POSSIBLE = sys.platform == "linux"
MOST = 64  #: sheets that may come along with a message; the system takes 253
_CREDENTIALS = struct.Struct("3i")  #: process, user, group
_START = struct.Struct("2q")  #: sheets, bytes
_LARGE = 2**20  #: bytes of a message that is a sheet


class HungUp(OSError):
    """The other end is gone."""


class Line:
    """One end.

    Args:
        end: a connected socket.
    """

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    @classmethod
    def to(cls, door: str) -> Line:
        """The line to who listens behind a door.

        Raises:
            OSError: nobody does.
        """
        end = socket.socket(socket.AF_UNIX)
        try:
            end.connect(door)
        except OSError:
            end.close()
            raise
        return cls(end)

    def fileno(self) -> int:
        """For `wait`."""
        return self._end.fileno()

    def close(self) -> None:
        """Hang up."""
        self._end.close()

    def send(self, packed: Packed, sheets: Sequence[Sheet] = ()) -> None:
        """Send a pickle and its buffers, and at most MOST sheets; returns when the system has them.

        Raises:
            HungUp: nobody takes them.
        """
        pieces = laid_out(packed)
        size = sum(piece.nbytes for piece in pieces)
        if size < _LARGE:
            self._send([memoryview(_START.pack(len(sheets), size)), *pieces], sheets)
            return
        with Sheet.holding(pieces) as own:
            self._send([memoryview(_START.pack(len(sheets) + 1, 0))], [*sheets, own])

    def _send(self, pieces: list[memoryview], sheets: Sequence[Sheet]) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [one.fileno() for one in sheets]))]

        def some(buffers: list[memoryview]) -> int:
            sent = self._end.sendmsg(buffers, rights if sheets else ())
            rights.clear()  # they go with the first byte
            return sent

        try:
            write(pieces, some)
        except OSError as error:
            raise HungUp(str(error)) from error

    def receive(self) -> tuple[Views, list[Sheet]]:
        """What the other end sends next: a pickle and its buffers, which may be written to, and the sheets.

        Raises:
            HungUp: nothing comes any more.
        """
        start, sheets = self._beginning()
        count, size = _START.unpack(start)
        if count != len(sheets):
            raise HungUp(f"{len(sheets)} of {count} sheets came: too many open files?")
        if size:
            return taken_apart(self._exactly(size)), sheets
        with sheets.pop() as own:
            try:
                return own.read(), sheets
            except OSError as error:
                raise HungUp(f"{error}: too many open files, or no memory?") from error

    def _beginning(self) -> tuple[bytes, list[Sheet]]:
        try:
            found, numbers, _, _ = socket.recv_fds(self._end, _START.size, MOST + 1)
        except OSError as error:
            raise HungUp(str(error)) from error
        sheets = [Sheet(number) for number in numbers]
        if not found:
            raise HungUp("the other end hung up")
        return found + bytes(self._exactly(_START.size - len(found))), sheets

    def _exactly(self, size: int) -> memoryview:
        found = np.empty(size, np.uint8).data
        at = 0
        while at < size:
            try:
                got = self._end.recv_into(found[at:])
            except OSError as error:
                raise HungUp(str(error)) from error
            if not got:
                raise HungUp("the other end hung up")
            at += got
        return found


def wait(lines: Sequence[Line], bell: Bell, timeout: float | None) -> tuple[list[Line], bool]:
    """Wait for something to happen.

    Returns:
        Lines on which something comes or whose other end is gone; whether the bell rang, which is silenced.
    """
    ends = {one.fileno(): one for one in lines}
    ready = connection.wait([*ends, bell.fileno()], timeout)
    rang = bell.fileno() in ready
    if rang:
        bell.silence()
    return [one for fileno, one in ends.items() if fileno in ready], rang


class Bell:
    """Wakes `wait` from another thread."""

    def __init__(self) -> None:
        self._here, self._there = socket.socketpair()

    def fileno(self) -> int:
        """For `wait`."""
        return self._here.fileno()

    def ring(self, _: object = None) -> None:
        """Wake who waits; also after `close`."""
        with suppress(OSError):
            self._there.send(b"!")

    def silence(self) -> None:
        """Until it rings again."""
        self._here.recv(4096)

    def close(self) -> None:
        """No more ringing."""
        self._here.close()
        self._there.close()


class Door:
    """Where a worker awaits its driver."""

    def __init__(self) -> None:
        # a name without a file: nothing is left behind, whoever dies
        self.path = f"\0fedsim-{os.getpid()}-{os.urandom(8).hex()}"
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(self.path)
        self._listening.listen()

    def orders(self) -> Iterator[tuple[Line, Views, list[Sheet]]]:
        """What comes over the line, with the line to answer on, until the driver hangs up.

        A thread takes orders off the line while the caller works, so that neither end ever waits for the
        other to read.
        """
        line = self._opened()
        waiting: SimpleQueue[tuple[Views, list[Sheet]] | None] = SimpleQueue()

        def read() -> None:
            try:
                while True:
                    waiting.put(line.receive())
            except HungUp:
                waiting.put(None)

        threading.Thread(target=read, name="orders", daemon=True).start()
        while (order := waiting.get()) is not None:
            yield line, *order
        line.close()

    def _opened(self) -> Line:
        """The line to the first of this user's processes that comes."""
        while True:
            end, _ = self._listening.accept()
            _, user, _ = _CREDENTIALS.unpack(
                end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            )
            if user == os.getuid():
                self.close()
                return Line(end)
            end.close()

    def close(self) -> None:
        """Take it away."""
        self._listening.close()
