"""The cache where it cannot be written: each time one line names the place and FEDSIM_CACHE."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsim.data.partition import Partition, partition
from fedsim.data.store import cache_folder, cache_writing, load_arrays
from fedsim.errors import UserError


def _read_only(*_: Any, **__: Any) -> Any:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def _split(clients: int) -> Partition:
    labels = np.arange(20) % 2
    return partition("iid", {}, labels=labels, groups=None, clients=clients, shots=None, pooled=False, seed=0)


def test_a_file_in_the_place_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").touch()
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"cache/data' \(Not a directory\); set FEDSIM_CACHE"):
        load_arrays("digits", {})


def test_a_read_only_cache_is_named_when_something_is_to_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path))
    there = _split(2)
    with monkeypatch.context() as patch:
        patch.setattr("tempfile.mkdtemp", _read_only)
        patch.setattr("tempfile.mkstemp", _read_only)
        with pytest.raises(
            UserError, match=rf"'{tmp_path}/data/\w+' \(Read-only file system\).*FEDSIM_CACHE"
        ):
            load_arrays("digits", {})
        with pytest.raises(UserError, match=rf"'{tmp_path}/partitions/\w+.npz' \(Read-only file system\)"):
            _split(4)
        again = _split(2)  # what is there is used
    np.testing.assert_array_equal(there.indices, again.indices)


def test_without_a_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("FEDSIM_CACHE")
    monkeypatch.setattr(Path, "home", nobody)
    with pytest.raises(UserError, match=r"no home folder is known \(HOME\); set FEDSIM_CACHE"):
        cache_folder("data")


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FEDSIM_CACHE", "~/mine")
    assert cache_folder("data") == tmp_path / "mine" / "data"


def test_a_full_disk_is_said_with_the_place() -> None:
    said = r"'here' \(No space left on device\); free some space there"
    with pytest.raises(UserError, match=said), cache_writing(Path("here")):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
