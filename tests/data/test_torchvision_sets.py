"""`torchvision:NAME`: all three forms that torchvision's sets have, without a network."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

from fedsim.data.torchvision_sets import torchvision_set
from fedsim.errors import UserError


class Whole:
    """A set in one piece: image i is i everywhere, its label is i modulo 3."""

    classes = ("great_ape", "bee", "cat")
    count, shape = 60, (8, 12)
    decoded: list[int]

    def __init__(self, root: str, *, download: bool = False) -> None:
        assert download
        assert Path(root).is_dir()
        self.decoded = []
        self.targets = [row % 3 for row in range(self.count)]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> tuple[Image.Image, int]:
        self.decoded.append(row)
        return Image.fromarray(np.full((*self.shape, 3), row, np.uint8)), self.targets[row]


class ByFlag(Whole):
    """Like CIFAR100."""

    def __init__(self, root: str, train: bool = True, *, download: bool = False) -> None:
        super().__init__(root, download=download)
        self.count = 30 if train else 12
        self.targets = self.targets[: self.count]


class BySplit(Whole):
    """Like OxfordIIITPet: labels have another name, the training part is called trainval."""

    def __init__(self, root: str, split: str = "trainval", *, download: bool = False) -> None:
        super().__init__(root, download=download)
        if split not in ("trainval", "test"):
            raise ValueError(f"unknown split {split}")
        self.count = 24 if split == "trainval" else 9
        self._labels = self.targets[: self.count]


class ByOtherSplit(BySplit):
    """Like Flowers102: the training part is called train."""

    def __init__(self, root: str, split: str = "train", *, download: bool = False) -> None:
        if split == "trainval":
            raise ValueError("unknown split trainval")
        super().__init__(root, "trainval" if split == "train" else split, download=download)


@pytest.fixture(autouse=True)
def _sets(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (Whole, ByFlag, BySplit, ByOtherSplit):
        monkeypatch.setattr(datasets, kind.__name__, kind, raising=False)


@pytest.mark.parametrize(
    ("name", "train", "test"),
    [("Whole", 48, 12), ("ByFlag", 30, 12), ("BySplit", 24, 9), ("ByOtherSplit", 24, 9)],
)
def test_images_and_labels_of_every_form(name: str, train: int, test: int) -> None:
    found = torchvision_set(name=name)
    assert found.train_x.shape == (train, 3, 8, 12)
    assert found.test_x.shape == (test, 3, 8, 12)
    assert found.classes == ("great ape", "bee", "cat")
    for x, y in ((found.train_x, found.train_y), (found.test_x, found.test_y)):
        assert x.dtype == np.uint8
        np.testing.assert_array_equal(x[:, 0, 0, 0] % 3, y)
    if name == "Whole":  # one piece: the parts share no image
        assert not set(found.train_x[:, 0, 0, 0]) & set(found.test_x[:, 0, 0, 0])


def test_a_subset_decodes_no_other_image(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = Whole.__getitem__

    def noting(self: Any, row: int) -> Any:
        seen.append(row)
        return original(self, row)

    monkeypatch.setattr(Whole, "__getitem__", noting)
    found = torchvision_set(name="ByFlag", train_samples=6, test_samples=3)
    assert len(seen) == 9
    assert np.bincount(found.train_y).tolist() == [2, 2, 2]


def test_size_crops_the_centre_and_keeps_proportions(monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.zeros((10, 40, 3), np.uint8)
    image[:, 15:25] = 200
    monkeypatch.setattr(Whole, "__getitem__", lambda self, row: (Image.fromarray(image), row % 3))
    found = torchvision_set(name="Whole", size=10)
    assert found.train_x.shape == (48, 3, 10, 10)
    assert (found.train_x == 200).all()


@pytest.mark.parametrize(
    ("name", "said"),
    [("CIFAR_100", "CIFAR100"), ("ByFlag", "size = 224")],
)
def test_mistakes_are_named(name: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def growing(self: Whole, row: int) -> tuple[Image.Image, int]:
        return Image.fromarray(np.zeros((row + 1, 4, 3), np.uint8)), row % 3

    monkeypatch.setattr(Whole, "__getitem__", growing)
    with pytest.raises(UserError, match=said):
        torchvision_set(name=name)


def test_without_a_network_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Offline(Whole):
        def __init__(self, root: str, *, download: bool = False) -> None:
            raise OSError("no route")

    monkeypatch.setattr(datasets, "Offline", Offline, raising=False)
    with pytest.raises(UserError, match=r"no route.*imagefolder:FOLDER"):
        torchvision_set(name="Offline")


def test_transparent_pictures_are_shown_on_white(monkeypatch: pytest.MonkeyPatch) -> None:
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    monkeypatch.setattr(Whole, "__getitem__", lambda self, row: (clear, row % 3))
    assert (torchvision_set(name="Whole").train_x == 255).all()
    deep = Image.fromarray(np.zeros((4, 4), np.uint16))
    monkeypatch.setattr(Whole, "__getitem__", lambda self, row: (deep, row % 3))
    with pytest.raises(UserError, match="'torchvision:Whole', image 0: an image has more than 8 bits"):
        torchvision_set(name="Whole")


@pytest.mark.parametrize("error", [zipfile.BadZipFile("no zip"), tarfile.ReadError("cut"), EOFError()])
def test_damaged_downloads_are_named(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Whole, row: int) -> None:
        raise error

    monkeypatch.setattr(Whole, "__getitem__", broken)
    with pytest.raises(
        UserError, match=r"'torchvision:Whole': image \d+ cannot be read .* delete the set's files"
    ):
        torchvision_set(name="Whole")

    class Half(Whole):
        def __init__(self, root: str, *, download: bool = False) -> None:
            raise error

    monkeypatch.setattr(datasets, "Half", Half, raising=False)
    with pytest.raises(UserError, match=r"cannot give the dataset 'Half'.*half a download is in"):
        torchvision_set(name="Half")
