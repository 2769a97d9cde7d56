"""`npz:FILE`: a NumPy archive of your own as a dataset.

keys ─ parts (train, val, test) ─ layout of the axes ─ value range ─ labels ─> Arrays, with a data card
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from fedsim.data import archives, labels, layouts, pixels
from fedsim.data.attribute_tables import strange
from fedsim.data.attributes import Attribute, Column, coded, complaint
from fedsim.data.layouts import Layout
from fedsim.data.pixels import ValueRange, Wanted
from fedsim.data.sources import UNDIVIDED, Array, Arrays, Integers, repeated, split
from fedsim.errors import UserError
from fedsim.ranges import Portion

#: part -> keys of its inputs and its labels
_Keys = Mapping[str, tuple[str, str]]


def npz(
    *, path: str, test_fraction: Portion = 0.2, layout: Layout = "auto", value_range: Wanted = "auto"
) -> Arrays:
    """A NumPy archive of your own: x_train, y_train, x_test, y_test (or x, y), optionally classes, groups.

    Other usual names do, too: train_images and train_labels, X and y, data and target, and so on; a part
    `val` joins the training part (without a part `test` it is the test set). Inputs are grey images
    [n, height, width], images [n, height, width, channels] or [n, channels, height, width], windows of
    signals [n, time, channels] or [n, channels, time], or anything else [n, ...]. Labels are integers, text
    or one-hot; without `classes` the values that occur are the classes. Pickled objects are refused.

    Attributes are further columns, z_NAME_train and z_NAME_test (or z_NAME): integers (codes, -1: not
    known), text, or floating-point numbers.

    Args:
        path: the file; relative to the experiment file, then to the current folder.
        test_fraction: share of each class that is the test set (only for an archive without one).
        layout: order of the inputs' axes: N samples, C channels, H height, W width, T time (default: from
            the shape).
        value_range: the values that are black and white, [0, 255] say; "keep": values are used as they are
            (default: decided from dtype and values).

    Raises:
        UserError: names the file, and the key that cannot be used.
    """
    with archives.opened(path) as archive:
        keys = archives.keys_of(archive.files, path)
        x = {key: archives.numbers(archives.entry(archive, path, key), path, key) for key, _ in keys.values()}
        y = {key: archives.entry(archive, path, key) for _, key in keys.values()}
        named = next((key for key in archives.CLASS_NAMES if key in archive.files), None)
        names = archives.entry(archive, path, named) if named else None
        rest = {
            key: archives.entry(archive, path, key)
            for key in archive.files
            if key.startswith("z_") or key in ("groups", "groups_val")
        }
        unused = set(archive.files) - x.keys() - y.keys() - rest.keys() - {named}
    x, ranges, notes = _inputs(x, path, layout, value_range)
    y, classes, more = labels.coded_labels(y, path, names)
    sizes = {part: len(y[key]) for part, (_, key) in keys.items()}
    for x_key, y_key in keys.values():
        if len(x[x_key]) != len(y[y_key]):
            raise UserError(
                f"{path}: '{x_key}' has {len(x[x_key])} samples but its labels are {len(y[y_key])}"
            )
    attributes, z = _attributes(rest, path, keys, sizes)
    parts = {
        part: (x[x_key], y[y_key], z.get(part), _groups(rest, path, part, sizes) if part != "test" else None)
        for part, (x_key, y_key) in keys.items()
    }
    notes = [*_joined(parts, keys), *more, *notes]
    if unused:
        notes.append(f"skipped keys: {', '.join(sorted(unused))}")
    (train_x, train_y, train_z, groups), tested = parts["train"], parts.get("test")
    common: dict[str, Any] = {"notes": tuple(notes), "ranges": ranges}
    if tested is None:
        whole = Arrays(
            train_x, train_y, train_x, train_y, classes, groups, attributes, train_z, train_z, UNDIVIDED,
            **common,
        )  # fmt: skip
        return _compared(split(whole, test_fraction))
    test_x, test_y, test_z, _ = tested
    return _compared(
        Arrays(train_x, train_y, test_x, test_y, classes, groups, attributes, train_z, test_z, **common)
    )


#: inputs, labels, attributes and owners of a part
_Part = tuple[Array, Integers, Column | None, Integers | None]


def _joined(parts: dict[str, _Part], keys: _Keys) -> list[str]:
    """Make `train` and `test` of what there is (in place), and say so."""
    if "val" not in parts:
        return [] if "test" in parts else ["no test part: a fixed share of each class is the test set"]
    val = parts.pop("val")
    if "test" not in parts:
        parts["test"] = val
        return [f"there is no test part: '{keys['val'][0]}' is the test set"]
    pairs = zip(parts["train"], val, strict=True)
    parts["train"] = tuple(  # type: ignore[assignment]
        None if a is None or b is None else np.concatenate([a, b]) for a, b in pairs
    )
    return [
        f"'{keys['val'][0]}' joins the training data ([evaluation] validation holds a share of them back)"
    ]


def _inputs(
    x: Mapping[str, Array], path: str, layout: Layout, wanted: Wanted
) -> tuple[dict[str, Array], tuple[ValueRange, ...], list[str]]:
    """Inputs by key as models take them, the same way for all, with what was decided."""
    arranged, images, notes = layouts.arranged(x, layout, path)
    seen = pixels.spread(arranged.values())
    if not images and wanted == "auto":
        what = f"inputs: {seen.dtype} values from {seen.low:g} to {seen.high:g}"
        if seen.dtype == "uint8":
            return arranged, (), [*notes, f"{what} are divided by 255"]
        made = {key: values.astype(np.float32) for key, values in arranged.items()}
        return made, (), [*notes, f"{what} are taken as they are (no images)"]
    chosen = pixels.decide(seen, wanted, f"{path}: {' and '.join(x)}")
    made = {key: pixels.scaled(values, seen, chosen) for key, values in arranged.items()}
    told = pixels.described(seen, chosen, "pixels" if images else "inputs")
    return made, (chosen,), [*notes, told]


def _groups(rest: Mapping[str, Array], path: str, part: str, sizes: Mapping[str, int]) -> Integers | None:
    """Owners of a training part's samples."""
    if "groups" not in rest:
        if "groups_val" in rest:
            raise UserError(f"{path}: 'groups_val' names owners, but there is no key 'groups' for training")
        return None
    key = "groups" if part == "train" else "groups_val"
    if key not in rest:
        if "test" not in sizes:  # the part is the test set
            return None
        raise UserError(f"{path}: 'groups' names owners of the training samples, but there is no key '{key}'")
    found = {name: labels.column(rest[name], path, name, []) for name in ("groups", key)}
    if len(found[key]) != sizes[part]:
        where = "training" if part == "train" else "validation"
        raise UserError(f"{path}: '{key}' has {len(found[key])} entries for {sizes[part]} {where} samples")
    if found[key].dtype.kind != "U":
        return found[key]
    known = np.unique(np.concatenate([labels.column(rest[k], path, k, []) for k in rest if k[:2] != "z_"]))
    return np.searchsorted(known, found[key]).astype(np.int64)


