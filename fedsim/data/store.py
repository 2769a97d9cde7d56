"""Datasets decoded once per machine and memory-mapped by every process afterwards.

    <cache>/data/<key>/meta.json, train_x.npy, train_y.npy, test_x.npy, test_y.npy
    [, groups.npy, train_z.npy, test_z.npy]

The cache is `$FEDSIM_CACHE` or ~/.cache/fedsim. An entry appears by one rename of a finished folder, so
that any number of processes may start at once. It may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fedsim import registry
from fedsim.data import pixels
from fedsim.data.archives import unfit
from fedsim.data.attributes import Attribute, complaint
from fedsim.data.folders import look
from fedsim.data.sources import Arrays
from fedsim.errors import UserError
from fedsim.lookup import find

_VERSION = "3"


def cache_folder(part: str) -> Path:
    """The folder `part` of the cache, made if needed.

    Raises:
        UserError: it cannot be made.
    """
    chosen = os.environ.get("FEDSIM_CACHE")
    try:
        folder = (Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "fedsim") / part
        folder.mkdir(parents=True, exist_ok=True)
    except RuntimeError as error:  # HOME is not set and the system knows no home of this user
        raise UserError("no home folder is known (HOME); set FEDSIM_CACHE to a folder") from error
    except OSError as error:
        raise UserError(
            f"cannot make the cache folder '{folder}' ({error.strerror}); "
            "set FEDSIM_CACHE to a folder you may write to"
        ) from error
    return folder


@contextmanager
def cache_writing(place: Path) -> Iterator[None]:
    """Around whatever writes a file or folder of the cache.

    Raises:
        UserError: it cannot be written (the cache is read-only, or full); names the fix.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write '{place}' ({error.strerror}); free some space there, or set FEDSIM_CACHE to a "
            "folder you may write to"
        ) from error


def cache_key(*parts: object) -> str:
    """A file name for these parts: 32 hex digits of their sha256 (parts are JSON values or bytes)."""
    digest = hashlib.sha256()
    for part in parts:
        text = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode()
        digest.update(len(text).to_bytes(8, "little") + text)
    return digest.hexdigest()[:32]


def load_arrays(name: str, options: Mapping[str, Any], *, roots: Sequence[Path] = ()) -> Arrays:
    """The arrays behind `[data]`, memory-mapped read-only.

    Args:
        name: `[data] name`.
        options: its other keys; a relative `path` is looked up in `roots`.
        roots: folders, first match wins; the current folder when empty.

    Raises:
        UserError: unknown name, or whatever is wrong with the data.
    """
    source = registry.resolve("datasets", name)
    keys = {**source.fixed, **options}
    stamp: list[Any] = []
    if isinstance(keys.get("path"), str):
        keys["path"] = str(find(keys["path"], roots, "[data] path"))
        stamp = _stamp(Path(keys["path"]))
    folder = cache_folder("data") / cache_key(_VERSION, code_stamp(source.target), keys, stamp)
    for _ in range(3):  # once is enough, unless several processes replace a damaged entry at once
        found = _open(folder)
        if found is not None:
            return found
        arrays = _checked(source.target(**keys), name)
        with cache_writing(folder):
            _write(folder, arrays)
    found = _open(folder)
    if found is None:
        raise UserError(f"the cache entry '{folder}' cannot be read back; delete it and check the disk")
    return found


def code_stamp(target: Callable[..., Any]) -> list[Any]:
    """What changes when a function is another one or its source file is edited: name, file, size, time."""
    file = inspect.getsourcefile(target)
    return [f"{target.__module__}:{target.__qualname__}", *(_stamp(Path(file)) if file else [])]


def _stamp(path: Path) -> list[Any]:
    """What changes when a file, or anything in a folder, is replaced: names, sizes, times."""
    if path.is_dir():
        return look(path).stamp()
    status = path.stat()
    return [[str(path), status.st_size, status.st_mtime_ns]]


