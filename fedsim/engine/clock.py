"""How long one client may take, measured from when it begins: nobody uses up the time of others."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class TimedOut(BaseException):
    """A client's time is over. Not an Exception, so that a client's own handlers let it pass."""


@contextmanager
def limited_time(seconds: float | None) -> Iterator[None]:
    """Raise TimedOut when the body takes longer.

    In the main thread an alarm interrupts the body, unless an earlier one is set already. Elsewhere, and
    where code outside Python does not return, the time is only looked at in the end.
    """
    if seconds is None:
        yield
        return
    end = time.monotonic() + seconds
    with _alarm(seconds):
        yield
    if time.monotonic() > end:
        raise TimedOut


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    left, interval = signal.getitimer(signal.ITIMER_REAL)
    if 0 < left <= seconds:
        yield
        return
    started = time.monotonic()
    handler = signal.signal(signal.SIGALRM, _ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        try:
            signal.setitimer(signal.ITIMER_REAL, 0)
        finally:  # also where the alarm rings just now
            signal.signal(signal.SIGALRM, handler)
            if left:
                rest = max(left - (time.monotonic() - started), 1e-3)
                signal.setitimer(signal.ITIMER_REAL, rest, interval)


def _ring(*_: Any) -> None:
    raise TimedOut
