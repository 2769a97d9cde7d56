"""What worker processes print: it is caught at their file descriptors, so it holds what libraries written in
C, child processes and a crashing interpreter print, too.

    worker   print, logging ──> descriptors 1 and 2 ──> two files ── after each client ──> its report
    driver   report ──> "client 3: ..." on its own stdout and stderr;  a worker died ──> what the files hold
"""

from __future__ import annotations

import io
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress

_MOST = 2**16  #: bytes of one stream that one client may print while it answers one message; the last ones
_LINES, _WIDTH = 5, 400  #: of what a dead worker printed last
_NAME = "fedsim-output"
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_STREAMS = (1, 2)  #: descriptors of stdout and stderr


class Output:
    """The driver's end: files in memory that a worker of this machine prints to."""

    def __init__(self) -> None:
        self._files = [os.memfd_create(_NAME) for _ in _STREAMS]

    @property
    def paths(self) -> list[str]:
        """Where the worker finds them."""
        return [f"/proc/{os.getpid()}/fd/{file}" for file in self._files]

    def last(self) -> str:
        """The last lines that a dead worker printed and did not hand over, as one line (or "")."""
        text = _COLOURS.sub("", "\n".join(_read(file) for file in self._files))
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return " | ".join(lines[-_LINES:])[-_WIDTH:]

    def close(self) -> None:
        """Free the memory, once the worker is gone as well."""
        for file in self._files:
            os.close(file)
        self._files = []


class Capture:
    """The worker's end: from now on this process prints to files.

    Args:
        paths: of the files for stdout and for stderr; "" for a temporary one. Without any it prints as ever.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self._streams = _STREAMS[: len(paths)]
        for stream, path in zip(self._streams, paths, strict=True):
            file = _opened(path)
            os.dup2(file, stream)
            os.close(file)
        # line by line, prints stay in order with those of child processes, and a crash loses none
        for text in (sys.stdout, sys.stderr):
            if isinstance(text, io.TextIOWrapper):
                text.reconfigure(line_buffering=True)

    def taken(self) -> list[str]:
        """What was printed since the last time, on stdout and on stderr; empty if nothing was."""
        for stream in (sys.stdout, sys.stderr):
            # a client may have closed it, or put something else there
            with suppress(AttributeError, OSError, ValueError):
                stream.flush()
        sizes = [os.fstat(stream).st_size for stream in self._streams]
        if not any(sizes):
            return []
        found = [_read(stream) for stream in self._streams]
        for stream in self._streams:
            os.ftruncate(stream, 0)
        return found


def pass_on(client: int, printed: Sequence[str]) -> None:
    """Print on stdout and stderr what a client printed in its worker, with its number before each line.

    Args:
        client: partition id.
        printed: of `Capture.taken`.
    """
    for text, stream in zip(printed, (sys.stdout, sys.stderr), strict=False):
        # of a progress bar, which returns to the start of its line, the last state is shown
        lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.rstrip("\n").split("\n")]
        if text and stream is not None:
            said = "".join(f"client {client}: {line}\n" for line in lines)
            encoding = getattr(stream, "encoding", None) or "utf-8"  # which may lack what a client printed
            stream.write(said.encode(encoding, "replace").decode(encoding))
            stream.flush()


def _opened(path: str) -> int:
    if path:
        with suppress(
            OSError
        ):  # /proc is hidden: the driver will not see what this worker prints when it dies
            file = os.open(path, os.O_RDWR | os.O_APPEND)
            if _NAME in os.readlink(f"/proc/self/fd/{file}"):
                return file
            os.close(file)  # the driver has given up this worker, and has another file under the number
    with tempfile.TemporaryFile("ab+") as temporary:
        return os.dup(temporary.fileno())


def _read(file: int) -> str:
    """The last bytes of a file, with a line on what is left out."""
    size = os.fstat(file).st_size
    left_out = max(0, size - _MOST)
    text = os.pread(file, _MOST, left_out).decode("utf-8", "replace")
    return f"[{left_out:,} bytes left out]\n{text}" if left_out else text
