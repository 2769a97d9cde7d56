"""`torchvision:NAME`: image classification sets that torchvision downloads (CIFAR100, Food101, ...).

They are downloaded once, by torchvision and with its checks, into the cache; subsets are chosen from the
labels before any image is decoded.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np

from fedsim.data.archives import DAMAGE
from fedsim.data.pixels import rgb
from fedsim.data.sources import Array, Arrays, Integers, fixed_subset, stratified
from fedsim.data.store import cache_folder
from fedsim.errors import UserError, nearest
from fedsim.ranges import Count

_TEST_FRACTION = 0.2  # of sets that come in one piece
#: names of the training part, the first that a set knows
_TRAIN = ("trainval", "train")


def torchvision_set(
    *,
    name: str,
    size: Count | None = None,
    train_samples: Count | None = None,
    test_samples: Count | None = None,
) -> Arrays:
    """An image classification set of torchvision, downloaded once.

    Args:
        name: a class of `torchvision.datasets`: CIFAR100, Flowers102, OxfordIIITPet, Food101, DTD,
            Caltech101, SVHN, EuroSAT, ... A set without a test part gives a fixed fifth of each class.
        size: height and width: the shorter side is resized to it, the centre cut out (default: images
            stay as they are, for sets whose images are all equally large).
        train_samples: a fixed subset of so many training images, stratified by class (default: all).
        test_samples: the same for the test images.

    Returns:
        uint8 [n, 3, h, w].

    Raises:
        UserError: no such set, it cannot be downloaded, or images differ in size and `size` is not given.
    """
    made = _opened(name)
    labels = [_labels(part) for part in made]
    classes = _classes(made[0], 1 + max(int(own.max()) for own in labels))
    if len(made) == 1:
        test = stratified(labels[0], _TEST_FRACTION, seed=0)
        kept = [np.setdiff1d(np.arange(len(labels[0])), test), test]
        made, labels = [made[0], made[0]], [labels[0], labels[0]]
    else:
        kept = [np.arange(len(own)) for own in labels]
    parts: list[tuple[Array, Integers]] = []
    wanted = (("train_samples", train_samples), ("test_samples", test_samples))
    for part, own, rows, (key, count) in zip(made, labels, kept, wanted, strict=True):
        chosen = rows[fixed_subset(own[rows], count, key)]
        parts.append((_images(part, chosen, size, name), own[chosen]))
    return Arrays(*parts[0], *parts[1], classes)


def names() -> list[str]:
    """The sets of torchvision."""
    from torchvision import datasets

    return [key for key in datasets.__all__ if isinstance(getattr(datasets, key), type)]


def _opened(name: str) -> list[Any]:
    """The training and the test part, or the whole where there is no such division."""
    from torchvision import datasets

    kind = getattr(datasets, name, None)
    if not isinstance(kind, type):
        raise UserError(f"torchvision has no dataset '{name}': {nearest(name, names())}")
    keys = inspect.signature(kind).parameters
    root = str(cache_folder("torchvision"))
    try:
        if "train" in keys:
            return [kind(root, train=train, download=True) for train in (True, False)]
        if "split" in keys:
            return [_train_part(kind, root), kind(root, split="test", download=True)]
        return [kind(root, download=True)]
    except (*DAMAGE, ImportError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"torchvision cannot give the dataset '{name}' ({reason}); without a network bring the images as "
            f'[data] name = "imagefolder:FOLDER"; half a download is in {root}: delete it'
        ) from error


def _train_part(kind: Any, root: str) -> Any:
    for split in _TRAIN[:-1]:
        try:
            return kind(root, split=split, download=True)
        except ValueError:  # no such split
            continue
    return kind(root, split=_TRAIN[-1], download=True)


def _labels(part: Any) -> Integers:
    """Labels of all images, from the set's own list where it has one (no image is decoded)."""
    for key in ("targets", "_labels", "labels", "y"):
        found = getattr(part, key, None)
        if found is not None and len(found) == len(part):
            return np.asarray(found, np.int64)
    return np.array([label for _, label in (part[row] for row in range(len(part)))], np.int64)


def _classes(part: Any, count: int) -> tuple[str, ...]:
    names = getattr(part, "classes", None) or getattr(part, "categories", None) or range(count)
    return tuple(str(name).replace("_", " ") for name in names)


def _images(part: Any, rows: Integers, size: int | None, name: str) -> Array:
    pixels: Array | None = None
    for place, row in enumerate(rows):
        try:
            one = _pixels(part[int(row)][0], size, f"'torchvision:{name}', image {row}")
        except DAMAGE as error:
            raise UserError(
                f"'torchvision:{name}': image {row} cannot be read ({error}); delete the set's files in "
                f"{cache_folder('torchvision')}, they are downloaded again"
            ) from error
        if pixels is None:
            pixels = np.empty((len(rows), *one.shape), np.uint8)
        if one.shape != pixels.shape[1:]:
            raise UserError(
                f"the images of 'torchvision:{name}' differ in size ({pixels.shape[2:]}, {one.shape[1:]}); "
                "give [data] size, for example size = 224"
            )
        pixels[place] = one
    if pixels is None:
        raise UserError(f"'torchvision:{name}' has no images")
    return pixels


def _pixels(image: Any, size: int | None, where: str) -> Array:
    """A PIL image as uint8 [3, h, w]."""
    from PIL import Image

    image = rgb(image, where)
    if size is not None:
        width, height = image.size
        scale = size / min(width, height)
        large = (max(size, round(width * scale)), max(size, round(height * scale)))
        image = image.resize(large, Image.Resampling.BICUBIC)
        left, top = (large[0] - size) // 2, (large[1] - size) // 2
        image = image.crop((left, top, left + size, top + size))
    return np.asarray(image).transpose(2, 0, 1)