def _checked(arrays: Arrays, name: str) -> Arrays:
    """Refuse what no model could use, whoever wrote the dataset function."""
    for part, x, y, z in (
        ("training", arrays.train_x, arrays.train_y, arrays.train_z),
        ("test", arrays.test_x, arrays.test_y, arrays.test_z),
    ):
        if len(y) == 0:
            raise UserError(f"[data] '{name}': the {part} set is empty; give it samples (test_fraction > 0)")
        if len(x) != len(y):
            raise UserError(f"[data] '{name}': {len(x)} {part} inputs but {len(y)} labels")
        if x.dtype not in (np.uint8, np.int32, np.float32) or y.dtype != np.int64:
            raise UserError(
                f"[data] '{name}': {part} inputs must be uint8, int32 or float32 and labels int64, "
                f"not {x.dtype} and {y.dtype}"
            )
        reason = unfit(x)
        if reason:
            raise UserError(
                f"[data] '{name}': the {part} set {reason}; mend these samples, or leave them out"
            )
        wrong = np.setdiff1d(y, np.arange(len(arrays.classes)))
        if len(wrong):
            raise UserError(
                f"[data] '{name}': {part} label {wrong[0]} is unknown, there are {len(arrays.classes)} "
                f"classes (0 to {len(arrays.classes) - 1}); renumber the labels or name all classes"
            )
        odd = complaint(arrays.attributes, z, len(y))
        if odd:
            raise UserError(f"[data] '{name}', {part} set: {odd}")
    if arrays.train_x.shape[1:] != arrays.test_x.shape[1:]:
        shapes = f"{list(arrays.train_x.shape[1:])} and {list(arrays.test_x.shape[1:])}"
        raise UserError(f"[data] '{name}': training and test samples differ in shape: {shapes}")
    if arrays.ranges or arrays.train_x.ndim != 4 or arrays.train_x.dtype != np.float32:
        return arrays
    seen = pixels.spread([arrays.train_x, arrays.test_x])
    usual = pixels.decide(seen, "auto", name)
    if (usual.low, usual.high) == (0, 1):
        return arrays
    told = pixels.described(seen, pixels.decide(seen, "keep", name))
    return replace(arrays, notes=(*arrays.notes, told))


def _open(folder: Path) -> Arrays | None:
    """The entry as read-only memory maps; None when it is not there or damaged (cut off, unreadable)."""
    try:
        meta = json.loads((folder / "meta.json").read_text("utf-8"))
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in meta["shapes"]}
        if any(list(arrays[name].shape) != shape for name, shape in meta["shapes"].items()):
            return None
        attributes = tuple(Attribute(name, tuple(values)) for name, values in meta["attributes"])
        return Arrays(
            **arrays,
            classes=tuple(meta["classes"]),
            attributes=attributes,
            vocabulary=meta.get("vocabulary"),
            padding=meta.get("padding"),
            digest=meta["digest"],
            notes=tuple(meta["notes"]),
            ranges=pixels.from_json(meta["ranges"]),
        )
    except (OSError, ValueError, KeyError, TypeError, EOFError, UserError):
        return None


def _write(folder: Path, arrays: Arrays) -> None:
    """Write a finished folder beside `folder` and rename it; whoever renames first wins."""
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name, array in arrays.named().items():
            np.save(made / f"{name}.npy", array)
        shapes = {name: list(array.shape) for name, array in arrays.named().items()}
        attributes = [[attribute.name, attribute.values] for attribute in arrays.attributes]
        meta = {
            "classes": arrays.classes,
            "attributes": attributes,
            "vocabulary": arrays.vocabulary,
            "padding": arrays.padding,
            "digest": arrays.digest,
            "notes": arrays.notes,
            "ranges": pixels.to_json(arrays.ranges),
            "shapes": shapes,
        }
        (made / "meta.json").write_text(json.dumps(meta), "utf-8")
        _publish(made, folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _publish(made: Path, folder: Path) -> None:
    damaged = made.with_name(f"{made.name}-damaged")
    for _ in range(3):
        try:
            made.rename(folder)
            return
        except OSError:  # an entry is there: another process was faster, or it is damaged
            if _open(folder) is not None:
                return
            with suppress(FileNotFoundError):  # another process is replacing it, too
                folder.rename(damaged)
            shutil.rmtree(damaged, ignore_errors=True)
