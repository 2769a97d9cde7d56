"""`fedsim memory`: the table is what the meters say, and mistakes are one line."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fedsim import memory_cli
from fedsim.cli import app
from tests.helpers import tiny

Invoke = Callable[..., Result]
MODEL = {"name": "mlp", "hidden": 64, "layers": 6}


@pytest.fixture
def fedsim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDSIM_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "tiny.toml").write_text(tiny("client.batch_size=256", model=MODEL).toml())
    return lambda *arguments: CliRunner().invoke(app, ["memory", "tiny.toml", *arguments])


def test_table_and_picture(fedsim: Invoke, tmp_path: Path) -> None:
    result = fedsim("--methods", "greedy,checkpointed-bp", "--blocks", "2,4,9")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert max(map(len, lines[:-1])) <= 80
    assert [line.split()[:2] for line in lines[1:6]] == [
        ["bp", "1"], ["greedy", "2"], ["greedy", "4"], ["checkpointed-bp", "2"], ["checkpointed-bp", "4"],
    ]  # fmt: skip
    saved = [int(re.findall(r"(\d+)%", line)[0]) for line in lines[1:4]]
    assert saved[0] == 100
    assert saved[0] > saved[1] > saved[2]
    assert (tmp_path / "runs" / "tiny-memory.png").stat().st_size > 5000


def test_all_methods_and_why_one_cannot_be_had() -> None:
    rows = memory_cli.measure(tiny(model=MODEL), ["all"], [3])
    names = ["bp", "checkpointed-bp", "greedy", "dgl", "infopro", "man", "man++", "hpff", "mlaan"]
    assert [row.method for row in rows] == names
    assert [row.method for row in rows if row.found is None] == ["infopro"]
    assert "reconstructs images from feature maps" in rows[4].skipped


def test_why_a_line_is_empty_stands_below_the_table(fedsim: Invoke) -> None:
    result = fedsim("--methods", "all", "--blocks", "2,3")
    lines = result.stdout.splitlines()
    table = lines[: next(i for i, line in enumerate(lines) if line.startswith("note"))]
    assert max(map(len, table)) <= 80
    assert all(head in table[0] for head in ("K", "saved", "activations", "total", "auxiliary"))
    assert [line.split()[:4] for line in table if "infopro" in line] == [
        ["infopro", "2", "see", "below"], ["infopro", "3", "see", "below"],
    ]  # fmt: skip
    assert "infopro 2, infopro 3: InfoPro reconstructs images" in result.stdout
    assert [line.count("%") for line in table if "checkpointed" in line] == [2, 2]


def test_cuts_have_a_line_of_their_own() -> None:
    experiment = tiny(model=MODEL, local={"name": "dgl", "cuts": ["more.0"]})
    rows = memory_cli.measure(experiment, ["dgl", "greedy"], [3])
    assert [(row.method, row.blocks) for row in rows] == [("bp", 1), ("dgl", 3), ("dgl", 2), ("greedy", 3)]


def test_the_experiments_own_options_count() -> None:
    def auxiliary(**options: str) -> int:
        experiment = tiny(model=MODEL, local={"name": "dgl", **options})
        found = memory_cli.measure(experiment, ["dgl"], [3])[1].found
        assert found is not None
        return found.auxiliary

    assert auxiliary(head="linear") < auxiliary()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "mann"], "did you mean 'man'"),
        (["--blocks", "2,x"], "whole numbers with commas between them"),
        (["--set", "tuning.name=head"], "nothing of this backbone trains"),
        (["--blocks", "99"], "blocks = 99, but this backbone has 5 units"),
        (["--blocks", "1"], "--blocks needs a number of at least 2"),
    ],
)
def test_mistakes(fedsim: Invoke, arguments: list[str], message: str) -> None:
    result = fedsim(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
