"""Fetching: nothing unchecked is used, nothing half done is seen, nothing is fetched twice."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save
from typer.testing import CliRunner

from fedsim import doctor
from fedsim.cli import app
from fedsim.data import asset_sources, assets
from fedsim.data.asset_sources import Archive, SourceError
from fedsim.errors import UserError
from tests.data.shelf import NUMBERS, Shelf


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    monkeypatch.setenv("FEDSIM_ASSETS", str(tmp_path / "assets"))
    made = Shelf(tmp_path / "assets", tmp_path / "registry")
    monkeypatch.setattr(assets, "ASSETS", {"numbers": made.asset()})
    monkeypatch.setattr(assets, "BUNDLES", {"all": ("numbers", "numbers")})
    monkeypatch.setattr(asset_sources, "download", made.download)
    return made


def change(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    monkeypatch.setattr(assets, "ASSETS", {"numbers": replace(assets.ASSETS["numbers"], **changes)})


def test_the_second_fetch_does_nothing_and_says_so(shelf: Shelf) -> None:
    with pytest.raises(UserError, match="fedsim assets fetch numbers"):
        assets.path("numbers")
    assert assets.fetch(["all"]) == [shelf.folder]
    before = {file: file.stat().st_mtime_ns for file in shelf.root.rglob("*")}
    lines: list[str] = []
    start = time.perf_counter()
    assets.fetch(["numbers"], say=lines.append)
    assert time.perf_counter() - start < 1
    assert lines == ["numbers: already here"]
    assert shelf.downloads() == 1
    assert {file: file.stat().st_mtime_ns for file in shelf.root.rglob("*")} == before
    assert assets.path("numbers") == assets.verify("numbers") == shelf.folder
    assert [entry.folder for entry in assets.entries()] == [shelf.folder]
    np.testing.assert_array_equal(np.load(shelf.folder / "numbers.npy"), NUMBERS)


def test_an_archive_with_another_sha256_is_refused_before_it_is_read(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(archive: Path, made: Path) -> None:
        pytest.fail("an unchecked archive was read")

    change(monkeypatch, read=read)
    shelf.offer(NUMBERS + 1)
    with pytest.raises(UserError, match=r"SHA-256 .*pinned is .*put it into") as caught:
        assets.fetch(["numbers"])
    assert "numbers.zip" in str(caught.value)
    assert shelf.seen() == {"archives"}
    assert not shelf.kept.exists()


def test_right_archive_but_other_content_is_refused(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(archive: Path, made: Path) -> None:
        np.save(made / "numbers.npy", NUMBERS.astype(np.int64))

    change(monkeypatch, read=read)
    with pytest.raises(UserError, match="decoded content has the digest"):
        assets.fetch(["numbers"])
    assert shelf.seen() == {"archives"}


def test_out_of_reach_and_wrong_are_told_apart(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who can do without (a test, say) may leave it at the first, never at the second."""
    shelf.offer(NUMBERS + 1)
    with pytest.raises(UserError) as wrong:
        assets.fetch(["numbers"])
    assert not isinstance(wrong.value, assets.Unreachable)

    def offline(archive: Archive, scratch: Path) -> Path:
        raise SourceError("failed: no route to the registry")

    monkeypatch.setattr(asset_sources, "download", offline)
    with pytest.raises(assets.Unreachable, match="no route to the registry"):
        assets.fetch(["numbers"])


def test_a_damaged_archive_is_replaced_and_a_bad_download_never_replaces_a_good_one(shelf: Shelf) -> None:
    shelf.kept.parent.mkdir(parents=True)
    shelf.kept.write_bytes(shelf.good[:-7])  # cut off
    assets.fetch(["numbers"])
    assert shelf.kept.read_bytes() == shelf.good
    shelf.offer(NUMBERS + 1)
    shutil.rmtree(shelf.folder)
    assets.fetch(["numbers"])  # from the archive that was kept
    assert shelf.downloads() == 1
    assert shelf.kept.read_bytes() == shelf.good
    assets.verify("numbers")


