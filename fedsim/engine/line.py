"""A line of the driver's own to a worker on the same machine: orders and reports go over it without Ray.

    head:   lengths of what follows, int64          (count first)
    parts:  a pickle, then the buffers that it leaves out, each at a multiple of 64 bytes

A Ray call takes milliseconds of two busy cores, a line a tenth of one. Ray starts the workers, ends them and
carries what is worth shared memory. Linux only (`POSSIBLE`): sockets there have names that are no files, and
say who is at the other end. Who hangs up, or dies, is noticed at once.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing import connection
from queue import SimpleQueue

import numpy as np

from fedsim.engine.objects import Packed

POSSIBLE = sys.platform == "linux"
_CREDENTIALS = struct.Struct("3i")  #: process, user, group
_ALIGNED = 64
_PARTS = 512  #: of one call of the system, which takes 1,024


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

    def send(self, packed: Packed) -> None:
        """Send a pickle and its buffers; returns when the system has them.

        Raises:
            HungUp: nobody takes them.
        """
        head, buffers = packed
        parts = [memoryview(head), *(buffer.raw() for buffer in buffers)]
        sizes = np.array([len(parts), *(part.nbytes for part in parts)], np.int64)
        left = [sizes.data.cast("B")]
        for part in parts:
            left += [part, memoryview(bytes(-part.nbytes % _ALIGNED))]
        left = [part for part in left if part.nbytes]
        try:
            while left:
                sent = self._end.sendmsg(left[:_PARTS])
                gone = 0
                while gone < len(left) and sent >= left[gone].nbytes:
                    sent -= left[gone].nbytes
                    gone += 1
                left = left[gone:]
                if sent:
                    left[0] = left[0][sent:]
        except OSError as error:
            raise HungUp(str(error)) from error

    def receive(self) -> tuple[memoryview, list[memoryview]]:
        """What the other end sends next: a pickle and its buffers, which may be written to.

        Raises:
            HungUp: nothing comes any more.
        """
        (count,) = self._exactly(8).cast("q")
        sizes = self._exactly(8 * count).cast("q").tolist()
        room = [size + -size % _ALIGNED for size in sizes]
        whole = self._exactly(sum(room))
        starts = np.concatenate([[0], np.cumsum(room)]).tolist()
        head, *buffers = (whole[at : at + size] for at, size in zip(starts, sizes, strict=False))
        return head, buffers

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

    def orders(self) -> Iterator[tuple[Line, tuple[memoryview, list[memoryview]]]]:
        """What comes over the line, with the line to answer on, until the driver hangs up.

        A thread takes orders off the line while the caller works, so that neither end ever waits for the
        other to read.
        """
        line = self._opened()
        waiting: SimpleQueue[tuple[memoryview, list[memoryview]] | None] = SimpleQueue()

        def read() -> None:
            with suppress(HungUp):
                while True:
                    waiting.put(line.receive())
            waiting.put(None)

        threading.Thread(target=read, name="orders", daemon=True).start()
        while (order := waiting.get()) is not None:
            yield line, order
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
