"""Archives as people have them: their keys, axes, labels and damages."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsim.data import archives
from fedsim.data.layouts import arranged
from fedsim.data.own_sets import npz
from fedsim.data.sources import Arrays
from fedsim.data.store import load_arrays
from fedsim.errors import UserError


def read(folder: Path, **contents: Any) -> Arrays:
    np.savez(folder / "a.npz", **contents)
    return npz(path=str(folder / "a.npz"))


def images(count: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), np.uint8)


@pytest.mark.parametrize(
    "words", [("images", "labels"), ("data", "targets"), ("features", "target"), ("X", "y")]
)
@pytest.mark.parametrize("form", ["{part}_{word}", "{word}_{part}", "{word}-{part}", "{word}{part}"])
def test_usual_names_of_keys_are_known(words: tuple[str, str], form: str, tmp_path: Path) -> None:
    x, y = images(9, 4, 4, 3), np.arange(9) % 3
    contents = {}
    for part, rows in (("train", slice(0, 5)), ("val", slice(5, 7)), ("test", slice(7, 9))):
        for word, values in zip(words, (x, y), strict=True):
            contents[form.format(part=part, word=word)] = values[rows]
    found = read(tmp_path, **contents)
    np.testing.assert_array_equal(found.train_y, y[:7])
    np.testing.assert_array_equal(found.train_x, x[:7].transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(found.test_y, y[7:])
    assert any("joins the training data" in line for line in found.card())


def test_parts_that_are_missing_or_doubtful(tmp_path: Path) -> None:
    x, y = images(10, 4, 4), np.arange(10) % 2
    assert len(read(tmp_path, x_train=x, y_train=y).test_y) == 2
    found = read(tmp_path, train_images=x, train_labels=y, val_images=x[:3], val_labels=y[:3], extra=x)
    assert len(found.test_y) == 3
    card = "\n".join(found.card())
    assert "'val_images' is the test set" in card
    assert "skipped keys: extra" in card
    assert "training samples, too, bit by bit: 3" in card
    assert len(read(tmp_path, X=x, y=y, x_test=x[:1], y_test=y[:1]).train_y) == 10
    with pytest.raises(UserError, match=r"no key 'y_train' \(it has images, x_train\)"):
        read(tmp_path, x_train=x, images=x)
    with pytest.raises(UserError, match="keys images and features: either of them could be 'x_train'"):
        read(tmp_path, images=x, features=x, y=y)
    with pytest.raises(UserError, match="'x' and 'x_train': either of them could be the training data"):
        read(tmp_path, x=x, y=y, x_train=x, y_train=y)
    with pytest.raises(UserError, match=r"no key 'x_train' \(it has arr_0, arr_1\)"):
        read(tmp_path, arr_0=x, arr_1=y)


def test_parts_for_validation_bring_owners_and_attributes(tmp_path: Path) -> None:
    x, y = images(6, 4, 4), np.arange(6) % 2
    parts = {f"{axis}_{part}": v for part in ("train", "val", "test") for axis, v in (("x", x), ("y", y))}
    z = {f"z_age_{part}": np.arange(6) + 0.5 for part in ("train", "val", "test")}
    found = read(tmp_path, **parts, **z, groups=np.array(["b"] * 6), groups_val=np.array(["a"] * 6))
    assert found.groups is not None
    assert found.groups.tolist() == [1] * 6 + [0] * 6
    assert found.train_z is not None
    assert found.train_z[:, 0].tolist() == [*z["z_age_train"], *z["z_age_val"]]
    with pytest.raises(UserError, match="there is no key 'groups_val'"):
        read(tmp_path, **parts, groups=y)
    with pytest.raises(UserError, match="there is no key 'groups' for training"):
        read(tmp_path, **parts, groups_val=y)


@pytest.mark.parametrize(
    ("inputs", "labels", "own"),
    [
        ("X", "y", ""),
        ("X", "y", "_train"),
        ("x_train", "y_train", ""),
        ("train_images", "train_labels", "_train"),
    ],
)
def test_attributes_are_found_whatever_inputs_are_called(
    inputs: str, labels: str, own: str, tmp_path: Path
) -> None:
    x, y, age = images(6, 4, 4), np.arange(6) % 2, np.arange(6) + 0.5
    found = read(tmp_path, **{inputs: x, labels: y, f"z_age{own}": age}, x_test=x, y_test=y, z_age_test=age)
    assert [attribute.name for attribute in found.attributes] == ["age"]
    assert found.train_z is not None
    assert found.train_z[:, 0].tolist() == age.tolist()


def test_attributes_of_one_part_are_said(tmp_path: Path) -> None:
    x, y, age = images(6, 4, 4), np.arange(6) % 2, np.arange(6) + 0.5
    parts = {"x_train": x, "y_train": y, "x_test": x, "y_test": y}
    with pytest.raises(UserError, match="'z_age_test' is given, but there is no key 'z_age' for training"):
        read(tmp_path, **parts, z_age_test=age)
    with pytest.raises(UserError, match="'z_sex' is of no part; name it z_sex_train"):
        read(tmp_path, **parts, z_age_train=age, z_age_test=age, z_sex=age)


@pytest.mark.parametrize(
    ("shape", "made", "doubt"),
    [
        ((5, 16, 16, 4), (4, 16, 16), False),
        ((5, 9, 7, 3), (3, 9, 7), False),
        ((5, 4, 16, 16), (4, 16, 16), False),
        ((5, 8, 8, 2), (2, 8, 8), False),
        ((5, 2, 8, 8), (2, 8, 8), False),
        ((5, 4, 4, 3), (3, 4, 4), False),
        ((5, 3, 9, 3), (3, 9, 3), True),
        ((5, 128, 6), (128, 6), True),
        ((5, 6, 128), (128, 6), True),
        ((5, 28, 28), (1, 28, 28), False),
        ((5, 24, 32), (1, 24, 32), True),
        ((5, 7), (7,), False),
    ],
)
def test_axes_are_told_by_the_shape(
    shape: tuple[int, ...], made: tuple[int, ...], doubt: bool, tmp_path: Path
) -> None:
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    found, _, notes = arranged({"x": x}, "auto", "a.npz")
    assert found["x"].shape == (5, *made)
    assert np.sort(found["x"], None).tolist() == np.sort(x, None).tolist()
    assert bool(notes) == doubt


def test_axes_can_be_said(tmp_path: Path) -> None:
    x = images(5, 3, 9, 3)
    assert arranged({"x": x}, "NHWC", "")[0]["x"].shape == (5, 3, 3, 9)
    windows = images(5, 9, 9)
    assert arranged({"x": windows}, "NCT", "")[0]["x"][0, 1, 0] == windows[0, 0, 1]
    with pytest.raises(UserError, match="layout = \"NTC\" has 3 axes, 'x' has 4"):
        arranged({"x": x}, "NTC", "a.npz")


def test_windows_of_signals_reach_their_model(tmp_path: Path) -> None:
    from fedsim.models.base import DataInfo
    from fedsim.models.cnn import signal_cnn

    x = np.random.default_rng(0).normal(size=(20, 6, 64))
    found = read(tmp_path, x=x, y=np.arange(20) % 2)
    assert found.train_x.shape == (16, 64, 6)
    assert np.ptp(found.train_x) > 3  # not scaled
    assert signal_cnn(DataInfo(found.classes, found.train_x.shape[1:])).backbone.conv1.in_channels == 6


@pytest.mark.parametrize(
    ("y", "classes", "codes"),
    [
        (np.array([[3], [7], [900], [7]]), ("3", "7", "900"), [0, 1, 2, 1]),
        (np.array([300_000, 1, 1, 1]), ("1", "300000"), [1, 0, 0, 0]),
        (np.array([1.0, 0.0, 1.0, 2.0]), ("0", "1", "2"), [1, 0, 1, 2]),
        (np.array(["dog", "cat ", "dog", "ape"]), ("ape", "cat", "dog"), [2, 1, 2, 0]),
        (np.array([b"b", b"a", b"b", b"b"]), ("a", "b"), [1, 0, 1, 1]),
        (np.eye(3)[[2, 0, 1, 1]], ("0", "1", "2"), [2, 0, 1, 1]),
        (np.array([-1, 1, 1, -1]), ("-1", "1"), [0, 1, 1, 0]),
        (np.array([True, False, True, True]), ("0", "1"), [1, 0, 1, 1]),
    ],
)
def test_labels_in_every_usual_form(
    y: np.ndarray, classes: tuple[str, ...], codes: list[int], tmp_path: Path
) -> None:
    x = images(4, 5)
    found = read(tmp_path, x_train=x, y_train=y, x_test=x[:1], y_test=y[:1])
    assert found.classes == classes
    assert found.train_y.tolist() == codes
    assert found.test_y.tolist() == codes[:1]


def test_labels_by_name_follow_the_list_of_classes(tmp_path: Path) -> None:
    keys = {"x": images(10, 5), "y": np.array(["b", "a"] * 5)}
    assert read(tmp_path, **keys, class_names=np.array(["b", "c", "a"])).train_y.max() == 2
    with pytest.raises(UserError, match="'y' has a label 'a'"):
        read(tmp_path, **keys, classes=np.array(["b", "c"]))


@pytest.mark.parametrize(
    ("y", "said"),
    [
        (np.array([0, -1, 1, -1]), r"y: labels below 0: 2 \(the lowest: -1\)"),
        (
            np.array([0, 1.5, np.nan, 1]),
            r"'y' must be integers, but not all of its numbers are \(first, sample 1: 1.5\)",
        ),
        (np.array([[1, 1], [0, 1], [0, 0], [1, 0]]), "'y' has several labels in a row"),
        (np.array(["a", "", "b", "b"]), "labels that are empty: 1"),
        (np.zeros((4, 2, 2)), "'y' must be integers or text"),
        (np.array([1j, 0, 0, 0]), "'y' must be integers or text"),
    ],
)
def test_what_is_no_label_is_named(y: np.ndarray, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"a\.npz: .*{said}"):
        read(tmp_path, x=images(4, 5), y=y)


def test_ids_are_no_classes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="2000 different labels for 2000 samples"):
        read(tmp_path, x=images(2000, 2), y=np.arange(2000) * 7)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (np.nan, r"'x_test' has NaN in 1 of 4 samples \(the first: sample 2\)"),
        (-np.inf, "'x_test' has infinite numbers in 1 of 4"),
        (1e300, "'x_test' has numbers beyond float32 in 1 of 4"),
    ],
)
def test_inputs_that_no_model_can_take_are_named(value: float, said: str, tmp_path: Path) -> None:
    x = np.zeros((4, 3))
    bad = x.copy()
    bad[2, 1] = value
    y = np.arange(4) % 2
    with pytest.raises(UserError, match=rf"a\.npz: {said}"):
        read(tmp_path, x_train=x, y_train=y, x_test=bad, y_test=y)


def shaky() -> Arrays:
    """A dataset function of somebody."""
    x = np.zeros((4, 3), np.float32)
    x[3] = np.inf
    return Arrays(x, np.arange(4) % 2, x[:2], np.arange(2), ("a", "b"))


def bright() -> Arrays:
    """Another one, with pixels up to 255 as floats."""
    x = np.full((4, 1, 3, 3), 255.0, np.float32)
    return Arrays(x, np.arange(4) % 2, x[:2], np.arange(2), ("a", "b"))


def test_datasets_of_other_functions_are_looked_at_too() -> None:
    with pytest.raises(UserError, match="the training set has infinite numbers in 1 of 4 samples"):
        load_arrays(f"{__name__}:shaky", {})
    assert any("are kept as they are" in line for line in load_arrays(f"{__name__}:bright", {}).card())


def damaged(kind: str, file: Path) -> None:
    x, y = images(50, 8, 8), np.arange(50) % 2
    np.savez_compressed(file, x=x, y=y)
    whole = file.read_bytes()
    if kind == "half":
        file.write_bytes(whole[: len(whole) // 2])
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "folder":
        file.unlink()
        file.mkdir()
    elif kind == "flipped":
        file.write_bytes(whole[:200] + bytes(255 - b for b in whole[200:1200]) + whole[1200:])
    elif kind == "objects":
        np.savez(file, x=x, y=np.array([{}, []], object))
    elif kind == "pickle":
        file.write_bytes(pickle.dumps({"x": x}))
    elif kind == "array":
        with file.open("wb") as stream:
            np.save(stream, x)
    elif kind == "list":
        with file.open("wb") as stream:
            np.save(stream, np.array([{}], object), allow_pickle=True)
    elif kind == "not-numpy":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("x.npy", b"hello")
            archive.writestr("y.npy", b"hello")
    elif kind == "foreign":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("x", "hello")
            archive.writestr("y", "hello")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("half", "not a readable"),
        ("empty", "it is empty"),
        ("folder", "a folder, not an archive"),
        ("flipped", "key 'x' is damaged"),
        ("objects", "key 'y' cannot be read without pickle"),
        ("pickle", "not a readable"),
        ("array", "a single array"),
        ("list", "not a readable"),
        ("not-numpy", "'x'"),
        ("foreign", "'x'"),
    ],
)
def test_damaged_archives_are_named(kind: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    damaged(kind, file)
    with pytest.raises(UserError, match=rf"a\.npz: .*{said}") as caught:
        load_arrays(f"npz:{file}", {})
    assert "\n" not in str(caught.value)


def test_an_archive_that_unpacks_beyond_the_memory_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.npz"
    np.savez_compressed(file, x=np.zeros((1000, 1000), np.uint8), y=np.zeros(1000, int))
    assert file.stat().st_size < 10_000
    monkeypatch.setattr(archives, "_memory", lambda: 1_000_000)
    with pytest.raises(
        UserError, match=r"a\.npz: unpacks to 0\.0 GB, more than half of this machine's memory"
    ):
        npz(path=str(file))


def test_keys_that_nobody_asks_for_may_hold_anything(tmp_path: Path) -> None:
    found = read(tmp_path, x=images(10, 4, 4), y=np.arange(10) % 2, meta=np.array([{}], object))
    assert any("skipped keys: meta" in line for line in found.card())


def test_a_column_of_attributes_may_have_two_axes(tmp_path: Path) -> None:
    ages = np.arange(10)[:, None] / 2
    found = read(
        tmp_path, x=images(10, 5), y=np.arange(10) % 2, z_age=ages, groups=np.arange(10)[:, None] % 3
    )
    assert found.train_z is not None
    assert found.test_z is not None
    assert sorted([*found.train_z[:, 0], *found.test_z[:, 0]]) == ages[:, 0].tolist()


def test_text_among_numbers_is_no_attribute(tmp_path: Path) -> None:
    ages = np.array(["23", "NA", "41", "35"])
    with pytest.raises(UserError, match=r"'z_age' \(train\), sample 1: 'NA' is no number"):
        read(tmp_path, x=images(4, 5), y=np.arange(4) % 2, z_age=ages)


def test_the_same_letters_are_the_same_class(tmp_path: Path) -> None:
    """Accents are stored in two ways; a class of both would be two that look alike."""
    written = np.array(["caf\u00e9", "cafe\u0301 ", "tea"])
    found = read(tmp_path, x=images(6, 4, 4), y=written[[0, 1, 2, 0, 1, 2]])
    assert found.classes == ("caf\u00e9", "tea")
    named = read(tmp_path, x=images(6, 4, 4), y=written[[0, 1, 2, 0, 1, 2]], classes=written[1:])
    assert named.classes == ("caf\u00e9", "tea")


def test_an_archive_without_samples_says_so(tmp_path: Path) -> None:
    np.savez(tmp_path / "none.npz", x=images(0, 4, 4), y=np.arange(0))
    with pytest.raises(UserError, match="the training set is empty"):
        load_arrays(f"npz:{tmp_path / 'none.npz'}", {})
