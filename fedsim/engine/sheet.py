"""Shared memory of the processes of one machine: written once, mapped by whoever has its descriptor.

    head:   lengths of the parts, int64          (their number first)
    parts:  a pickle, then the buffers that it leaves out, each at a multiple of 64 bytes

A sheet is a file without a name (`memfd`): nothing is left behind, whoever dies, and the size of /dev/shm,
64 MB in a container, is no limit.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from weakref import WeakSet

import numpy as np

from fedsim.engine.objects import Packed

#: a pickle and its buffers
Views = tuple[memoryview, list[memoryview]]

_ALIGNED = 64
_PIECES = 512  #: of one call of the system, which takes 1,024
_MAPPED = 256  #: sheets that a process has mapped at a time, for each is an open file; more are copied
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


def write(pieces: Sequence[memoryview], some: Callable[[list[memoryview]], int]) -> None:
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


class Sheet:
    """One of them.

    Args:
        fileno: its descriptor, which is closed with the sheet; what is mapped stays.
    """

    def __init__(self, fileno: int) -> None:
        self._fileno = fileno

    @classmethod
    def of(cls, packed: Packed) -> Sheet:
        """A pickle and its buffers.

        Raises:
            OSError: there is no memory for them.
        """
        return cls.holding(laid_out(packed))

    @classmethod
    def holding(cls, pieces: Sequence[memoryview]) -> Sheet:
        """The same, laid out already."""
        sheet = cls(os.memfd_create("fedsim"))
        try:
            write(pieces, lambda some: os.writev(sheet.fileno(), some))
        except OSError:
            sheet.close()
            raise
        return sheet

    def fileno(self) -> int:
        """Its descriptor."""
        return self._fileno

    def read(self, *, shared: bool = False) -> Views:
        """The pickle and its buffers.

        Args:
            shared: others read it, too: the buffers cannot be written to.
        """
        size = os.fstat(self._fileno).st_size
        if len(_maps) < _MAPPED:
            access = mmap.PROT_READ if shared else mmap.PROT_READ | mmap.PROT_WRITE
            found = mmap.mmap(self._fileno, size, mmap.MAP_SHARED | mmap.MAP_POPULATE, access)
            _maps.add(found)
            return taken_apart(memoryview(found))
        copied = np.empty(size, np.uint8).data
        at = 0
        while at < size:
            at += os.preadv(self._fileno, [copied[at:]], at)
        return taken_apart(copied.toreadonly() if shared else copied)

    def close(self) -> None:
        """Give the descriptor up."""
        with suppress(OSError):
            os.close(self._fileno)

    def __enter__(self) -> Sheet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
