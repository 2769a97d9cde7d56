"""Datasets: real contents, a cache that parallel processes share, errors that name file and key."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedsim.data.sources import DIGIT_WORDS, digits, digits_for_pretraining, mnist_5k
from fedsim.data.store import load_arrays
from fedsim.errors import UserError


def test_digits_of_the_federation_and_of_pretraining_are_disjoint() -> None:
    clean = digits()
    assert (len(clean.train_y), len(clean.test_y)) == (747, 350)
    assert clean.train_x.shape[1:] == (1, 8, 8)
    assert clean.train_x.dtype == np.uint8
    assert clean.train_x.max() == 255
    pretraining = {image.tobytes() for image in digits_for_pretraining()[0]}
    federated = [image.tobytes() for image in np.concatenate([clean.train_x, clean.test_x])]
    assert len(pretraining) + len(federated) == 1797
    assert not pretraining & set(federated)
    assert not {x.tobytes() for x in clean.train_x} & {x.tobytes() for x in clean.test_x}


def test_the_shift_changes_pixels_and_nothing_else() -> None:
    clean, dark = digits(), digits(invert=True)
    np.testing.assert_allclose(dark.train_x.astype(int), 255 - clean.train_x.astype(int), atol=1)
    turned = digits(rotate=25.0, noise=0.1)
    np.testing.assert_array_equal(turned.test_y, clean.test_y)
    assert turned.digest == digits(rotate=25.0, noise=0.1).digest != clean.digest
    half = digits(rotate=180.0)
    np.testing.assert_allclose(half.train_x[:, :, ::-1, ::-1].astype(int), clean.train_x.astype(int), atol=1)


def test_mnist_5k_is_mnist() -> None:
    found = mnist_5k()
    assert found.train_x.shape == (4000, 1, 28, 28)
    assert found.test_x.shape == (1000, 1, 28, 28)
    assert np.bincount(found.train_y).tolist() == [400] * 10
    assert found.classes == DIGIT_WORDS
    whole = np.concatenate([found.train_x, found.test_x])
    assert whole.mean() / 255 == pytest.approx(0.1307, abs=0.003)  # the well-known mean of MNIST


def write_npz(path: Path, **changes: np.ndarray) -> Path:
    rng = np.random.default_rng(0)
    contents = {
        "x_train": rng.integers(0, 255, (40, 6, 6, 3), np.uint8),
        "y_train": np.arange(40) % 4,
        "x_test": rng.integers(0, 255, (8, 6, 6, 3), np.uint8),
        "y_test": np.arange(8) % 4,
        **changes,
    }
    np.savez(path, **{k: v for k, v in contents.items() if v is not None})
    return path


def test_npz_is_memory_mapped_and_read_again_when_it_changes(tmp_path: Path) -> None:
    write_npz(tmp_path / "mine.npz", classes=np.array(["a", "b", "ü", "d"]), groups=np.arange(40) // 5)
    found = load_arrays("npz:mine.npz", {}, roots=[tmp_path])
    assert isinstance(found.train_x, np.memmap)
    assert not found.train_x.flags.writeable
    assert found.train_x.shape == (40, 3, 6, 6)
    assert found.classes == ("a", "b", "ü", "d")
    assert found.groups is not None
    assert load_arrays("npz:mine.npz", {}, roots=[tmp_path]).digest == found.digest
    write_npz(tmp_path / "mine.npz", x_train=np.zeros((40, 6, 6, 3), np.uint8))
    assert load_arrays("npz:mine.npz", {}, roots=[tmp_path]).train_x.sum() == 0


def test_npz_with_x_and_y_is_split_once_and_for_all(tmp_path: Path) -> None:
    np.savez(tmp_path / "xy.npz", x=np.arange(200.0).reshape(100, 2), y=np.arange(100) % 5)
    found = load_arrays(f"npz:{tmp_path / 'xy.npz'}", {"test_fraction": 0.2})
    assert found.test_x.dtype == np.float32
    assert np.bincount(found.test_y).tolist() == [4] * 5
    assert len(set(found.train_x[:, 0]) | set(found.test_x[:, 0])) == 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None}, r"mine\.npz: no key 'y_test' \(it has x_test, x_train, y_train\)"),
        ({"y_train": np.arange(39)}, "'x_train' has 40 samples but its labels are 39"),
        ({"y_train": np.full(40, 0.5)}, "'y_train' must be integers"),
        ({"y_test": np.full(8, 9), "classes": np.array(["a", "b", "c", "d"])}, "test label 9 is unknown"),
        ({"x_test": np.zeros((0, 6, 6, 3), np.uint8), "y_test": np.zeros(0, int)}, "the test set is empty"),
        ({"x_test": np.zeros((8, 5, 5, 3), np.uint8)}, "training and test samples differ in shape"),
        ({"classes": np.array([{}, 1], object)}, "cannot be read without pickle"),
        ({"groups": np.arange(3)}, "'groups' has 3 entries for 40 training samples"),
    ],
)
def test_npz_mistakes(changes: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    write_npz(tmp_path / "mine.npz", **changes)
    with pytest.raises(UserError, match=message):
        load_arrays(f"npz:{tmp_path / 'mine.npz'}", {})


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no .*none\.npz"):
        load_arrays(f"npz:{tmp_path / 'none.npz'}", {})
    (tmp_path / "bad.npz").write_text("hello")
    with pytest.raises(UserError, match=r"bad\.npz: not a readable \.npz"):
        load_arrays(f"npz:{tmp_path / 'bad.npz'}", {})
    with pytest.raises(UserError, match="there is no"):
        load_arrays(f"imagefolder:{tmp_path / 'none'}", {})


def paint(folder: Path, count: int, colour: int) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        Image.new("RGB", (10, 7), (colour, number, 0)).save(folder / f"{number}.png")


def test_imagefolder_with_and_without_a_test_folder(tmp_path: Path) -> None:
    paint(tmp_path / "a" / "cat", 10, 200)
    paint(tmp_path / "a" / "dog", 5, 50)
    found = load_arrays(f"imagefolder:{tmp_path / 'a'}", {"size": 4})
    assert found.classes == ("cat", "dog")
    assert found.train_x.shape == (12, 3, 4, 4)
    assert set(found.train_x[found.train_y == 0][:, 0].ravel()) == {200}
    paint(tmp_path / "b" / "train" / "cat", 3, 1)
    paint(tmp_path / "b" / "test" / "cat", 2, 2)
    parted = load_arrays(f"imagefolder:{tmp_path / 'b'}", {})
    assert (len(parted.train_y), len(parted.test_y)) == (3, 2)
    paint(tmp_path / "b" / "test" / "cow", 1, 2)
    with pytest.raises(UserError, match="class 'cow' has no folder"):
        load_arrays(f"imagefolder:{tmp_path / 'b'}", {})
    (tmp_path / "a" / "cat" / "broken.png").write_text("no image")
    with pytest.raises(UserError, match=r"broken\.png: not a readable image"):
        load_arrays(f"imagefolder:{tmp_path / 'a'}", {})


def test_parallel_processes_share_one_cache_entry(tmp_path: Path) -> None:
    code = "from fedsim.data.store import load_arrays; print(load_arrays('digits', {'noise': 0.2}).digest)"
    env = {**os.environ, "FEDSIM_CACHE": str(tmp_path)}
    children = [
        subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    outputs = {child.communicate(timeout=60)[0] for child in children}
    assert len(outputs) == 1
    assert len(list((tmp_path / "data").iterdir())) == 1


def test_a_damaged_entry_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path))
    before = np.array(load_arrays("digits", {}).train_x)
    (entry,) = (tmp_path / "data").iterdir()
    file = entry / "train_x.npy"
    file.write_bytes(file.read_bytes()[:1000])
    np.testing.assert_array_equal(load_arrays("digits", {}).train_x, before)
    assert len(list((tmp_path / "data").iterdir())) == 1


def test_threads_repair_a_damaged_entry_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path))
    digest = load_arrays("digits", {}).digest
    (entry,) = (tmp_path / "data").iterdir()
    for _ in range(10):
        file = entry / "train_x.npy"
        file.write_bytes(file.read_bytes()[:1000])
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: load_arrays("digits", {}).digest, range(4)))
        assert found == [digest] * 4
    assert [path.name for path in (tmp_path / "data").iterdir()] == [entry.name]
