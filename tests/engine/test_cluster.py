"""Ray's folder is looked at before Ray is: Ray itself only says that it did not start."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsim.engine.cluster import check_folder
from fedsim.errors import UserError


@pytest.fixture(autouse=True)
def _no_choice_of_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)


def test_a_folder_that_is_not_there_yet_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsim.engine.cluster._SOCKET", "")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "new"))
    check_folder()
    assert (tmp_path / "new" / "ray").is_dir()


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_a_long_name_is_measured(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket's name has 107 bytes; ü has two."""
    monkeypatch.setenv(variable, "/tmp/" + "ü" * 40)
    with pytest.raises(
        UserError, match=rf"/tmp/ü+' \({variable}\): its name is \d+ bytes too long .* set RAY_TMPDIR"
    ):
        check_folder()


def test_a_file_in_its_place_and_a_full_disk_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsim.engine.cluster._SOCKET", "")
    (tmp_path / "file").touch()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"file' \(TMPDIR\): Not a directory; set RAY_TMPDIR"):
        check_folder()

    def full(**_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(UserError, match="No space left on device; set RAY_TMPDIR"):
        check_folder()
