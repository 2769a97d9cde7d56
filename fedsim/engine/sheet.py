"""Shared memory of the processes of one machine: written by one, mapped by whoever has its descriptor.

    head:   lengths of the parts, int64          (their number first)
    parts:  a pickle, then the buffers that it leaves out, each at a multiple of 64 bytes

A sheet is a file without a name (`memfd`): nothing is left behind, whoever dies, and the size of /dev/shm,
64 MB in a container, is no limit. Its pages are used over and over, for fresh ones cost more than what is
written to them: a sheet is written again when all who read it have given it back. (Forked children of a
reader are not asked: they must not outlive what it read.)
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from itertools import count
from weakref import WeakSet

import numpy as np

from fedsim.engine.objects import Packed

#: a pickle and its buffers
Views = tuple[memoryview, list[memoryview]]

_ALIGNED = 64
_MAPPED = 256  #: sheets that a process has mapped at a time, for each is an open file; more are copied
_KEPT = 64  #: sheets of a stock that may be used again
_LARGEST = 2**27  #: bytes of a sheet that may be
_numbers = count()
_maps: WeakSet[mmap.mmap] = WeakSet()


def laid_out(packed: Packed) -> list[memoryview]:
    """The bytes of a pickle and its buffers, in pieces of which none is empty."""
    head, buffers = packed
    parts = [memoryview(head), *(buffer.raw() for buffer in buffers)]
    sizes = np.array([len(parts), *(part.nbytes for part in parts)], np.int64).data.cast("B")
    pieces = []
    for part in (sizes, *parts):
        pieces += [part, memoryview(bytes(-part.nbytes % _ALIGNED))]
    return [piece for piece in pieces if piece.nbytes]


def taken_apart(whole: memoryview) -> Views:
    """The pickle and the buffers again, as views."""
    [count] = whole[:8].cast("q")
    sizes = whole[: 8 * (count + 1)].cast("q").tolist()
    sizes[0] = 8 * (count + 1)
    starts = np.cumsum([0, *(size + -size % _ALIGNED for size in sizes)]).tolist()
    _, head, *buffers = (whole[at : at + size] for at, size in zip(starts, sizes, strict=False))
    return head, buffers


class Sheet:
    """One of them, on the side that writes.

    Args:
        size: bytes.
        again: it may be written again.

    Attributes:
        number: its own in this process.

    Raises:
        OSError: there is no memory for it.
    """

    def __init__(self, size: int, *, again: bool) -> None:
        self.number = next(_numbers)
        self.size = size
        self._again = again
        self._users = 1
        self._fileno = os.memfd_create("fedsim")
        try:
            os.posix_fallocate(self._fileno, 0, size)  # no memory is an error here, not a signal later
            self._bytes = mmap.mmap(self._fileno, size, mmap.MAP_SHARED | mmap.MAP_POPULATE)
        except OSError:
            os.close(self._fileno)
            raise

    def fileno(self) -> int:
        """Its descriptor."""
        return self._fileno

    def write(self, pieces: Sequence[memoryview]) -> None:
        """Put pieces down from the beginning."""
        at = 0
        with memoryview(self._bytes) as there:
            for piece in pieces:
                there[at : at + piece.nbytes] = piece
                at += piece.nbytes

    @property
    def free(self) -> bool:
        """Nobody uses it, and it may be written again."""
        return self._users == 0 and self._again

    @property
    def closed(self) -> bool:
        """It is gone for whoever wrote it."""
        return self._bytes.closed

    def share(self) -> None:
        """One more uses it."""
        self._users += 1

    def give_back(self, *, stale: bool = False) -> None:
        """One less uses it.

        Args:
            stale: somebody may go on reading what is there now: it is not written again.
        """
        self._users -= 1
        self._again = self._again and not stale
        if self._users == 0 and not self._again:
            self.close()

    def close(self) -> None:
        """Give it up; who has mapped it still has it."""
        if not self.closed:
            self._bytes.close()
            os.close(self._fileno)


class Stock:
    """The sheets of one writer: as many as were in use at a time, each as large as was needed."""

    def __init__(self) -> None:
        self._sheets: list[Sheet] = []

    def written(self, pieces: Sequence[memoryview]) -> Sheet:
        """A sheet with these pieces, which the caller gives back.

        Raises:
            OSError: there is no memory for it.
        """
        sheet = self._taken(sum(piece.nbytes for piece in pieces))
        sheet.write(pieces)
        return sheet

    def _taken(self, size: int) -> Sheet:
        self._sheets = [sheet for sheet in self._sheets if not sheet.closed]
        free = sorted((sheet for sheet in self._sheets if sheet.free), key=lambda sheet: sheet.size)
        for sheet in free:
            if sheet.size >= size:
                sheet.share()
                return sheet
        if free:
            free[-1].close()
            self._sheets.remove(free[-1])
        sheet = Sheet(size, again=len(self._sheets) < _KEPT and size <= _LARGEST)
        self._sheets.append(sheet)
        return sheet

    def close(self) -> None:
        """Give all of them up."""
        for sheet in self._sheets:
            sheet.close()
        self._sheets = []


def mapped(fileno: int, *, writable: bool) -> mmap.mmap | None:
    """The memory behind a descriptor, or None where too much is mapped already.

    Raises:
        OSError: there are too many open files.
    """
    if len(_maps) >= _MAPPED:
        return None
    access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    found = mmap.mmap(fileno, os.fstat(fileno).st_size, mmap.MAP_SHARED | mmap.MAP_POPULATE, access)
    _maps.add(found)
    return found


def copied(fileno: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """The bytes behind a descriptor."""
    found = np.empty(os.fstat(fileno).st_size, np.uint8)
    at = 0
    while at < len(found):
        at += os.preadv(fileno, [found[at:].data], at)
    return found
