"""Sweeps: cells, going on where they stopped, and a table that is a function of results.json."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedsim.cli import app
from fedsim.errors import UserError
from fedsim.hooks import Hook
from fedsim.runs import Run
from fedsim.sweep import Cell, Sweep, cells_of, check_overrides, chosen, parse_grid, slug
from fedsim.sweep_table import table_of
from tests.helpers import StopAt, tiny

GRID = {"seed": [0, 1], "client.lr": [0.1, 0.01]}


@contextmanager
def silent(cell: Cell) -> Iterator[Sequence[Hook]]:
    yield []


def test_grid_values_are_toml_and_bare_words_strings() -> None:
    texts = ["seed=0,1,1", "tuning.name=bias, head", 'data.name="npz:a,b"', "x=[1,2],[3]", "y=true"]
    found = parse_grid(texts)
    assert found == {
        "seed": [0, 1],
        "tuning.name": ["bias", "head"],
        "data.name": ["npz:a,b"],
        "x": [[1, 2], [3]],
        "y": [True],
    }


@pytest.mark.parametrize("option", ["--grid", "--only"])
def test_a_key_that_is_given_twice_is_refused(option: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_grid(["client.lr=1,2", "seed=0", "client.lr=3"], option)
    expected = (
        f"{option} client.lr=1,2 and {option} client.lr=3 give client.lr twice; write all its values in one"
    )
    assert str(caught.value) == expected


def test_a_cell_counts_once() -> None:
    cells = cells_of(tiny(), {"seed": [0, 1, 0], "cells": [{"client.lr": 0.1}, {"client.lr": 0.1}]})
    assert [dict(cell.keys) for cell in cells] == [{"seed": n, "client.lr": 0.1} for n in (0, 1)]


def test_cells_are_the_product_and_a_name_goes_first() -> None:
    cells = cells_of(tiny(), {"partition.alpha": [0.1, 1.0], "partition.name": ["dirichlet"]})
    assert [cell.experiment["partition"].options["alpha"] for cell in cells] == [0.1, 1.0]
    assert [cell.experiment.clients for cell in cells] == [4, 4]
    assert cells[0].label == "partition.alpha=0.1 partition.name=dirichlet"


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    base = tiny(sweep={"seed": [0, 1], "rounds": [1]})
    found = Sweep.open(base, {"seed": [7]}, parent=tmp_path)
    assert [dict(cell.keys) for cell in found.cells] == [{"seed": 7, "rounds": 1}]
    assert found.folder == tmp_path / "tiny-sweep"


def test_slugs_are_safe_and_distinct() -> None:
    plain = slug({"seed": 0, "tuning.name": "bias"})
    assert plain == "seed-0_tuning.name-bias"
    odd = [slug({"data.name": value}) for value in ("npz:a/b", "npz:a:b", "npz:" + "x" * 200)]
    assert len(set(odd)) == 3
    assert all("/" not in text and ":" not in text and len(text) <= 80 for text in odd)


def test_a_cell_equals_the_ordinary_run(tmp_path: Path) -> None:
    from fedsim.finish import run_experiment

    results = Sweep(tmp_path / "s", tiny(), {"client.lr": [0.1, 0.05]}).run(silent)
    alone = run_experiment(tiny("client.lr=0.05"), Run.create(tiny("client.lr=0.05"), tmp_path))
    assert results[1]["summary"]["digest"] == alone.summary["digest"]


def test_going_on_after_an_interruption(tmp_path: Path) -> None:
    started: list[str] = []

    @contextmanager
    def noting(cell: Cell) -> Iterator[Sequence[Hook]]:
        started.append(cell.label)
        yield []

    @contextmanager
    def stopping(cell: Cell) -> Iterator[Sequence[Hook]]:
        yield [StopAt(2)] if dict(cell.keys) == {"seed": 0, "client.lr": 0.01} else []

    recorded = tmp_path / "s" / "results.json"
    with pytest.raises(KeyboardInterrupt):
        Sweep(tmp_path / "s", tiny(), GRID).run(stopping)
    assert len(json.loads(recorded.read_text())) == 1
    results = Sweep(tmp_path / "s", tiny(), GRID).run(noting)
    assert started == [cell.label for cell in cells_of(tiny(), GRID)[1:]]
    whole = Sweep(tmp_path / "whole", tiny(), GRID).run(silent)
    assert [r["summary"]["digest"] for r in results] == [r["summary"]["digest"] for r in whole]
    assert json.loads(recorded.read_text()) == results
    folders = {path.name for path in (tmp_path / "s" / "cells").iterdir()}
    assert folders == {cell.experiment.name for cell in cells_of(tiny(), GRID)}


def test_side_by_side_gives_the_same_results(tmp_path: Path) -> None:
    """Two processes: same digests in the same order, a failing cell harms no other, finished ones stay."""
    grid = {"partition.shots": [4, 5000, 3], "seed": [0, 1]}
    told: list[int] = []
    one = Sweep(tmp_path / "one", tiny("rounds=1"), grid).run(silent)
    both = Sweep(tmp_path / "two", tiny("rounds=1"), grid)
    two = both.run(silent, jobs=2, after=lambda number, cell, result: told.append(number))
    assert sorted(told) == [1, 2, 3, 4, 5, 6]
    assert [r.get("error") for r in one] == [r.get("error") for r in two]
    assert [r["cell"] for r in one] == [r["cell"] for r in two]
    digests = [[r["summary"]["digest"] for r in found if "summary" in r] for found in (one, two)]
    assert digests[0] == digests[1]
    assert len(digests[0]) == 4
    assert json.loads((tmp_path / "two" / "results.json").read_text()) == two


def test_a_failed_cell_is_recorded_and_the_others_run(tmp_path: Path) -> None:
    found = Sweep(tmp_path / "s", tiny("rounds=1"), {"partition.shots": [5000, 4]})
    results = found.run(silent)
    assert "shots = 5000" in results[0]["error"]
    assert results[1]["summary"]["rounds"] == 1
    assert "0 (1 failed)" in table_of(results)
    with pytest.raises(UserError, match="shots = 5000"):
        found.run(silent, stop_on_error=True)


def test_the_command_prints_the_table_and_ends_with_1_when_a_cell_failed(tmp_path: Path) -> None:
    file = tmp_path / "tiny.toml"
    file.write_text(tiny("rounds=1").toml())
    command = ["sweep", str(file), "--folder", str(tmp_path / "runs"), "--grid", "seed=0,1", "--json"]
    good = CliRunner().invoke(app, command)
    assert good.exit_code == 0
    assert len(json.loads(good.stdout)["results"]) == 2
    assert "✓ 2/2  seed=1" in good.stderr
    bad = CliRunner().invoke(app, [*command, "--grid", "partition.shots=4,5000", "--name", "other"])
    assert bad.exit_code == 1
    assert "✗ 2/4  seed=0 partition.shots=5000  [partition] shots = 5000" in bad.stderr
    assert (tmp_path / "runs" / "other" / "table.md").is_file()


@pytest.mark.parametrize(
    ("base", "grid", "said"),
    [
        (["rounds=2"], GRID, "rounds"),
        ([], {"seed": [0, 1, 2], "client.lr": [0.1, 0.01]}, "grid.seed"),
        ([], {"seed": [0, 1]}, "grid.client.lr"),
    ],
)
def test_another_sweep_of_the_same_name_is_refused(
    base: list[str], grid: dict[str, list[int]], said: str, tmp_path: Path
) -> None:
    Sweep(tmp_path / "s", tiny(), GRID)
    sweep = Sweep(tmp_path / "s", tiny(), GRID)
    Run.create(sweep.cells[0].experiment, tmp_path / "s" / "cells")
    with pytest.raises(UserError, match=f"holds another sweep.*{said}.*--name"):
        Sweep(tmp_path / "s", tiny(*base), grid)


def test_missing_assets_are_said_once_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all cells that are left; a folder without runs may then belong to another sweep."""
    monkeypatch.setenv("FEDSIM_ASSETS", str(tmp_path / "none"))
    sweep = Sweep(tmp_path / "s", tiny(), {"data.name": ["digits", "fashion-mnist"], "seed": [0, 1]})
    with pytest.raises(
        UserError, match=r"^asset 'fashion-mnist' is not on this machine: fedsim assets fetch"
    ):
        sweep.run(silent)
    assert not (tmp_path / "s" / "cells").exists()
    other = Sweep(tmp_path / "s", tiny("rounds=1"), {"seed": [0]})
    assert len(other.run(silent, only={"seed": [0]})) == 1
    with pytest.raises(UserError, match="holds another sweep"):
        Sweep(tmp_path / "s", tiny("rounds=2"), {"seed": [0]})


