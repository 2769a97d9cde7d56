"""attributes.csv as spreadsheets write it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedsim.data.attribute_tables import read
from fedsim.data.attributes import Attribute, Column
from fedsim.errors import UserError


def column(tmp_path: Path, text: str, count: int = 3) -> tuple[tuple[Attribute, ...], Column, list[str]]:
    (tmp_path / "attributes.csv").write_bytes(text.encode("utf-8"))
    attributes, z, notes = read(tmp_path, [tmp_path / "a" / f"{number}.png" for number in range(count)])
    assert z is not None
    return attributes, z, notes


def test_separators_and_marks_of_spreadsheets(tmp_path: Path) -> None:
    for mark, separator in (("", ","), ("\ufeff", ";"), ("", "\t")):
        lines = [
            ("file", "age", "town"),
            ("a/0.png", "1.5", "Ulm"),
            (r"a\1.png", "2", "Bonn"),
            ("a/2.png", "3", ""),
        ]
        text = mark + "\r\n".join(separator.join(cells) for cells in lines) + "\r\n\r\n"
        attributes, z, _ = column(tmp_path, text)
        assert attributes == (Attribute("age"), Attribute("town", ("Bonn", "Ulm")))
        np.testing.assert_array_equal(z, [[1.5, 1], [2, 0], [3, -1]])


@pytest.mark.parametrize(
    ("cells", "odd", "line"),
    [
        (["23", "NA", "41"], "NA", 3),
        (["0.5", "0.7", "n/a"], "n/a", 4),
        (['"0,5"', '"0,7"', '"0,9"'], "0,5", 2),
        (["12", "12 years", "13"], "12 years", 3),
        (["1", "nan", "2"], "nan", 3),
        (["12.5", "13.5", "50 %"], "50 %", 4),
        (['"1,234"', "999", "5"], "1,234", 2),
    ],
)
def test_numbers_are_never_taken_as_text(cells: list[str], odd: str, line: int, tmp_path: Path) -> None:
    rows = "".join(f"a/{number}.png,{cell}\n" for number, cell in enumerate(cells))
    with pytest.raises(
        UserError, match=rf"attributes\.csv: line {line}, column 'age'?: '{odd}' is no number"
    ):
        column(tmp_path, f"file,age\n{rows}")


def test_text_stays_text_and_odd_values_are_said(tmp_path: Path) -> None:
    attributes, _, notes = column(tmp_path, "file,town\na/0.png,Ulm\na/1.png,NA\na/2.png,Ulm\na/9.png,Rom\n")
    assert attributes == (Attribute("town", ("NA", "Ulm")),)
    assert any("'NA' is a value of 'town'" in note for note in notes)
    assert any("no images of the dataset: 1" in note for note in notes)


def test_dates_and_versions_are_text(tmp_path: Path) -> None:
    attributes, _, _ = column(tmp_path, "file,day\na/0.png,01.02.2020\na/1.png,03.11.2019\na/2.png,1.2.3\n")
    assert attributes == (Attribute("day", ("01.02.2020", "03.11.2019", "1.2.3")),)


def test_a_number_beyond_int64_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="line 3, column 'id': 99999999999999999999 is too large"):
        column(tmp_path, "file,id\na/0.png,1\na/1.png,99999999999999999999\na/2.png,3\n")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("file,a\na/0.png,1\na/0.png,2\n", "lines 2 and 3 are both for 'a/0.png'"),
        ("file,a,a\na/0.png,1,2\n", "column 'a' needs a name of its own"),
        ("file,a,\na/0.png,1,2\n", "column '' needs a name of its own"),
        ("file,a\na/0.png,0,5\n", "line 2 has not 2 cells but 3; write 0.5 for 0,5"),
        ('file,a\na/0.png,"1\n', "not a readable table"),
    ],
)
def test_tables_that_could_be_misread_are_refused(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"attributes\.csv: .*{said}"):
        column(tmp_path, text, 1)