def test_damage_is_found_by_size_when_used_and_by_content_when_verified(shelf: Shelf) -> None:
    assets.fetch(["numbers"])
    file = shelf.folder / "numbers.npy"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + b"\x7f")
    with pytest.raises(UserError, match=r"damaged.*fedsim assets fetch numbers"):
        assets.verify("numbers")
    assert assets.fetch(["numbers"]) == [shelf.folder]  # what was found out is mended by the next fetch
    assert assets.verify("numbers") == shelf.folder
    file.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"is damaged: fedsim assets fetch numbers"):
        assets.path("numbers")
    assets.fetch(["numbers"])
    assert file.read_bytes() == whole
    assert shelf.seen() == {"archives", "numbers"}


def test_the_digest_sees_names_types_shapes_values_and_not_the_container(tmp_path: Path) -> None:
    def digest(files: dict[str, bytes | np.ndarray]) -> str:
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        for name, content in files.items():
            if isinstance(content, np.ndarray):
                np.save(folder / name, content)
            else:
                (folder / name).write_bytes(content)
        return assets.content_digest(folder)

    two = {"b": np.ones(2, np.float32), "a": np.zeros((0, 3), np.float32)}
    one = {"x.npy": NUMBERS, "w.safetensors": save(two, metadata={"format": "pt"})}
    turned = dict(reversed(two.items()))
    assert digest(one) == digest({**one, "w.safetensors": save(turned)})
    others: list[dict[str, bytes | np.ndarray]] = [
        {"y.npy": NUMBERS, "w.safetensors": one["w.safetensors"]},
        {**one, "x.npy": NUMBERS.astype(np.uint32)},
        {**one, "x.npy": NUMBERS.reshape(4, 3)},
        {**one, "x.npy": NUMBERS + (NUMBERS == 11)},
        {**one, "w.safetensors": save({"b": two["b"], "c": two["a"]})},
        {**one, "more.txt": b""},
    ]
    assert len({digest(files) for files in [one, *others]}) == 7


def test_a_reader_that_fails_half_way_leaves_nothing(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(archive: Path, made: Path) -> None:
        np.save(made / "numbers.npy", NUMBERS)
        raise EOFError("half")

    good = assets.ASSETS["numbers"]
    change(monkeypatch, read=read)
    with pytest.raises(UserError, match="EOFError: half"):
        assets.fetch(["numbers"])
    assert shelf.seen() == {"archives"}
    monkeypatch.setattr(assets, "ASSETS", {"numbers": good})
    assets.fetch(["numbers"])
    assert shelf.downloads() == 1  # the archive was fine


def test_threads_fetch_once(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(archive: Path, made: Path) -> None:
        time.sleep(0.2)
        shelf.read(archive, made)

    change(monkeypatch, read=read)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: assets.fetch(["numbers"]), range(8)))
    assert found == [[shelf.folder]] * 8
    assert shelf.downloads() == 1


PROCESS = """
    import os, sys, time
    from pathlib import Path
    from fedsim.data import asset_sources, assets
    from tests.data.shelf import Shelf

    class Other(Shelf):
        def __init__(self, root, registry):
            self.root, self.registry, self.asked = root, registry, registry / "asked"

        def pin(self):
            return sys.argv[3]

        def read(self, archive, made):
            (made / "half.txt").write_text("half")
            print("reading", flush=True)
            time.sleep(float(sys.argv[4]))
            (made / "half.txt").unlink()
            super().read(archive, made)

    shelf = Other(Path(sys.argv[1]), Path(sys.argv[2]))
    assets.ASSETS.clear()
    assets.ASSETS["numbers"] = shelf.asset()
    asset_sources.download = shelf.download
    print(assets.fetch(["numbers"])[0])
"""


def process(shelf: Shelf, seconds: float) -> subprocess.Popen[str]:
    arguments = [str(shelf.root), str(shelf.registry), assets.ASSETS["numbers"].digest, str(seconds)]
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PROCESS), *arguments],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_processes_fetch_once(shelf: Shelf) -> None:
    running = [process(shelf, 0.5) for _ in range(3)]
    lines = [one.communicate(timeout=120)[0].split() for one in running]
    assert [one.returncode for one in running] == [0, 0, 0]
    assert {words[-1] for words in lines} == {str(shelf.folder)}
    assert sum("reading" in words for words in lines) == 1
    assert shelf.downloads() == 1


