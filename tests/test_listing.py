"""`fedsim list`: everything registered is there, documented, and a broken entry breaks nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedsim import config, listing, registry
from fedsim.cli import app
from fedsim.errors import UserError
from tests.helpers import tiny


@pytest.mark.parametrize("kind", listing.KINDS)
def test_every_entry_has_a_name_and_a_line(kind: str) -> None:
    found = listing.entries(kind)
    assert found
    assert all(entry.name and entry.text for entry in found)


@pytest.mark.parametrize("kind", [kind for kind in registry.TABLES if kind not in ("strategies", "engines")])
def test_every_key_of_ours_is_documented(kind: str) -> None:
    for entry in listing.entries(kind):
        assert entry.usable, entry
        assert [key.name for key in entry.keys if not key.doc] == [], entry.name
    assert all(key.doc for key in listing.common_keys(kind))


def test_the_kinds_are_those_of_the_registry() -> None:
    assert set(listing.KINDS) == {*registry.TABLES, "experiments"}


def test_shipped_experiments_are_listed_with_their_first_comment() -> None:
    entry = next(e for e in listing.entries("experiments") if e.name == "quickstart")
    first = (config.shipped_folder() / "quickstart.toml").read_text().splitlines()[0]
    assert entry.text == first.removeprefix("# ")


def test_a_broken_entry_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = "fedsim.models.cnn"
    table = {"good": f"{ours}:mlp", "lost": "no_such_module:thing", "moved": f"{ours}:gone"}
    monkeypatch.setattr(registry, "table", lambda kind: table)
    good, lost, moved = listing.entries("models")
    assert good.usable
    assert not lost.usable
    assert "No module named 'no_such_module'" in lost.text
    assert not moved.usable
    result = CliRunner().invoke(app, ["list", "models", "--verbose"])
    assert result.exit_code == 0
    assert "not usable here" in result.stdout


def test_verbose_shows_type_default_and_the_keys_of_all_partitions() -> None:
    result = CliRunner().invoke(app, ["list", "partitions", "--verbose"], env={"COLUMNS": "80"})
    text = result.stdout
    assert "float > 0 (required)" in text
    assert "int ≥ 1 = 10" in text
    assert text.index("all partitions") < text.index("shots")
    assert max(map(len, text.splitlines())) <= 80


def test_names_with_a_path_show_where_it_goes() -> None:
    names = {entry.name: entry for kind in ("datasets", "models") for entry in listing.entries(kind)}
    for name in ("npz:PATH", "imagefolder:PATH", "timm:NAME", "hf:NAME", "open_clip:NAME"):
        first = names[name].keys[0]
        assert first.name == name.partition(":")[2]
        assert first.doc


def test_verbose_tells_the_whole_docstring_but_its_sections() -> None:
    runner = CliRunner()
    models = runner.invoke(app, ["list", "models", "--verbose"], env={"COLUMNS": "80"}).stdout
    assert "\n  Weights: `fedsim assets fetch minilm`.\n" in models
    assert "image_size  int ≥ 1 (optional)" in models
    assert '"batch" | "group" | "none"' in models
    strategies = runner.invoke(app, ["list", "strategies", "--verbose"], env={"COLUMNS": "80"}).stdout
    for section in ("Args:", "Raises:", "Parameters", "----"):
        assert section not in models + strategies


def test_every_mode_says_where_it_makes_sense() -> None:
    places = ("any model", "any backbone", "any CLIP", "Transformers", "CNNs")
    unclear = [entry.name for entry in listing.entries("tuning") if not any(p in entry.text for p in places)]
    assert unclear == []


def test_unknown_kind() -> None:
    with pytest.raises(UserError, match="did you mean 'models'"):
        listing.entries("model")


def test_a_split_is_drawn_for_terminal_and_file(tmp_path: Path) -> None:
    file = tmp_path / "tiny.toml"
    file.write_text(tiny().toml())
    result = CliRunner().invoke(app, ["list", "partitions", "--of", str(file), "--folder", str(tmp_path)])
    assert result.exit_code == 0, result.stderr
    assert "4 clients, 160 samples" in result.stdout
    picture = tmp_path / "tiny-split.png"
    assert f"picture  {picture}" in result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
