"""What a process that runs rounds does with its memory: the driver while a simulation runs, a worker always.

* Freed memory is kept: fresh pages cost more than most sums that are put into them.
* Collections of garbage pass over what was there before: once torch and Ray are imported, a full one takes
  as long as a round.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_KEPT = 2**29  #: bytes
_LARGEST = 2**25  #: bytes of an allocation that may come from kept memory; glibc takes no more
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


@contextmanager
def for_rounds() -> Iterator[None]:
    """Both inside; afterwards it is nearly as before: glibc no longer finds its thresholds by itself."""
    keep_freed_memory()
    thaw = not gc.get_freeze_count()  # or else somebody froze what he may want to thaw himself
    if thaw:
        gc.freeze()
    try:
        yield
    finally:
        if thaw:
            gc.unfreeze()
        _set_thresholds(2 * _LARGEST)  # where glibc's own end up where much is freed
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def keep_freed_memory() -> None:
    """Let the allocator give back only what is more than 512 MB."""
    _set_thresholds(_KEPT)


def _set_thresholds(kept: int) -> None:
    with suppress(OSError, AttributeError):  # another C library than glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _LARGEST)
        mallopt(_M_TRIM_THRESHOLD, kept)
