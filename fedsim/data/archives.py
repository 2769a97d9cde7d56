"""NumPy archives from anywhere: opened and read with care, with errors that name file and key."""

from __future__ import annotations

import os
import pickle
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from fedsim.errors import UserError

Array = npt.NDArray[Any]

PARTS = ("train", "val", "test")
CLASS_NAMES = ("classes", "class_names", "label_names", "target_names")

#: words that people name inputs and labels by, in lower case
_WORDS = {
    "x": "x data images image imgs features feature inputs input samples signals windows",
    "y": "y labels label targets target",
}
_ROLES = {word: role for role, words in _WORDS.items() for word in words.split()}
_SPLITS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
_ROLE, _SPLIT = "|".join(_ROLES), "|".join(_SPLITS)
_KEY = re.compile(
    rf"(?P<role>{_ROLE})([_\-. ]?(?P<part>{_SPLIT}))?|(?P<first>{_SPLIT})[_\-. ]?(?P<second>{_ROLE})"
)

#: whatever numpy, Pillow and the readers of archives raise on files that are damaged
DAMAGE = (
    OSError, ValueError, EOFError, LookupError, TypeError, SyntaxError, RuntimeError, MemoryError,
    ArithmeticError, pickle.UnpicklingError, tarfile.TarError, zipfile.BadZipFile, zlib.error, struct.error,
)  # fmt: skip


@contextmanager
def opened(path: str) -> Iterator[Any]:
    """A NumPy archive (`np.lib.npyio.NpzFile`) that fits this machine's memory.

    Raises:
        UserError: there is no such file, it is no archive, damaged, or unpacks to more than half the memory.
    """
    try:
        if os.path.isdir(path):
            raise UserError(
                f'{path}: a folder, not an archive; images are [data] name = "imagefolder:{path}"'
            )
        if not os.path.getsize(path):
            raise UserError(f"{path}: not a readable .npz archive (it is empty); copy or download it again")
        archive = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"no file '{path}' (key 'path' of [data] name = \"npz:PATH\")") from None
    except DAMAGE as error:
        reason = _reason(error)
        hint = "copy or download it again"
        if "pickle" in reason:  # numpy takes whatever it does not know for a pickle
            reason, hint = "it is not in NumPy's format", "make it with np.savez"
        raise UserError(f"{path}: not a readable .npz archive ({reason}); {hint}") from error
    if not hasattr(archive, "files"):
        raise UserError(f"{path}: a single array, not an .npz archive; write it with np.savez")
    with archive:
        size = sum(member.file_size for member in archive.zip.infolist())
        if size > (limit := _memory() // 2):
            raise UserError(
                f"{path}: unpacks to {size / 1e9:,.1f} GB, more than half of this machine's memory "
                f"({limit / 1e9:,.1f} GB); store fewer or smaller samples"
            )
        yield archive


def _memory() -> int:
    """Bytes of this machine's memory; without limit where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 2**63


def entry(archive: Any, path: str, key: str) -> Array:
    """One array of an archive.

    Raises:
        UserError: it holds Python objects, or is damaged.
    """
    try:
        return np.asarray(archive[key])
    except DAMAGE as error:
        reason = _reason(error)
        if "pickle" in reason:
            raise UserError(
                f"{path}: key '{key}' cannot be read without pickle; store plain arrays"
            ) from error
        raise UserError(f"{path}: key '{key}' is damaged ({reason}); copy or download it again") from error


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def numbers(x: Array, path: str, key: str) -> Array:
    """Inputs as they are.

    Raises:
        UserError: they are no numbers [n, ...], or some are NaN, infinite or beyond float32.
    """
    if x.ndim < 2 or x.dtype.kind not in "uifb":
        raise UserError(f"{path}: '{key}' must be numbers [n, ...], not {x.dtype} {list(x.shape)}")
    reason = unfit(x)
    if reason:
        raise UserError(f"{path}: '{key}' {reason}; mend these samples, or leave them out")
    return x


def unfit(x: Array) -> str:
    """Which samples of inputs [n, ...] hold numbers that no model can take ("": none)."""
    if x.dtype.kind != "f":
        return ""
    found = []
    with np.errstate(over="ignore", invalid="ignore"):
        for what, bad in (
            ("NaN", np.isnan(x)),
            ("infinite numbers", np.isinf(x)),
            ("numbers beyond float32", np.isfinite(x) & (np.abs(x) > np.finfo(np.float32).max)),
        ):
            rows = np.flatnonzero(bad.any(axis=tuple(range(1, x.ndim))))
            if len(rows):
                found.append(f"{what} in {len(rows)} of {len(x)} samples (the first: sample {rows[0]})")
    return "has " + " and ".join(found) if found else ""


def keys_of(names: Sequence[str], path: str) -> dict[str, tuple[str, str]]:
    """Which keys are inputs and labels of which part.

    Args:
        names: of all keys; x_train and y_train, train_images and train_labels, X and y, ...
        path: the file, for messages.

    Returns:
        Part (`train` first; then `val`, `test` where they are there) -> keys of its inputs and its labels.

    Raises:
        UserError: one is missing, or there are two for the same.
    """
    places: dict[tuple[str, str], list[str]] = {}
    for name in names:
        match = _KEY.fullmatch(name.lower())
        if match:
            word, split = match["role"] or match["second"], match["part"] or match["first"] or ""
            places.setdefault((_SPLITS.get(split, ""), _ROLES[word]), []).append(name)
    parts = {part for part, _ in places}
    if "train" not in parts:  # x and y are the training part, or the whole
        places = {(part or "train", role): keys for (part, role), keys in places.items()}
    elif {("", "x"), ("", "y")} <= set(places):
        both = f"'{places['', 'x'][0]}' and '{places.get(('train', 'x'), places.get(('train', 'y')))[0]}'"  # type: ignore[index]
        raise UserError(f"{path}: {both}: either of them could be the training data; rename one")
    found = {}
    for part in PARTS:
        if part != "train" and not {(part, "x"), (part, "y")} & set(places):
            continue
        pair = [_only(places.get((part, role), []), part, role, names, path) for role in "xy"]
        found[part] = pair[0], pair[1]
    return found


def _only(keys: list[str], part: str, role: str, names: Sequence[str], path: str) -> str:
    if not keys:
        raise UserError(
            f"{path}: no key '{role}_{part}' (it has {', '.join(sorted(names)) or 'nothing'}); "
            "needed are x_train, y_train, x_test, y_test, or x and y"
        )
    ours = [key for key in keys if key in (role, f"{role}_{part}")]
    if len(keys) > 1 and len(ours) != 1:
        raise UserError(
            f"{path}: keys {' and '.join(keys)}: either of them could be '{role}_{part}'; name one of them so"
        )
    return (ours or keys)[0]
