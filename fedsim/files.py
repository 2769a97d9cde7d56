"""Reading text that people wrote; writing files and folders so that nobody ever sees half of one."""

from __future__ import annotations

import codecs
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedsim.errors import UserError

_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
PICTURES = (".png", ".pdf", ".svg")  #: what matplotlib draws, by the end of the file's name


def text_of(path: Path) -> str:
    """The text of a UTF-8 file; a byte order mark, which some editors write, is left out.

    Raises:
        FileNotFoundError: there is none.
        UserError: it cannot be read, or is in another encoding.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        found = "UTF-16" if data.startswith(_UTF_16) else f"byte 0x{data[error.start]:02x} in line {line}"
        raise UserError(f"{path}: not UTF-8 text ({found}); save it as UTF-8") from error


def place_for(path: Path, option: str) -> Path:
    """A file or folder that is to be written, its parents made: asked before the work, not after it.

    Args:
        path: the place.
        option: that named it, for the error message.

    Raises:
        UserError: it cannot be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option} {path}: cannot make its folder ({error.strerror})") from error
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"{option} {path}: may not be written; name another place")
    return path


def place_for_picture(file: Path, option: str) -> Path:
    """As `place_for`, for a file whose name says which kind of picture it is."""
    if file.suffix.lower() not in PICTURES:
        raise UserError(f"{option} {file}: the name must end in {', '.join(PICTURES[:-1])} or {PICTURES[-1]}")
    if file.is_dir():
        raise UserError(f"{option} {file}: is a folder; name a file")
    return place_for(file, option)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file: whole or not there."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """An empty temporary file beside `path`, to be filled; then it is flushed to disk and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside `path` to write into; when all is well it becomes `path`, else it vanishes.

    A folder that `path` was before is replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    made = scratch / "made"
    made.mkdir()
    try:
        yield made
        if path.exists():
            path.rename(scratch / "replaced")
        made.rename(path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