def test_a_killed_fetch_is_taken_up_again(shelf: Shelf) -> None:
    running = process(shelf, 600)
    assert running.stdout is not None
    assert running.stdout.readline() == "reading\n"
    running.kill()
    running.communicate()
    assert not shelf.folder.exists()
    assets.fetch(["numbers"])
    assert shelf.downloads() == 1  # the finished archive was kept
    assert shelf.seen() == {"archives", "numbers"}


def test_a_public_source_is_first_and_must_agree_with_the_pin(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered = {"numbers": NUMBERS}

    def public(download: Path, made: Path) -> None:
        assert download.is_dir()
        np.save(made / "numbers.npy", offered["numbers"])

    change(monkeypatch, public=public)
    assets.fetch(["numbers"])
    assert shelf.downloads() == 0
    shutil.rmtree(shelf.folder)
    offered["numbers"] = NUMBERS + 1
    lines: list[str] = []
    assets.fetch(["numbers"], say=lines.append)
    assert shelf.downloads() == 1
    assert any("public download: its decoded content has the digest" in line for line in lines)
    np.testing.assert_array_equal(np.load(shelf.folder / "numbers.npy"), NUMBERS)


def test_the_command_line(shelf: Shelf) -> None:
    runner = CliRunner()
    assert "twelve numbers" in runner.invoke(app, ["assets", "list"]).output
    result = runner.invoke(app, ["assets", "fetch", "nubers"])
    assert result.exit_code == 2
    assert "did you mean 'numbers'?" in result.output
    assert runner.invoke(app, ["assets", "path", "numbers"]).exit_code == 2
    assert "numbers: ready" in runner.invoke(app, ["assets", "fetch", "numbers"]).output
    assert runner.invoke(app, ["assets", "path", "numbers"]).output == f"{shelf.folder}\n"
    assert "✓ numbers" in runner.invoke(app, ["assets", "verify"]).output
    (shelf.folder / "numbers.npy").write_bytes((shelf.folder / "numbers.npy").read_bytes()[:-1] + b"\x7f")
    for command in (["verify", "numbers"], ["verify"]):  # the second time it is known to be damaged
        damaged = runner.invoke(app, ["assets", *command])
        assert damaged.exit_code == 2
        assert "✗ asset 'numbers'" in damaged.output
        assert "fedsim assets fetch numbers" in damaged.output


def test_a_bundle_has_no_path_of_its_own() -> None:
    with pytest.raises(UserError, match="'clip-lite' is efficientnet-lite0 and minilm: ask for one of them"):
        assets.path("clip-lite")


def test_list_and_doctor_tell_what_is_here_absent_and_damaged(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look() -> doctor.Finding:
        with monkeypatch.context() as patch:
            patch.setattr(assets, "content_digest", lambda folder: pytest.fail("contents are read"))
            return next(found for found in doctor.examine(debug=True) if found.title == "assets")

    def listed() -> str:
        return CliRunner().invoke(app, ["assets", "list"]).output

    monkeypatch.setattr(assets, "ASSETS", {"numbers": shelf.asset(), "others": shelf.asset()})
    absent = f"{shelf.root}, 0 of 2 are here; to get the others: fedsim assets fetch numbers others"
    assert look() == doctor.Finding("assets", absent)
    assets.fetch(["numbers"])
    file = shelf.folder / "numbers.npy"
    found = look()
    assert found.fix is None
    assert f"1 of 2 are here: numbers {file.stat().st_size} B" in found.text
    assert found.text.endswith("to get the others: fedsim assets fetch others")
    assert "✓  numbers" in listed()
    file.write_bytes(b"cut off")
    found = look()
    assert found.fix == "fedsim assets fetch numbers"
    assert "damaged, or of another version of fedsim: numbers" in found.text
    assert "✗  numbers" in listed()
    assert "fedsim assets fetch numbers" in listed()
