"""Datasets of your own: a NumPy archive, a folder of images; `[data]` names them by their path."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.data.attributes import UNKNOWN, Attribute, Column, coded, complaint
from fedsim.data.sources import IMAGE_SUFFIXES, UNDIVIDED, Array, Arrays, Integers, image_files, split
from fedsim.errors import UserError
from fedsim.ranges import Count, Portion

#: attributes, their values for training and for the test
Attributes = tuple[tuple[Attribute, ...], Column | None, Column | None]

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|nan|[-+]?inf")


def npz(*, path: str, test_fraction: Portion = 0.2) -> Arrays:
    """A NumPy archive of your own: x_train, y_train, x_test, y_test (or x, y), optionally classes, groups.

    Inputs are images [n, height, width], [n, height, width, 1 or 3] or [n, channels, height, width], or
    anything else [n, ...]; uint8 is kept, other numbers become float32. Labels are integers from 0.
    Pickled objects are refused.

    Attributes are further columns, z_NAME_train and z_NAME_test (or z_NAME): integers (codes, -1: not
    known), text, or floating-point numbers.

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
    attributes, train_z, test_z = _attributes_of(contents, path, whole)
    for z, y in ((train_z, ys[0]), (test_z, ys[-1])):
        reason = complaint(attributes, z, len(y))
        if reason:
            raise UserError(f"{path}: {reason}")
    rest = classes, groups, attributes, train_z, test_z
    if whole:
        return split(Arrays(xs[0], ys[0], xs[0], ys[0], *rest, UNDIVIDED), test_fraction)
    return Arrays(xs[0], ys[0], xs[1], ys[1], *rest)


def _attributes_of(contents: dict[str, Array], path: str, whole: bool) -> Attributes:
    """Attributes of an archive and their values; of a whole one, the same values for both parts."""
    suffixes = {"train": "", "test": ""} if whole else {"train": "_train", "test": "_test"}
    keys = [key for key in contents if key.startswith("z_") and key.endswith(suffixes["train"])]
    names = [key.removeprefix("z_").removesuffix(suffixes["train"]) for key in keys]
    found = []
    for name in names:
        missing = [key for s in suffixes.values() if (key := f"z_{name}{s}") not in contents]
        if missing:
            raise UserError(f"{path}: no key '{missing[0]}', but attribute '{name}' is given for training")
        parts = {part: contents[f"z_{name}{suffix}"] for part, suffix in suffixes.items()}
        found.append(coded(parts, name, f"{path}: 'z_{name}'"))
    if not found:
        return (), None, None
    train, test = (_stacked([columns[part] for _, columns in found], path) for part in suffixes)
    return tuple(attribute for attribute, _ in found), train, test


def _stacked(columns: list[Column], path: str) -> Column:
    if len({len(column) for column in columns}) > 1:
        raise UserError(f"{path}: attributes differ in length: {sorted({len(c) for c in columns})}")
    return np.stack(columns, 1)


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


def imagefolder(*, path: str, size: Count = 32, test_fraction: Portion = 0.2) -> Arrays:
    """A folder of images: one subfolder per class, or train/ and test/ with one subfolder per class each.

    Every image is read as RGB and resized to a square (bilinear). Attributes may stand in a file
    `attributes.csv` in the folder: a first line `file,NAME,...`, then one line per image with its path
    relative to the folder. Whole numbers and text are values of a categorical attribute (empty: not known),
    numbers with a decimal point are numbers.

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
    xs, ys = [x for x, _, _ in loaded], [y for _, y, _ in loaded]
    attributes, train_z, test_z = _attributes_in(root, [files for _, _, files in loaded])
    rest = classes, None, attributes, train_z, test_z
    if len(loaded) == 1:
        return split(Arrays(xs[0], ys[0], xs[0], ys[0], *rest, UNDIVIDED), test_fraction)
    return Arrays(xs[0], ys[0], xs[1], ys[1], *rest)


def _attributes_in(root: Path, files: list[list[Path]]) -> Attributes:
    """Attributes in `attributes.csv`, in the order of the files of the training and the test part."""
    table = root / "attributes.csv"
    if not table.is_file():
        return (), None, None
    rows = _rows_of(table)
    parts: list[list[dict[str, str]]] = []
    for part in files:
        missing = [name for file in part if (name := file.relative_to(root).as_posix()) not in rows]
        if missing:
            raise UserError(f"{table}: no line for '{missing[0]}' ({len(missing)} missing)")
        parts.append([rows[file.relative_to(root).as_posix()] for file in part])
    found = []
    for name in rows[files[0][0].relative_to(root).as_posix()]:
        texts = {
            p: [row[name] or "" for row in part] for p, part in zip(("train", "test"), parts, strict=False)
        }
        where = f"{table}: column '{name}'"
        found.append(coded(_typed(texts, where), name, where))
    if not found:
        return (), None, None
    train, test = (
        np.stack([c[p] for _, c in found], 1) if p in found[0][1] else None for p in ("train", "test")
    )
    return tuple(attribute for attribute, _ in found), train, test


def _rows_of(table: Path) -> dict[str, dict[str, str]]:
    """The lines of a table, by file."""
    try:
        with table.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines)
            names = reader.fieldnames or []
            if "file" not in names:
                raise UserError(f"{table}: the first line must be file,NAME,..., not '{','.join(names)}'")
            rows = {}
            for row in reader:
                if None in row or None in row.values():
                    raise UserError(f"{table}: line {reader.line_num} has not {len(names)} cells")
                rows[row.pop("file")] = row
    except UnicodeDecodeError as error:
        raise UserError(f"{table}: not UTF-8 ({error}); save it as UTF-8") from error
    return rows


def _typed(texts: dict[str, list[str]], where: str) -> dict[str, Array]:
    """Columns of text as integers (empty: -1), else as numbers if there is a decimal point, else as text."""
    everything = [text.strip() for column in texts.values() for text in column]
    there = [text for text in everything if text]
    kind: Any = str
    if there and all(re.fullmatch(r"-?\d+", text) for text in there):
        kind = np.int64
    elif there and all(_NUMBER.fullmatch(text) for text in there):
        if len(there) < len(everything):
            raise UserError(f"{where}: a number is missing; leave such images out, or make it categorical")
        kind = np.float64
    empty = str(UNKNOWN) if kind is np.int64 else ""
    return {
        part: np.array([text.strip() or empty for text in column]).astype(kind)
        for part, column in texts.items()
    }


def _read_images(folder: Path, classes: tuple[str, ...], size: int) -> tuple[Array, Integers, list[Path]]:
    from PIL import Image

    unknown = {sub.name for sub in folder.iterdir() if sub.is_dir()} - set(classes)
    if unknown:
        raise UserError(f"{folder}: class '{min(unknown)}' has no folder among the training images")
    files = [(file, label) for label, name in enumerate(classes) for file in image_files(folder / name)]
    if not files:
        known = ", ".join(sorted(IMAGE_SUFFIXES))
        raise UserError(f"{folder}: no image files ({known}) in its class folders")
    x = np.empty((len(files), 3, size, size), np.uint8)
    for row, (file, _) in enumerate(files):
        try:
            with Image.open(file) as image:
                small = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
        except OSError as error:
            raise UserError(f"{file}: not a readable image ({error}); remove or replace it") from error
        x[row] = np.asarray(small).transpose(2, 0, 1)
    return x, np.array([label for _, label in files], np.int64), [file for file, _ in files]