def _attributes(
    rest: Mapping[str, Array], path: str, keys: _Keys, sizes: Mapping[str, int]
) -> tuple[tuple[Attribute, ...], dict[str, Column]]:
    """Attributes of an archive and their values by part."""
    columns_of = [key for key in rest if key.startswith("z_")]
    whole = not any(key.endswith("_train") for key in columns_of)
    suffixes = {part: "" if part == "train" and whole else f"_{part}" for part in keys}
    others = tuple(suffix for suffix in suffixes.values() if suffix != suffixes["train"])
    found = []
    for key in columns_of:
        other = next((suffix for suffix in others if key.endswith(suffix)), None)
        if other is not None:
            if (own := key.removesuffix(other) + suffixes["train"]) not in rest:
                raise UserError(f"{path}: '{key}' is given, but there is no key '{own}' for training")
            continue
        if not key.endswith(suffixes["train"]):
            raise UserError(f"{path}: '{key}' is of no part; name it {key}_train, as the others")
        name = key.removeprefix("z_").removesuffix(suffixes["train"])
        missing = [other for s in suffixes.values() if (other := f"z_{name}{s}") not in rest]
        if missing:
            raise UserError(f"{path}: no key '{missing[0]}', but attribute '{name}' is given for training")
        columns = {part: _flat(rest[f"z_{name}{suffix}"]) for part, suffix in suffixes.items()}
        _check_text(columns, path, name)
        found.append(coded(columns, name, f"{path}: 'z_{name}'"))
    if not found:
        return (), {}
    attributes = tuple(attribute for attribute, _ in found)
    z = {part: _stacked([values[part] for _, values in found], path) for part in keys}
    for part, values in z.items():
        reason = complaint(attributes, values, sizes[part])
        if reason:
            raise UserError(f"{path}: {reason}")
    return attributes, z


def _flat(column: Array) -> Array:
    """[n, 1] as [n]."""
    return column[:, 0] if column.ndim == 2 and column.shape[1] == 1 else column


def _check_text(columns: Mapping[str, Array], path: str, name: str) -> None:
    """Raise UserError for numbers that are stored as text because one of them is none."""
    for part, values in columns.items():
        if values.dtype.kind in "US":
            texts = [text.strip() for text in values.astype(str).ravel().tolist()]
            odd = strange(texts)
            if odd is not None and texts[odd]:
                raise UserError(
                    f"{path}: 'z_{name}' ({part}), sample {odd}: '{texts[odd]}' is no number, but others "
                    "are; store numbers, or names in all places"
                )


def _stacked(columns: list[Column], path: str) -> Column:
    if len({len(column) for column in columns}) > 1:
        raise UserError(f"{path}: attributes differ in length: {sorted({len(c) for c in columns})}")
    return np.stack(columns, 1)


def _compared(arrays: Arrays) -> Arrays:
    """Say how many test samples stand among the training samples (rows of a table may do so by chance)."""
    if arrays.train_x.ndim < 3:
        return arrays
    twice = repeated(arrays.train_x, arrays.test_x)
    if not len(twice):
        return arrays
    told = (
        f"test samples that are training samples, too, bit by bit: {len(twice)} (the first: test sample "
        f"{twice[0]}); accuracy will be too good"
    )
    return replace(arrays, notes=(*arrays.notes, told))
