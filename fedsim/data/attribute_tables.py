"""`attributes.csv` beside a folder of images: one line per image, one column per attribute.

A column is integers, numbers or text as a whole. A cell that does not fit its column is an error that names
line, column and cell: taken as text, one `NA` or `0,5` would turn ages into names.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedsim.data.attributes import UNKNOWN, Attribute, Column, coded
from fedsim.data.folders import TABLE
from fedsim.errors import UserError

_WHOLE = re.compile(r"[-+]?\d+")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
#: what spreadsheets make of numbers: decimal commas, signs for thousands, percent (no dates: 01.02.2020)
_ALMOST = re.compile(r"[-+]?\d+([.,' \u00a0\u202f]\d{3})*([.,]\d*)?([eE][-+]?\d+)?\s*%?")
_DIGITS = 18  #: of whole numbers that fit int64
_MISSING = frozenset(["na", "n/a", "#n/a", "nan", "null", "none", "nil", "?", "missing", "inf", "-inf"])
_SEPARATORS = ",;\t"

Rows = dict[str, tuple[int, dict[str, str]]]  #: file -> number of its line, cells by column


def read(root: Path, files: Sequence[Path]) -> tuple[tuple[Attribute, ...], Column | None, list[str]]:
    """Attributes of images as their table says.

    Args:
        root: the folder; without `attributes.csv` there are none.
        files: images below it.

    Returns:
        Attributes, their values float32 [files, attributes] or None, and notes for the data card.

    Raises:
        UserError: names the table, and its line and column where there is one.
    """
    table = root / TABLE
    if not table.is_file():
        return (), None, []
    names, rows = _rows_of(table)
    wanted = [file.relative_to(root).as_posix() for file in files]
    missing = [name for name in wanted if name not in rows]
    if missing:
        raise UserError(f"{table}: no line for '{missing[0]}' ({len(missing)} missing)")
    notes = []
    if extra := len(rows) - len(set(wanted)):
        notes.append(f"{TABLE}: lines for files that are no images of the dataset: {extra}")
    found = []
    for name in names:
        texts = [rows[file][1][name] for file in wanted]
        lines = [rows[file][0] for file in wanted]
        column = typed(texts, str(table), [f"line {line}, column '{name}'" for line in lines], name)
        if column.dtype.kind == "U" and (odd := [text for text in texts if text.lower() in _MISSING]):
            notes.append(f"{TABLE}: '{odd[0]}' is a value of '{name}'; an empty cell says 'not known'")
        found.append(coded({"all": column}, name, f"{table}: column '{name}'"))
    if not found:
        return (), None, notes
    return tuple(attribute for attribute, _ in found), np.stack([c["all"] for _, c in found], 1), notes


def typed(texts: Sequence[str], where: str, places: Sequence[str], name: str) -> npt.NDArray[Any]:
    """A column of stripped text as int64 (empty: -1), else float64 if all cells are numbers, else text.

    Args:
        texts: the cells.
        where: the file.
        places: where each cell stands.
        name: of the column.

    Raises:
        UserError: names the cell that is no number among numbers, or empty among numbers with a point.
    """
    there = [text for text in texts if text]
    if there and all(_WHOLE.fullmatch(text) for text in there):
        long = next((row for row, text in enumerate(texts) if len(text.lstrip("+-0")) > _DIGITS), None)
        if long is not None:
            raise UserError(
                f"{where}: {places[long]}: {texts[long]} is too large for a code of '{name}'; put a letter "
                "in front of ids, a decimal point behind numbers"
            )
        return np.array([int(text) if text else UNKNOWN for text in texts], np.int64)
    odd = strange(texts)
    if odd is not None:
        text = texts[odd]
        if not text:
            raise UserError(
                f"{where}: {places[odd]}: column '{name}': a number is missing; leave such images out, or "
                "make the attribute categorical (whole numbers or text)"
            )
        raise UserError(
            f"{where}: {places[odd]}: '{text}' is no number, but other cells of '{name}' are; write numbers "
            "like 0.5, leave the cell empty where it is not known, or write text into all cells"
        )
    if there and _NUMBER.fullmatch(there[0]):
        return np.array(texts).astype(np.float64)
    return np.array(texts, str)


def strange(texts: Sequence[str]) -> int | None:
    """Position of the first cell that is no number in a column that is meant as numbers; None: all is well.

    A column is meant as numbers if at least half of its cells look like one; cells that are empty, or say
    'not known' as spreadsheets do, do not count.
    """
    telling = [text for text in texts if text and text.lower() not in _MISSING]
    like = sum(bool(_ALMOST.fullmatch(text) or _NUMBER.fullmatch(text)) for text in telling)
    if not telling or 2 * like < len(telling):
        return None
    odd = [number for number, text in enumerate(texts) if text and not _NUMBER.fullmatch(text)]
    return next(iter(odd or [number for number, text in enumerate(texts) if not text]), None)


def _rows_of(table: Path) -> tuple[list[str], Rows]:
    """Names of the columns, and the lines by file; cells are stripped."""
    try:
        with table.open(encoding="utf-8-sig", newline="") as lines:
            first = lines.readline()
            lines.seek(0)
            reader = csv.reader(lines, delimiter=max(_SEPARATORS, key=first.count), strict=True)
            names = [name.strip() for name in next(reader, [])]
            _check_names(table, names)
            rows: Rows = {}
            for cells in reader:
                number = reader.line_num
                if not cells:  # an empty line
                    continue
                if len(cells) != len(names):
                    raise UserError(
                        f"{table}: line {number} has not {len(names)} cells but {len(cells)}; write 0.5 for "
                        "0,5, and quotes around text with a comma"
                    )
                row = dict(zip(names, (cell.strip() for cell in cells), strict=True))
                file = Path(row.pop("file").replace("\\", "/")).as_posix()
                if file in rows:
                    raise UserError(f"{table}: lines {rows[file][0]} and {number} are both for '{file}'")
                rows[file] = number, row
    except UnicodeDecodeError as error:
        raise UserError(f"{table}: not UTF-8 ({error}); save it as UTF-8") from error
    except (csv.Error, OSError) as error:
        raise UserError(f"{table}: not a readable table ({error}); save it as CSV, UTF-8") from error
    return [name for name in names if name != "file"], rows


def _check_names(table: Path, names: list[str]) -> None:
    if "file" not in names:
        raise UserError(f"{table}: the first line must be file,NAME,..., not '{','.join(names)}'")
    if len(set(names)) < len(names) or "" in names:
        odd = next(name for name in names if names.count(name) > 1 or not name)
        raise UserError(f"{table}: column '{odd}' needs a name of its own; correct the first line")
