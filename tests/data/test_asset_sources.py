"""Where assets come from: public downloads, checked, and the clients of package registries."""

from __future__ import annotations

import hashlib
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from fedsim.data import asset_sources
from fedsim.data.asset_sources import Archive, SourceError
from tests.data.archives import cifar10_files, fashion_files, tar


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
