"""Text that people wrote, in whatever encoding; places for files, asked before the work."""

from __future__ import annotations

import codecs
from pathlib import Path

import pytest

from fedsim import config
from fedsim.errors import UserError
from fedsim.files import place_for, place_for_picture, text_of
from fedsim.flower_project import Project

TOML = 'name = "größer"\n[data]\nname = "digits"\n[model]\nname = "mlp"\n'


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_utf_8_is_read_with_and_without_a_mark(mark: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_bytes(mark + TOML.replace("\n", "\r\n").encode())
    assert config.load(tmp_path / "x.toml").name == "größer"


@pytest.mark.parametrize(
    ("encoding", "found"),
    [("latin-1", "byte 0xf6 in line 1"), ("utf-16", "UTF-16"), ("cp1252", "byte 0xf6 in line 1")],
)
def test_other_encodings_are_named_with_the_fix(encoding: str, found: str, tmp_path: Path) -> None:
    for name, read in (("x.toml", config.read), ("pyproject.toml", lambda file: Project.read(file.parent))):
        (tmp_path / name).write_bytes(TOML.encode(encoding))
        with pytest.raises(UserError) as caught:
            read(tmp_path / name)
        assert str(caught.value) == f"{tmp_path / name}: not UTF-8 text ({found}); save it as UTF-8"


def test_the_line_of_the_first_wrong_byte_is_named(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"one\ntwo\n# caf\xe9\n")
    with pytest.raises(UserError, match="byte 0xe9 in line 3"):
        text_of(tmp_path / "x")


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\)"):
        text_of(tmp_path)


@pytest.mark.parametrize("text", ["", "# a comment alone\n", "\ufeff\n\n"])
def test_an_empty_experiment_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text(text, "utf-8")
    with pytest.raises(UserError, match=r"x\.toml is empty: an experiment names its \[data\]"):
        config.load(tmp_path / "x.toml", ["rounds=1"])


def test_a_place_is_made_or_refused_at_once(tmp_path: Path) -> None:
    wanted = tmp_path / "a" / "b" / "x.png"
    assert place_for_picture(wanted, "--plot") == wanted
    assert wanted.parent.is_dir()
    assert not wanted.exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^--plot .*file/x\.png: cannot make its folder"):
        place_for_picture(tmp_path / "file" / "x.png", "--plot")
    with pytest.raises(UserError, match=r"--plot x\.foo: the name must end in \.png, \.pdf or \.svg"):
        place_for_picture(Path("x.foo"), "--plot")
    (tmp_path / "x.svg").mkdir()
    with pytest.raises(UserError, match=r"^--plot .*x\.svg: is a folder; name a file"):
        place_for_picture(tmp_path / "x.svg", "--plot")
    assert place_for(tmp_path, "--out") == tmp_path