def test_a_run_folder_is_no_sweep(tmp_path: Path) -> None:
    Run.create(tiny(), tmp_path)
    with pytest.raises(UserError, match="is no sweep"):
        Sweep(tmp_path / "tiny", tiny(), GRID)


def test_the_table_is_made_from_the_results_alone() -> None:
    def cell(seed: int, tuning: str, accuracy: float) -> dict[str, object]:
        summary = {
            "accuracy": accuracy,
            "accuracy_start": 0.5,
            "accuracy_local_only": 0.25 * (1 + seed),
            "bytes_up": 1_500_000,
            "seconds": 4.0,
        }
        return {"cell": {"seed": seed, "tuning.name": tuning}, "summary": summary}

    results = [cell(0, "bias", 0.7), cell(0, "head", 0.6), cell(1, "bias", 0.9)]
    results.append({"cell": {"seed": 1, "tuning.name": "head"}, "error": "no luck"})
    for result, peak in ((results[0], 2_000_000), (results[2], 4_000_000)):
        result["summary"] |= {"peak_bytes": peak, "step_seconds": peak / 1e8}  # type: ignore[operator]
    assert table_of(json.loads(json.dumps(results))) == (
        "| tuning.name | n | accuracy | start | local-only | peak | step | bytes up | time |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
        "| bias | 2 | 0.800 ± 0.141 | 0.500 ± 0.000 | 0.375 ± 0.177 | 3.0 MB | 30 ms | 1.5 MB | 4.0 s |\n"
        "| head | 1 (1 failed) | 0.600 | 0.500 | 0.250 |  |  | 1.5 MB | 4.0 s |\n"
    )


