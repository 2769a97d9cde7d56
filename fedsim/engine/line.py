"""A line of the driver's own to a worker on the same machine: orders and reports go over it without Ray.

    start:  how many descriptors come along, how many bytes the note has and how many the message, int64
    note:   which sheets belong to the message, which are given back, and which to forget (or nothing)
    bytes:  a message as `sheet.laid_out` has it (none: it is in the last sheet)

A Ray call takes milliseconds of two busy cores, a line a tenth of one. A large message, and what several
workers are to have, is a sheet: shared memory that stays mapped at both ends and is used over and over. Ray
starts the workers and ends them. Linux only (`POSSIBLE`): sockets there have names that are no files, and say
who is at the other end. Who hangs up, or dies, is noticed at once, and sheets end with who holds them.
"""

from __future__ import annotations

import mmap
import os
import pickle
import socket
import struct
import sys
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing import connection
from typing import NamedTuple
from weakref import finalize

import numpy as np

from fedsim.engine.objects import Packed
from fedsim.engine.sheet import Sheet, Stock, Views, copied, laid_out, mapped, taken_apart

POSSIBLE = sys.platform == "linux"
MOST = 64  #: sheets that may come along with a message; the system takes 253
_CREDENTIALS = struct.Struct("3i")  #: process, user, group
_START = struct.Struct("3q")  #: descriptors, bytes of the note, bytes of the message
_LARGE = 2**16  #: bytes of a message that is a sheet; no smaller one has to wait for its reader
_PIECES = 512  #: of one call of the system, which takes 1,024


class HungUp(OSError):
    """The other end is gone."""


class Note(NamedTuple):
    """What a message says of sheets, by their numbers at who wrote them."""

    sheets: Sequence[int] = ()  #: that belong to it; those that the other end has not got come along
    back: Sequence[tuple[int, bool]] = ()  #: of the other end, which nobody reads any more; still mapped?
    gone: Sequence[int] = ()  #: that will not come again


class Line:
    """One end.

    Args:
        end: a connected socket.
    """

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._stock = Stock()
        self._there: dict[int, Sheet] = {}  #: ours that the other end has mapped
        self._lent: list[Sheet] = []  #: ours that it reads, as often as it got them
        self._mapped: dict[int, mmap.mmap] = {}  #: theirs
        self._back: deque[tuple[int, bool]] = deque()  #: theirs that nobody here reads any more

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
        """Hang up. What the other end reads stays as it is."""
        self._cut()
        self._end.close()
        for sheet in self._lent:
            sheet.give_back(stale=True)
        self._lent = []
        self._stock.close()
        self._mapped.clear()

    def send(self, packed: Packed, sheets: Sequence[Sheet] = ()) -> None:
        """Send a pickle and its buffers, and at most MOST different sheets; returns when the system has them.

        Raises:
            HungUp: nobody takes them.
            OSError: there is no memory for them.
        """
        pieces = laid_out(packed)
        if sum(piece.nbytes for piece in pieces) < _LARGE:
            self._send(pieces, sheets)
            return
        own = self._stock.written(pieces)
        try:
            self._send([], [*sheets, own])
        finally:
            own.give_back()

    def _send(self, pieces: list[memoryview], sheets: Sequence[Sheet]) -> None:
        gone = [number for number, sheet in self._there.items() if sheet.closed]
        for number in gone:
            del self._there[number]
        back = [self._back.popleft() for _ in range(len(self._back))]
        note = b""
        if sheets or back or gone:
            note = pickle.dumps(tuple(Note([sheet.number for sheet in sheets], back, gone)))
        new = {sheet.number: sheet for sheet in sheets if sheet.number not in self._there}
        for sheet in sheets:
            sheet.share()
        self._lent += sheets
        self._there |= new
        start = _START.pack(len(new), len(note), sum(piece.nbytes for piece in pieces))
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [one.fileno() for one in new.values()]))]

        def some(buffers: list[memoryview]) -> int:
            sent = self._end.sendmsg(buffers, rights if new else ())
            rights.clear()  # they go with the first byte
            return sent

        try:
            _write([memoryview(start + note), *pieces], some)
        except OSError as error:
            self._cut()  # what was half sent, or not at all, must not be waited for
            raise HungUp(str(error)) from error

    def _cut(self) -> None:
        """End the line for both ends, also where a forked child has a copy of the socket."""
        with suppress(OSError):
            self._end.shutdown(socket.SHUT_RDWR)

    def receive(self) -> tuple[Views, list[Views]]:
        """What the other end sends next: a pickle and its buffers, which may be written to, and the sheets.

        What is in sheets is given back when nobody refers to it any more.

        Raises:
            HungUp: nothing comes any more.
        """
        start, filenos = self._beginning()
        new = iter(filenos)
        try:
            count, length, size = _START.unpack(start)
            if count != len(filenos):
                raise HungUp(f"{len(filenos)} of {count} sheets came: too many open files?")
            note = Note(*pickle.loads(self._exactly(length))) if length else Note()
            for number in note.gone:
                self._mapped.pop(number, None)
            self._take_back(note.back)
            beside = note.sheets if size else note.sheets[:-1]
            sheets = [self._read(number, new, writable=False) for number in beside]
            if size:
                return taken_apart(self._exactly(size)), sheets
            return self._read(note.sheets[-1], new, writable=True), sheets
        except HungUp:
            raise
        except OSError as error:
            raise HungUp(f"{error}: too many open files, or no memory?") from error
        finally:
            for fileno in filenos:
                os.close(fileno)

    def _read(self, number: int, new: Iterator[int], *, writable: bool) -> Views:
        """What is in a sheet: the next of the new ones, or one that is mapped."""
        known = self._mapped.get(number)
        if known is None:
            fileno = next(new, None)
            if fileno is None:
                raise HungUp(f"sheet {number} is missing")
            known = mapped(fileno, writable=writable)
            if known is None:
                self._back.append((number, False))
                whole = copied(fileno)
                return taken_apart(whole.data if writable else whole.data.toreadonly())
            self._mapped[number] = known
        whole = np.frombuffer(known, np.uint8)  # which lives as long as any view of it
        finalize(whole, self._back.append, (number, True)).atexit = False
        return taken_apart(whole.data)

    def _take_back(self, numbers: Sequence[tuple[int, bool]]) -> None:
        for number, known in numbers:
            sheet = next(sheet for sheet in self._lent if sheet.number == number)
            self._lent.remove(sheet)
            sheet.give_back()
            if not known:
                self._there.pop(number, None)

    def _beginning(self) -> tuple[bytes, list[int]]:
        try:
            found, filenos, _, _ = socket.recv_fds(self._end, _START.size, MOST + 1)
        except OSError as error:
            raise HungUp(str(error)) from error
        if not found:
            raise HungUp("the other end hung up")
        return found + bytes(self._exactly(_START.size - len(found))), filenos

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


def _write(pieces: Sequence[memoryview], some: Callable[[list[memoryview]], int]) -> None:
    """Write all of the pieces.

    Args:
        pieces: none is empty.
        some: writes as much of some pieces as it can, and says how much that was.
    """
    left = list(pieces)
    while left:
        written = some(left[:_PIECES])
        gone = 0
        while gone < len(left) and written >= left[gone].nbytes:
            written -= left[gone].nbytes
            gone += 1
        left = left[gone:]
        if written:
            left[0] = left[0][written:]


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

    def orders(self) -> Iterator[tuple[Line, Views, list[Views]]]:
        """What comes over the line, with the line to answer on, until the driver hangs up."""
        line = self._opened()
        with suppress(HungUp):
            while True:
                yield line, *line.receive()
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
