"""Labels as people store them -> positions in the list of classes, with the classes' names."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fedsim.errors import UserError, listed, nearest

Array = npt.NDArray[Any]
Integers = npt.NDArray[np.int64]

_MANY = 1000  #: classes that are plausible however few samples there are


def coded_labels(
    columns: Mapping[str, Array], path: str, names: Array | None
) -> tuple[dict[str, Integers], tuple[str, ...], list[str]]:
    """Labels of all parts as positions in one list of classes.

    Integers, whole floats, True and False, text, one-hot rows, [n] or [n, 1]. Without names of classes, the
    values that occur are the classes: 3, 7, 900 are three classes of these names.

    Args:
        columns: labels by key, one key per part.
        path: the file, for messages.
        names: of the classes, whose positions (or names) the labels are; None: not given.

    Returns:
        int64 [n] by key, names of the classes, notes for the data card.

    Raises:
        UserError: names the key, and what is no label.
    """
    notes: list[str] = []
    flat = {key: column(y, path, key, notes) for key, y in columns.items()}
    text = {y.dtype.kind == "U" for y in flat.values()}
    if len(text) > 1:
        raise UserError(f"{path}: {' and '.join(flat)}: text in one, numbers in the other; store them alike")
    if names is not None:
        classes = _names(names, path)
        return {key: _positions(y, classes, path, key) for key, y in flat.items()}, classes, notes
    every = np.concatenate(list(flat.values()))
    values = np.unique(every)
    if text == {True} and len(values) and not values[0]:
        raise UserError(
            f"{path}: {' and '.join(flat)}: labels that are empty: {np.sum(every == '')}; name them"
        )
    if text == {False} and len(values) and values[0] < 0 and values.tolist() != [-1, 1]:
        raise UserError(
            f"{path}: {' and '.join(flat)}: labels below 0: {np.sum(every < 0)} (the lowest: {values[0]}); "
            "leave unlabelled samples out, or store labels as text"
        )
    if len(values) > max(_MANY, len(every) // 2):
        raise UserError(
            f"{path}: {' and '.join(flat)}: {len(values)} different labels for {len(every)} samples; these "
            "look like numbers or ids, not like classes"
        )
    classes = tuple(map(str, values.tolist()))
    if text == {False} and values.tolist() != list(range(len(values))):
        notes.append(f"labels: the {len(classes)} values that occur are the classes: {listed(classes)}")
    return {key: np.searchsorted(values, y).astype(np.int64) for key, y in flat.items()}, classes, notes


def column(y: Array, path: str, key: str, notes: list[str]) -> Array:
    """A column of labels or owners as int64 [n] or text [n].

    Raises:
        UserError: it is neither, or has several columns that are not one-hot.
    """
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim == 2 and y.shape[1] > 1 and y.dtype.kind in "uifb" and _one_hot(y):
        notes.append(f"labels: '{key}' is one-hot; the column of the 1 is the class")
        y = y.argmax(1)
    if y.ndim == 2 and y.dtype.kind in "uifb" and set(np.unique(y[:100]).tolist()) <= {0, 1}:
        raise UserError(
            f"{path}: '{key}' has several labels in a row {list(y.shape)}; one label per sample is needed"
        )
    if y.ndim == 1 and y.dtype.kind == "f":
        odd = np.flatnonzero(~np.isfinite(y) | (y != np.floor(y)) | (np.abs(y) >= 2**53))
        if len(odd):
            raise UserError(
                f"{path}: '{key}' must be integers, but not all of its numbers are (first, sample {odd[0]}: "
                f"{y[odd[0]]:g}); classes are whole numbers or text"
            )
    if y.ndim == 1 and y.dtype.kind == "S":
        y = np.char.decode(y, "utf-8", "replace")
    if y.ndim != 1 or y.dtype.kind not in "uifbU":
        raise UserError(f"{path}: '{key}' must be integers or text [n], not {y.dtype} {list(y.shape)}")
    return np.array(_texts(y), str) if y.dtype.kind == "U" else y.astype(np.int64)


def _texts(column: Array) -> list[str]:
    """Stripped; the same letters are the same text, however a system stores accents."""
    return [unicodedata.normalize("NFC", text.strip()) for text in column.tolist()]


def _one_hot(y: Array) -> bool:
    return bool(np.isin(y, (0, 1)).all() and (y.sum(1) == 1).all())


def _names(names: Array, path: str) -> tuple[str, ...]:
    if names.ndim != 1 or names.dtype.kind not in "uiUS":
        raise UserError(f"{path}: 'classes' must be text [classes], not {names.dtype} {list(names.shape)}")
    texts = np.char.decode(names, "utf-8", "replace") if names.dtype.kind == "S" else names
    return tuple(_texts(texts.astype(str)))


def _positions(y: Array, classes: tuple[str, ...], path: str, key: str) -> Integers:
    """Text labels by their name; integers are positions, which whoever stores the data checks."""
    if y.dtype.kind != "U":
        return y.astype(np.int64)
    position = {name: number for number, name in enumerate(classes)}
    unknown = sorted(set(y.tolist()) - position.keys())
    if unknown:
        raise UserError(f"{path}: '{key}' has a label '{unknown[0]}': {nearest(unknown[0], classes)}")
    return np.array([position[name] for name in y.tolist()], np.int64)
