"""Folders of images as people have them: splits, hidden things, links, copies."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedsim.data.folders import look, sort_images
from fedsim.data.image_folders import imagefolder
from fedsim.data.sources import Arrays
from fedsim.data.store import load_arrays
from fedsim.errors import UserError


def paint(root: Path, *names: str, count: int = 2) -> None:
    """`count` images of colours of their own in each of some folders."""
    for name in names:
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            colour = (*np.random.default_rng(sum(map(ord, f"{name}{number}"))).integers(0, 255, 3).tolist(),)
            Image.new("RGB", (4, 4), colour).save(root / name / f"{number}.png")


def read(root: Path) -> Arrays:
    return imagefolder(path=str(root), size=4)


def sizes(root: Path) -> tuple[tuple[str, ...], int, int]:
    found = read(root)
    return found.classes, len(found.train_y), len(found.test_y)


@pytest.mark.parametrize(
    ("train", "test"),
    [("train", "test"), ("Train", "TEST"), ("training", "testing"), ("Training", "validation")],
)
def test_splits_are_recognised_by_any_usual_name(train: str, test: str, tmp_path: Path) -> None:
    paint(tmp_path, f"{train}/cat", f"{train}/dog", count=3)
    paint(tmp_path, f"{test}/cat", f"{test}/dog", count=1)
    assert sizes(tmp_path) == (("cat", "dog"), 6, 2)


def test_val_is_the_test_set_or_joins_the_training_images(tmp_path: Path) -> None:
    paint(tmp_path, "train/a", "train/b", count=3)
    paint(tmp_path, "val/a", "val/b")
    assert sizes(tmp_path) == (("a", "b"), 6, 4)
    assert any("val is the test set" in line for line in read(tmp_path).card())
    paint(tmp_path, "test/a", count=1)
    found = read(tmp_path)
    assert (len(found.train_y), len(found.test_y)) == (10, 1)
    assert any("val joins the training images" in line for line in found.card())
    assert "classes without test samples: 1 (b)" in found.card()


def test_a_single_folder_is_opened_and_divided(tmp_path: Path) -> None:
    paint(tmp_path / "alone", "train/a", "train/b", count=5)
    assert sizes(tmp_path / "alone") == (("a", "b"), 8, 2)
    paint(tmp_path / "wrapped", "photos/Train/a", "photos/Train/b", "photos/Test/a")
    assert sizes(tmp_path / "wrapped") == (("a", "b"), 4, 2)
    paint(tmp_path / "inner", "pets/a", "pets/b", count=5)
    assert sizes(tmp_path / "inner") == (("a", "b"), 8, 2)


def test_splits_inside_class_folders_are_the_same(tmp_path: Path) -> None:
    paint(tmp_path, "cat/train", "dog/train", count=3)
    paint(tmp_path, "cat/test", "dog/test", count=1)
    assert sizes(tmp_path) == (("cat", "dog"), 6, 2)


def test_a_train_beside_cars_is_a_class(tmp_path: Path) -> None:
    paint(tmp_path, "car", "ship", "train/steam", "train/diesel", count=5)
    assert sizes(tmp_path)[0] == ("car", "ship", "train")


@pytest.mark.parametrize(
    "folders",
    [("train/cat", "train/dog", "eval/cat", "eval/dog"), ("cat", "dog", "train/cat", "train/dog")],
)
def test_half_a_split_is_refused_before_it_becomes_a_class(folders: tuple[str, ...], tmp_path: Path) -> None:
    paint(tmp_path, *folders)
    with pytest.raises(UserError, match=r"train has class folders like a split, but '(eval|cat)' beside it"):
        read(tmp_path)


def test_a_folder_that_no_split_is_named_like_is_left_out_and_said(tmp_path: Path) -> None:
    paint(tmp_path, "train/a", "train/b", "test/a", "test/b", "holdout/a", "holdout/b")
    assert sizes(tmp_path) == (("a", "b"), 4, 4)
    said = "left out beside the splits: holdout (no split's name, or no class folders inside)"
    assert said in read(tmp_path).card()


def test_unlabelled_test_images_are_no_class(tmp_path: Path) -> None:
    paint(tmp_path, "train/a", "train/b", count=5)
    paint(tmp_path, "test")
    found = read(tmp_path)
    assert (found.classes, len(found.test_y)) == (("a", "b"), 2)
    assert any("left out beside the splits: test" in line for line in found.card())
    paint(tmp_path / "flat", "train", "test")
    with pytest.raises(UserError, match="test, train are splits, but have no class folders"):
        read(tmp_path / "flat")
    paint(tmp_path / "only", "val/a", "test/a")
    with pytest.raises(UserError, match="none to train on"):
        read(tmp_path / "only")


def test_hidden_things_are_skipped_and_counted(tmp_path: Path) -> None:
    paint(tmp_path, "cat", "dog", count=5)
    plain = read(tmp_path)
    paint(tmp_path, ".ipynb_checkpoints", "__MACOSX/cat", "cat/.ipynb_checkpoints", "cat/@eaDir")
    (tmp_path / "cat" / "._0.png").write_bytes(b"resource fork")
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store"):
        (tmp_path / "dog" / name).write_bytes(b"x")
    (tmp_path / "dog" / "notes.txt").write_text("no image")
    Image.new("RGB", (4, 4)).save(tmp_path / "cover.png")
    found = read(tmp_path)
    assert found.digest == plain.digest
    card = "\n".join(found.card())
    assert "skipped hidden files or folders: 8" in card
    assert "skipped files that are no images: 1 (.txt)" in card
    assert "skipped images outside class folders: 1 (cover.png)" in card


def test_links_are_followed_once_and_dead_ones_named(tmp_path: Path) -> None:
    paint(tmp_path / "elsewhere", "deep/more", count=5)
    root = tmp_path / "root"
    paint(root, "a", count=5)
    os.symlink(tmp_path / "elsewhere" / "deep", root / "b")
    os.symlink(root, root / "a" / "loop")
    os.symlink(tmp_path, root / "a" / "up")
    os.symlink(root / "b", root / "a" / "again")
    assert sizes(root) == (("a", "b"), 8, 2)
    assert any("skipped links to folders that are read anyway: 3" in line for line in read(root).card())
    os.symlink(tmp_path / "gone.png", root / "a" / "9.png")
    with pytest.raises(UserError, match=r"a/9\.png: a link to what is not there"):
        read(root)


def test_copies_in_both_splits_are_counted(tmp_path: Path) -> None:
    paint(tmp_path, "train/a", "train/b", "test/a")
    assert not any("pixel by pixel" in line for line in read(tmp_path).card())
    (tmp_path / "test" / "a" / "copy.png").write_bytes((tmp_path / "train" / "b" / "1.png").read_bytes())
    assert any(
        "too, pixel by pixel: 1 (the first: test/a/copy.png)" in line for line in read(tmp_path).card()
    )
    paint(tmp_path / "whole", "a", "b", count=5)  # copies that are divided by us, too
    for number in range(5):
        first = (tmp_path / "whole" / "a" / f"{number}.png").read_bytes()
        (tmp_path / "whole" / "a" / f"{number} (1).png").write_bytes(first)
    assert any("pixel by pixel" in line for line in read(tmp_path / "whole").card())


def test_empty_classes_are_named_and_unknown_ones_refused(tmp_path: Path) -> None:
    paint(tmp_path, "train/a", "train/b", "test/a")
    (tmp_path / "train" / "c").mkdir()
    found = read(tmp_path)
    assert found.classes == ("a", "b", "c")
    assert "classes without training samples: 1 (c)" in found.card()
    paint(tmp_path, "test/B")
    with pytest.raises(
        UserError, match="class 'B' has no folder among the training images: did you mean 'b'"
    ):
        read(tmp_path)


def test_one_name_is_one_class_however_its_accent_is_stored(tmp_path: Path) -> None:
    paint(tmp_path, "train/caf\u00e9", "train/tea", "test/cafe\u0301")
    found = read(tmp_path)
    assert found.classes == ("caf\u00e9", "tea")
    assert found.test_y.tolist() == [0, 0]


def test_the_cache_sees_what_is_added_behind_a_link(tmp_path: Path) -> None:
    paint(tmp_path / "elsewhere", "more", count=5)
    paint(tmp_path / "root", "a", count=5)
    os.symlink(tmp_path / "elsewhere" / "more", tmp_path / "root" / "b")
    name = f"imagefolder:{tmp_path / 'root'}"
    first = load_arrays(name, {"size": 4})
    assert load_arrays(name, {"size": 4}).card() == first.card() == read(tmp_path / "root").card()
    Image.new("RGB", (4, 4)).save(tmp_path / "elsewhere" / "more" / "new.png")
    assert len(load_arrays(name, {"size": 4}).train_y) == len(first.train_y) + 1
    assert sort_images(look(tmp_path / "root")).test is None
