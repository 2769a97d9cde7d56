"""`imagefolder:FOLDER`: a folder of images as a dataset (which image is what: `fedsim.data.folders`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from fedsim.data import attribute_tables, folders, pixels
from fedsim.data.pixels import Spread, ValueRange
from fedsim.data.sources import UNDIVIDED, Array, Arrays, repeated, split_rows
from fedsim.errors import UserError
from fedsim.ranges import Count, Portion


def imagefolder(
    *,
    path: str,
    size: Count = 32,
    test_fraction: Portion = 0.2,
    value_range: Literal["auto"] | list[float] = "auto",
) -> Arrays:
    """A folder of images: one subfolder per class, or splits (train, val, test) with such subfolders each.

    Every image is read as RGB and resized to a square (bilinear). EXIF rotation is applied, transparent parts
    are shown on white. Attributes may stand in a file `attributes.csv` in the folder: a first line
    `file,NAME,...`, then one line per image with its path relative to the folder. Whole numbers and text are
    values of a categorical attribute (empty: not known), numbers with a decimal point are numbers.

    Args:
        path: the folder; relative to the experiment file, then to the current folder.
        size: height and width in pixels.
        test_fraction: share of each class that is the test set (when there is neither test nor val).
        value_range: the values that are black and white, [0, 4095] say (default: decided from the files).

    Returns:
        uint8 [n, 3, size, size]; classes are the names of the subfolders, sorted.

    Raises:
        UserError: names the file or folder that cannot be used.
    """
    root = Path(path)
    if not root.is_dir():
        raise UserError(f"no folder '{path}' (key 'path' of [data] name = \"imagefolder:PATH\")")
    tree = folders.look(root)
    found = folders.sort_images(tree)
    parts = [found.train] if found.test is None else [found.train, found.test]
    files = [file for part in parts for file, _ in part]
    x, ranges, notes = _read(files, size, value_range)
    y = np.array([label for part in parts for _, label in part], np.int64)
    if found.test is None:
        train, test = split_rows(y, test_fraction)
        told = f"no test images: {test_fraction:g} of each class, chosen once and for all, are the test set"
        notes = [told, *notes]
    else:
        train, test = np.split(np.arange(len(y)), [len(found.train)])
    attributes, z, missing = attribute_tables.read(root, files)
    twice = repeated(x[train], x[test])
    if len(twice):
        notes.append(
            f"test images that are training images, too, pixel by pixel: {len(twice)} (the first: "
            f"{files[test[twice[0]]].relative_to(root)}); accuracy will be too good"
        )
    whole = Arrays(
        x, y, x, y, found.classes, None, attributes, z, z, UNDIVIDED,
        notes=(*found.notes, *missing, *notes), ranges=ranges,
    )  # fmt: skip
    return whole.divided(train, test)


def _read(
    files: Sequence[Path], size: int, wanted: pixels.Wanted
) -> tuple[Array, tuple[ValueRange, ...], list[str]]:
    """All images, uint8 [n, 3, size, size], with what was decided and done.

    Images of more than 8 bits wait until all are read: the range is decided over all of them.
    """
    from PIL import Image

    x = np.empty((len(files), 3, size, size), np.uint8)
    waiting: dict[str, list[tuple[int, Array]]] = {}
    seen: dict[str, Spread] = {}
    done: Counter[str] = Counter()
    for row, file in enumerate(files):
        picture = pixels.read_picture(file)
        done.update(picture.remarks)
        own = picture.spread
        if wanted != "auto":
            pixels.decide(own, wanted, str(file))  # names the file whose values lie outside
        seen[own.dtype] = pixels.merged([seen.get(own.dtype, own), own])
        small = np.asarray(picture.image.resize((size, size), Image.Resampling.BILINEAR))
        if picture.image.mode == "RGB" and wanted == "auto":
            x[row] = small.transpose(2, 0, 1)
        else:
            waiting.setdefault(own.dtype, []).append((row, small))
    ranges, notes = [], []
    for dtype, spread in seen.items():
        chosen = pixels.decide(spread, wanted, f"{dtype} images")
        if chosen.low is None or chosen.high is None:
            raise UserError(
                f"{files[waiting[dtype][0][0]]}: {dtype} values from {spread.low:g} to {spread.high:g} (over "
                "all such files) fit no usual range; set [data] value_range = [black, white]"
            )
        for row, small in waiting.get(dtype, []):
            unit = (small.astype(np.float32) - chosen.low) / (chosen.high - chosen.low)
            level = np.rint(np.clip(unit, 0, 1) * 255).astype(np.uint8)
            x[row] = level if level.ndim == 2 else level.transpose(2, 0, 1)
        ranges.append(chosen)
        notes.append(pixels.described(spread, chosen))
    return x, tuple(ranges), [*notes, *(f"images {what}: {count}" for what, count in done.items())]
