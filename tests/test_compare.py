"""`fedsim compare`: what runs reached and in what they differ."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from fedsim.compare import comparison, differing, draw_curves, labels_of
from fedsim.errors import UserError
from fedsim.runs import Run
from tests.helpers import run, tiny


def _text(*runs: Run) -> str:
    console = Console(file=io.StringIO(), width=80)
    console.print(comparison(runs))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_results_curves_and_differing_keys(tmp_path: Path) -> None:
    one = run(tiny("rounds=1"), tmp_path)
    two = run(tiny("rounds=2", "client.lr=0.01", "name=other"), tmp_path)
    text = _text(one.run, two.run)
    for result in (one, two):
        summary = result.summary
        assert f"{summary['accuracy_start']:.3f} → {summary['accuracy']:.3f}" in text
        assert summary["digest"][:8] in text
    keys = [line.split() for line in text.splitlines()]
    assert ["rounds", "1", "2"] in keys
    assert ["client.lr", "0.1", "0.01"] in keys
    assert not [line for line in keys if line[:1] in (["seed"], ["name"])]
    assert "final states: different" in text
    assert max(map(len, text.splitlines())) <= 80


def test_curves_are_drawn_against_rounds_and_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    drawn: list[tuple[list[float], list[float]]] = []
    plot = Axes.plot

    def noted(self: Axes, x: list[float], y: list[float], **options: object) -> object:
        drawn.append((list(x), list(y)))
        return plot(self, x, y, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Axes, "plot", noted)
    runs = [run(tiny("evaluation.every=2", f"name={name}"), tmp_path) for name in "ab"]
    draw_curves([result.run for result in runs], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert len(drawn) == 4
    (rounds, accuracy), (sent, again) = drawn[:2]
    assert rounds == [0, 2, 3]
    assert accuracy == again == runs[0].history["accuracy"].dropna().tolist()
    assert sent[-1] == runs[0].summary["bytes_up"] / 1e6


def test_equal_runs(tmp_path: Path) -> None:
    text = _text(run(tiny("rounds=1"), tmp_path / "a").run, run(tiny("rounds=1"), tmp_path / "b").run)
    assert "the experiments are the same" in text
    assert "final states: identical" in text


def test_differing_keys_name_what_one_lacks() -> None:
    found = differing([{"a": 1, "b": {"c": 1, "d": [1]}}, {"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 1}}])
    assert found == {"b.c": [1, 2, 1], "b.d": [[1], None, None]}


def test_labels_grow_until_they_differ(tmp_path: Path) -> None:
    runs = [Run(tmp_path / name) for name in ("a/x", "b/x", "b/y")]
    assert labels_of(runs) == ["a/x", "b/x", "b/y"]
    assert labels_of(runs[1:]) == ["x", "y"]
    assert labels_of([runs[0], runs[0]]) == ["x (1)", "x (2)"]


def test_one_run_or_an_unfinished_one_is_no_comparison(tmp_path: Path) -> None:
    unfinished = Run.create(tiny(), tmp_path)
    with pytest.raises(UserError, match="two run folders"):
        comparison([unfinished])
    with pytest.raises(UserError, match="not finished; fedsim resume"):
        comparison([unfinished, unfinished])
