"""Where a relative path of an experiment is: in the experiment's folder, or else in the current one.

The text in the experiment stays as it was written, because it travels: a real node looks it up anew, in
the same folders (if they exist there) and in its own current one.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from fedsim.errors import UserError


def candidates(path: str, folders: Iterable[Path]) -> list[Path]:
    """What `path` may mean, first choice first (`~` is the home folder; an absolute path is itself).

    Args:
        path: as written.
        folders: first match wins; the current folder when empty.
    """
    return list(dict.fromkeys(folder / Path(path).expanduser() for folder in [*folders] or [Path.cwd()]))


def find(path: str, folders: Iterable[Path], key: str) -> Path:
    """The first candidate that exists, absolute.

    Args:
        path: as written.
        folders: see `candidates`.
        key: of the experiment file that gave it, for the error message.

    Raises:
        UserError: there is none; says where it was looked for.
    """
    places = candidates(path, folders)
    for place in places:
        if place.exists():
            return place.resolve()
    raise UserError(f"{key}: there is no '{path}' (looked for {listed(places)})")


def listed(places: Iterable[Path]) -> str:
    """Paths for an error message."""
    return ", ".join(map(str, places))
