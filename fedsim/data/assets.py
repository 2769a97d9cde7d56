"""Real data and real weights, fetched once per machine, checked and cached.

    <assets>/archives/FILE            what a source gave us, kept: an interrupted fetch goes on from here
    <assets>/NAME/...  asset.json     the decoded asset: .npy arrays, safetensors, text

The folder is `$FEDSIM_ASSETS` or the part `assets` of the cache. Every asset is pinned twice: the SHA-256
of the archive, checked before anything in it is read, and a digest of the decoded content, which is the
same whatever the source, so that machines with different sources agree. A decoded folder appears by one
rename; a lock per asset lets any number of processes fetch at once. No code that came with an archive is
imported by fedsim, and no pickle is loaded without a list of allowed names.

Sources, in order: the ordinary public download where it can be reached (skipped when HF_HUB_OFFLINE or
FEDSIM_OFFLINE is set), then a package registry through its ordinary client (see `asset_sources`). Python
code that only reads assets needs `path` alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock

from fedsim.data import asset_sources as sources
from fedsim.data.asset_sources import Archive, SourceError
from fedsim.data.asset_table import ASSETS, BUNDLES, Asset
from fedsim.data.store import cache_folder
from fedsim.errors import UserError, nearest

_META = "asset.json"

Say = Callable[[str], None]


class Unreachable(UserError):
    """No source of an asset could be reached, or had it; what a source gave was never wrong."""


@dataclass(frozen=True)
class Entry:
    """An asset as the user sees it.

    Attributes:
        name: as in `fedsim assets fetch NAME`.
        text: what it is.
        licence: as the source states it.
        megabytes: of the download.
        folder: where it is; None when it is not fetched, or damaged.
        damaged: its folder is there, but a file is missing, cut off or of another version of fedsim.
    """

    name: str
    text: str
    licence: str
    megabytes: int
    folder: Path | None
    damaged: bool

    def nbytes(self) -> int:
        """What its files take on the disk (0 when it is not fetched)."""
        return sum(_sizes(self.folder).values()) if self.folder else 0


def entries() -> list[Entry]:
    """All assets, in the order of the table; names and sizes of files are looked at, not their contents."""
    root = assets_folder()
    return [_look(root / name, name, asset) for name, asset in ASSETS.items()]


def _look(place: Path, name: str, asset: Asset) -> Entry:
    folder = _fetched(place, asset)
    damaged = folder is None and place.exists()
    return Entry(name, asset.text, asset.licence, asset.archive.megabytes, folder, damaged)


def fetch(names: Iterable[str], *, say: Say = lambda line: None) -> list[Path]:
    """Fetch, check and decode assets; what is there already is left alone.

    Args:
        names: of assets or bundles.
        say: told what is going on, line by line.

    Returns:
        The folders, in the order asked for.

    Raises:
        UserError: unknown name (before anything is fetched), or no source gave the pinned content
            (`Unreachable`, where none could be asked).
    """
    root = assets_folder()
    return [_fetch(root, name, ASSETS[name], say) for name in expand(names)]


def path(name: str) -> Path:
    """The folder of a fetched asset.

    Raises:
        UserError: unknown name, or it is not fetched, or damaged.
    """
    return paths(name)[0]


def paths(*names: str) -> list[Path]:
    """The folders of fetched assets.

    Raises:
        UserError: an unknown name; names all that are not fetched, or damaged.
    """
    for name in names:
        if name in BUNDLES:
            raise UserError(f"'{name}' is {' and '.join(BUNDLES[name])}: ask for one of them")
    root = assets_folder()
    found = [_look(root / name, name, _asset(name)) for name in names]
    lacking = [entry for entry in found if entry.folder is None]
    if lacking:
        states = {True: "damaged", False: "not on this machine"}
        text = " and ".join(f"asset '{entry.name}' is {states[entry.damaged]}" for entry in lacking)
        raise UserError(f"{text}: fedsim assets fetch {' '.join(entry.name for entry in lacking)}")
    return [entry.folder for entry in found if entry.folder is not None]


def verify(name: str) -> Path:
    """Read a fetched asset from end to end and compare it with its pin; the next fetch mends what differs.

    Returns:
        Its folder.

    Raises:
        UserError: it is not fetched, or its content is not the pinned one.
    """
    folder = path(name)
    found = content_digest(folder)
    if found != ASSETS[name].digest:
        (folder / _META).unlink(missing_ok=True)
        raise UserError(
            f"asset '{name}' in {folder} is damaged: its digest is {found[:16]}..., not "
            f"{ASSETS[name].digest[:16]}...; mend it with: fedsim assets fetch {name}"
        )
    return folder


def expand(names: Iterable[str]) -> list[str]:
    """Bundles replaced by what they consist of, each asset once.

    Raises:
        UserError: unknown name.
    """
    found = [part for name in names for part in BUNDLES.get(name, (name,))]
    for name in found:
        _asset(name)
    return list(dict.fromkeys(found))


def assets_folder() -> Path:
    """`$FEDSIM_ASSETS`, or the part `assets` of the cache; made if needed.

    Raises:
        UserError: it cannot be made.
    """
    chosen = os.environ.get("FEDSIM_ASSETS")
    if not chosen:
        return cache_folder("assets")
    folder = Path(chosen).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make FEDSIM_ASSETS '{folder}' ({error.strerror})") from error
    return folder


def content_digest(folder: Path) -> str:
    """SHA-256 over the files of a decoded asset: arrays and tensors by content, text by its bytes."""
    digest = hashlib.sha256()
    for file in _files(folder):
        digest.update(f"{file.relative_to(folder).as_posix()}\0".encode())
        if file.suffix == ".npy":
            _update(digest, np.load(file, mmap_mode="r", allow_pickle=False))
        elif file.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(file, framework="numpy") as tensors:
                for name in sorted(tensors.keys()):
                    digest.update(f"{name}\0".encode())
                    _update(digest, tensors.get_tensor(name))
        else:
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _update(digest: hashlib._Hash, array: np.ndarray) -> None:
    digest.update(f"{array.dtype.str} {array.shape}\0".encode())
    for start in range(0, max(len(array), 1) if array.ndim else 1, 4096):
        part = array[start : start + 4096] if array.ndim else array
        digest.update(np.ascontiguousarray(part).data)


# --------------------------------------------------------------------------------------- one asset


def _asset(name: str) -> Asset:
    if name not in ASSETS:
        raise UserError(f"unknown asset '{name}': {nearest(name, [*ASSETS, *BUNDLES])} (fedsim assets list)")
    return ASSETS[name]


def _fetched(folder: Path, asset: Asset) -> Path | None:
    """The folder, if it holds the pinned content as far as names and sizes tell; `verify` reads it all."""
    try:
        meta = json.loads((folder / _META).read_text("utf-8"))
        if meta["digest"] == asset.digest and meta["sizes"] == _sizes(folder):
            return folder
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _sizes(folder: Path) -> dict[str, int]:
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in _files(folder)}


def _files(folder: Path) -> Iterator[Path]:
    return iter(sorted(file for file in folder.rglob("*") if file.is_file() and file.name != _META))


def _fetch(root: Path, name: str, asset: Asset, say: Say) -> Path:
    folder = root / name
    if _fetched(folder, asset):
        say(f"{name}: already here")
        return folder
    if not os.access(root, os.W_OK):
        raise UserError(f"cannot write to '{root}'; set FEDSIM_ASSETS to a folder you may write to")
    with FileLock(root / f".{name}.lock"):
        if _fetched(folder, asset):  # another process was fetching it meanwhile
            say(f"{name}: already here")
            return folder
        for left in root.glob(f".{name}.part-*"):  # by a process that was killed: we hold the lock
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}.part-", dir=root) as scratch:
            made = _decode(root / "archives", name, asset, Path(scratch), say)
            meta = {"digest": asset.digest, "sizes": _sizes(made)}
            (made / _META).write_text(json.dumps(meta, indent=1), "utf-8")
            if folder.exists():  # damaged, or of another version of fedsim
                folder.rename(Path(scratch) / "replaced")
            made.rename(folder)
    say(f"{name}: ready")
    return folder


def _decode(archives: Path, name: str, asset: Asset, scratch: Path, say: Say) -> Path:
    """The checked, decoded content in a folder of `scratch`, from the first source that gives it."""
    archives.mkdir(exist_ok=True)
    failed: list[tuple[str, SourceError]] = []
    kept = archives / asset.archive.file
    public = asset.public
    if public is not None and not _matches(kept, asset.archive):
        try:
            say(f"{name}: trying the public download")
            download = scratch / "download"
            download.mkdir()
            return _checked(scratch, "public", asset, lambda made: public(download, made))
        except SourceError as error:
            failed.append(("public download", error))
            say(f"{name}: public download: {error}")
    try:
        _archive(kept, name, asset, scratch, say)
        say(f"{name}: decoding")
        return _checked(scratch, "decoded", asset, lambda made: asset.read(kept, made))
    except SourceError as error:
        failed.append((asset.archive.client, error))
    reasons = "; ".join(f"{source}: {error}" for source, error in failed)
    wrong = any(isinstance(error, sources.WrongContent) for _, error in failed)
    raise (UserError if wrong else Unreachable)(
        f"asset '{name}' cannot be fetched ({reasons}). Another way: get {asset.archive.file} "
        f"(version {asset.archive.version} of the {asset.archive.client} package "
        f"'{asset.archive.package}') on another machine, put it into {archives}, and run this again"
    )


def _checked(scratch: Path, part: str, asset: Asset, decode: Callable[[Path], None]) -> Path:
    """Decode into a new folder of `scratch`; SourceError unless the content is the pinned one."""
    made = scratch / part
    made.mkdir()
    try:
        decode(made)
        found = content_digest(made)
    except SourceError:
        raise
    except Exception as error:  # readers and their libraries fail in many ways; none may be used
        raise sources.WrongContent(f"cannot be read ({type(error).__name__}: {error})") from error
    if found != asset.digest:
        shutil.rmtree(made)
        raise sources.WrongContent(
            f"its decoded content has the digest {found}, the pinned one is {asset.digest}"
        )
    return made


def _archive(kept: Path, name: str, asset: Asset, scratch: Path, say: Say) -> None:
    """Make `kept` the pinned archive; a file with another SHA-256 is neither used nor kept."""
    if _matches(kept, asset.archive):
        return
    if kept.exists():
        say(f"{name}: {kept.name} is damaged, fetching it again")
    say(f"{name}: fetching {asset.archive.megabytes} MB with {asset.archive.client}")
    found = sources.download(asset.archive, scratch)
    if not _matches(found, asset.archive):
        raise sources.WrongContent(
            f"{found.name} has the SHA-256 {_sha256(found)}, pinned is {asset.archive.sha256}"
        )
    os.replace(found, kept)


def _matches(file: Path, archive: Archive) -> bool:
    return file.is_file() and _sha256(file) == archive.sha256


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