def test_results_have_the_curve_and_the_other_accuracies(tmp_path: Path) -> None:
    base = tiny("evaluation.split=both", "evaluation.every=2")
    (result,) = Sweep(tmp_path / "s", base, {"seed": [0]}).run(silent)
    summary = result["summary"]
    assert [number for number, *_ in result["curve"]] == [0, 2, 3]
    assert result["curve"][0] == [0, 0, summary["accuracy_start"]]
    assert result["curve"][-1] == [3, summary["bytes_up"], summary["accuracy"]]
    head, _, row = ([cell.strip() for cell in line.split("|")] for line in table_of([result]).splitlines())
    shown = dict(zip(head, row, strict=True))
    for name, key in {"local": "", "local worst": "_worst", "local start": "_start"}.items():
        assert shown[name] == f"{summary[f'local_accuracy{key}']:.3f}"


def test_keys_that_belong_together_are_cells() -> None:
    grid = {
        "seed": [0, 1],
        "cells": [{"tuning.name": "full", "client.lr": 0.1}, {"tuning.name": "head", "client.lr": 0.5}],
    }
    found = cells_of(tiny(), grid)
    assert [dict(cell.keys) for cell in found] == [
        {"seed": 0, "tuning.name": "full", "client.lr": 0.1},
        {"seed": 0, "tuning.name": "head", "client.lr": 0.5},
        {"seed": 1, "tuning.name": "full", "client.lr": 0.1},
        {"seed": 1, "tuning.name": "head", "client.lr": 0.5},
    ]
    assert [cell.experiment["client"].options["lr"] for cell in found] == [0.1, 0.5, 0.1, 0.5]
    assert len({cell.experiment.name for cell in found}) == 4


TABLES = {
    "modes": [{"tuning.name": "head", "client.lr": 0.1}, {"tuning.name": "bias", "client.lr": 0.01}],
    "seed": [0, 1],
}


def test_a_key_that_two_lists_set_is_refused() -> None:
    base = tiny("rounds=1", model={"name": "tiny-clip"})
    with pytest.raises(
        UserError, match=r"'modes' and 'tuning\.name' of this sweep both set tuning\.name.*--only"
    ):
        cells_of(base, {**TABLES, "tuning.name": ["head"]})


def test_an_override_that_cells_hide_is_refused() -> None:
    cells = cells_of(tiny("rounds=1", model={"name": "tiny-clip"}), TABLES)
    check_overrides(["rounds=3"], cells)
    with pytest.raises(
        UserError, match=r"--set client\.lr=1: every cell of this sweep sets client\.lr; --only"
    ):
        check_overrides(["client.lr=1"], cells)


def test_only_some_cells_are_run_and_the_others_later(tmp_path: Path) -> None:
    base = tiny("rounds=1", model={"name": "tiny-clip"})
    found = Sweep(tmp_path / "s", base, TABLES)
    for only, said in (
        ({"tuning.name": ["full"]}, "--only tuning.name=full: no cell has that: known: bias, head"),
        ({"tunin.name": ["bias"]}, "--only tunin.name: cells of this sweep do not set it: did"),
        (
            {"client.lr": [0.01], "tuning.name": ["head"]},
            "--only: no cell is client.lr=0.01 tuning.name=head",
        ),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            found.run(silent, only=only)
    first = found.run(silent, only={"tuning.name": ["bias"], "seed": [1]})
    assert [r["cell"] for r in first] == [{"tuning.name": "bias", "client.lr": 0.01, "seed": 1}]
    second = found.run(silent, only={"seed": [1]})
    assert [r["cell"]["tuning.name"] for r in second] == ["head", "bias"]
    assert second[1] == first[0]
    assert chosen({}, found.cells) == {0, 1, 2, 3}
